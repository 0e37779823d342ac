"""Sizes that batches are padded to. Never imports torch, so that the planner can read them."""

SUPERVISED_MULTIPLE = 64
"""The supervised positions of a batch are padded to a multiple of this: matrix products of ever new sizes are slow."""
