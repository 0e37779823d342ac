"""Rules about the run's own numbers: rates, scaling, precision, lengths, shapes.

Reads `weights` and `trainable`, never the method. Imported by `examine.py`.
"""

from typing import NamedTuple

import torch

from trivium.doctor.case import Case
from trivium.doctor.findings import Rule, Trouble
from trivium.engine.device import measure_flops

SMALL_MODEL_PARAMS = 3_000_000_000
QWEN_ROPE_THETA = 1_000_000.0
INTERMEDIATE_MULTIPLE = 64
SCALING_RANGE = (0.25, 4.0)


class RateRange(NamedTuple):
    """Learning rates strictly between the two are usual."""

    above: float
    below: float
    what: str


def rate_range(case: Case) -> RateRange:
    """The usual learning rates of what is trained, from what it starts as."""
    is_small = case.job.shape.num_params < SMALL_MODEL_PARAMS
    if case.run.trainable == "adapter":
        size = "under" if is_small else "of at least"
        return RateRange(2e-5, 3e-3 if is_small else 1e-3, f"an adapter on a model {size} 3B parameters")
    if case.run.weights == "random":
        return RateRange(2e-5, 2e-2, "weights that start at random")
    return RateRange(1e-7, 1e-4, "all weights of a pretrained model")


def learning_rate_range(case: Case) -> Trouble | None:
    """Q19: a rate of another way to train, which unlearns or learns nothing."""
    rate, usual = case.run.optimizer.lr, rate_range(case)
    if usual.above < rate < usual.below:
        return None
    fate = "what the model knows is likely to be lost" if rate >= usual.below else "next to nothing will be learnt"
    if rate >= usual.below and case.run.weights == "random":
        fate = "the loss is likely to diverge"
    return Trouble(
        "warning",
        f"optimizer.lr is {rate:g}; with it {fate}.",
        f"between {usual.above:g} and {usual.below:g} for {usual.what}.",
        "leave optimizer.lr out to take the method's own, or set one in that range.",
    )


def adapter_scaling(case: Case) -> Trouble | None:
    """Q20: alpha and rank that make the update far smaller or larger than the rate says."""
    adapter = case.run.adapter
    if adapter is None:
        return None
    low, high = SCALING_RANGE
    if low < adapter.scaling <= high:
        return None
    formula = "alpha / sqrt(rank)" if adapter.rslora else "alpha / rank"
    return Trouble(
        "info" if adapter.scaling == low else "warning",
        f"the adapter's update is scaled by {formula} = {adapter.scaling:g}, where the default is 2.",
        f"{low:g} to {high:g}, since the scaling acts like a second learning rate.",
        "leave adapter.alpha out to take twice the rank; to learn faster or slower, change optimizer.lr.",
    )


def slow_precision(case: Case) -> Trouble | None:
    """Q22: bf16 asked of a device that only imitates it."""
    machine = case.machine
    if case.run.precision != "bf16" or machine.compute_dtype != torch.bfloat16:
        return None
    fp32_flops = measure_flops(machine.device, torch.float32)
    if fp32_flops <= machine.peak_flops:
        return None
    return Trouble(
        "warning",
        f"precision is bf16, and this device multiplies in bf16 at {machine.peak_flops / 1e9:,.0f} GFLOP/s, in fp32 at "
        f"{fp32_flops / 1e9:,.0f}.",
        "bf16 where it is faster, since it is coarser.",
        "set precision: auto, which measures and decides.",
    )


def unusual_shape(case: Case) -> Trouble | None:
    """Q26: numbers of a network from nothing that no Qwen has."""
    if case.run.weights != "random":
        return None
    shape = case.job.shape
    if shape.rope_theta != QWEN_ROPE_THETA:
        return Trouble(
            "warning",
            f"rope_theta is {shape.rope_theta:g}; 10,000 is what transformers takes when nobody says.",
            f"{QWEN_ROPE_THETA:,.0f}, as all Qwen2.5 and Qwen3 models have.",
            "leave model.shape.rope_theta out, unless the other value is the point of the run.",
        )
    if shape.intermediate_size % INTERMEDIATE_MULTIPLE:
        nearest = INTERMEDIATE_MULTIPLE * max(1, round(shape.intermediate_size / INTERMEDIATE_MULTIPLE))
        return Trouble(
            "info",
            f"intermediate_size is {shape.intermediate_size}, no multiple of {INTERMEDIATE_MULTIPLE}.",
            "a multiple, which matrix kernels and quantisation are made for.",
            f"set model.shape.intermediate_size={nearest} if speed matters.",
        )
    return None


def longer_than_positions(case: Case) -> Trouble | None:
    """Q31: rows longer than the positions the model has seen; the tokenizer's model_max_length lies."""
    longest, seq_len = case.job.shape.max_position_embeddings, case.run.data.seq_len
    if case.run.weights == "random" or seq_len <= longest:
        return None
    return Trouble(
        "warning",
        f"data.seq_len is {seq_len:,}, and the model's config.json says max_position_embeddings {longest:,}.",
        "rows no longer than the positions that the model was trained on; further ones it has never seen.",
        f"set data.seq_len to at most {longest:,}, unless you mean to teach the model longer texts.",
    )


RULES = (
    Rule[Case]("Q19", "lr-range", learning_rate_range),
    Rule[Case]("Q20", "lora-scaling", adapter_scaling),
    Rule[Case]("Q22", "precision", slow_precision),
    Rule[Case]("Q26", "unusual-shape", unusual_shape),
    Rule[Case]("Q31", "beyond-positions", longer_than_positions),
)
