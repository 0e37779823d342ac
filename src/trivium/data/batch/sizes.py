"""Sizes that batches are padded to. The planner reads them, so this module never imports torch."""

SUPERVISED_MULTIPLE = 64
"""The supervised positions of a batch are padded to a multiple of this, since matmuls of changing sizes are slow."""
