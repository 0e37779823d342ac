"""Rules about hyperparameters: learning rate, adapter scaling, precision, sequence length, model shape."""

import torch

from trivium.doctor.findings import Rule, Violation
from trivium.doctor.prepared import PreparedRun
from trivium.engine.device import measure_flops

SMALL_MODEL_PARAMS = 3_000_000_000
INTERMEDIATE_MULTIPLE = 64
SCALING_RANGE = (0.25, 4.0)


def rate_range(prepared: PreparedRun) -> tuple[float, float, str]:
    """The usual learning rates, both ends excluded, for what the run trains."""
    is_small = prepared.job.shape.num_params < SMALL_MODEL_PARAMS
    if prepared.run.trainable == "adapter":
        size = "under" if is_small else "with at least"
        return (2e-5, 3e-3 if is_small else 1e-3, f"an adapter on a model {size} 3B parameters")
    if prepared.run.weights == "random":
        return (2e-5, 2e-2, "random weights")
    return (1e-7, 1e-4, "all weights of a pretrained model")


def learning_rate_range(prepared: PreparedRun) -> Violation | None:
    """Q19: an unusual learning rate."""
    rate, (low, high, what) = prepared.run.optimizer.lr, rate_range(prepared)
    if low < rate < high:
        return None
    if rate <= low:
        outcome = "the model will hardly learn"
    elif prepared.run.weights == "random":
        outcome = "the loss is likely to diverge"
    else:
        outcome = "the model is likely to forget what it knows"
    return Violation(
        "warning",
        f"optimizer.lr is {rate:g}; {outcome}.",
        f"between {low:g} and {high:g} for {what}.",
        "remove optimizer.lr to use the method's default, or set a value in that range.",
    )


def adapter_scaling(prepared: PreparedRun) -> Violation | None:
    """Q20: alpha and rank that scale the adapter's update unusually little or much."""
    adapter = prepared.run.adapter
    if adapter is None:
        return None
    low, high = SCALING_RANGE
    if low < adapter.scaling <= high:
        return None
    formula = "alpha / sqrt(rank)" if adapter.rslora else "alpha / rank"
    return Violation(
        "info" if adapter.scaling == low else "warning",
        f"the adapter's update is scaled by {formula} = {adapter.scaling:g}; the default is 2.",
        f"{low:g} to {high:g}, since the scaling acts like a second learning rate.",
        "remove adapter.alpha to use twice the rank; to learn faster or slower, change optimizer.lr.",
    )


def slow_precision(prepared: PreparedRun) -> Violation | None:
    """Q22: bf16 on a device that only emulates it."""
    machine = prepared.machine
    if prepared.run.precision != "bf16" or machine.compute_dtype != torch.bfloat16:
        return None
    fp32_flops = measure_flops(machine.device, torch.float32)
    if fp32_flops <= machine.peak_flops:
        return None
    return Violation(
        "warning",
        f"precision is bf16, but this device reaches {machine.peak_flops / 1e9:,.0f} GFLOP/s in bf16 and "
        f"{fp32_flops / 1e9:,.0f} in fp32.",
        "fp32 if it is as fast, since it is more precise.",
        "set precision: auto, which measures both.",
    )


def unusual_shape(prepared: PreparedRun) -> Violation | None:
    """Q26: a shape for a new model that no published model of its family has."""
    if prepared.run.weights != "random":
        return None
    shape = prepared.job.shape
    usual_theta = shape.traits.rope_theta
    if usual_theta is not None and shape.rope_theta != usual_theta:
        return Violation(
            "warning",
            f"rope_theta is {shape.rope_theta:g}; 10,000 is the default of transformers.",
            f"{usual_theta:,.0f}, as in all Qwen2.5 and Qwen3 models.",
            "remove model.shape.rope_theta, unless you need another value.",
        )
    if shape.intermediate_size % INTERMEDIATE_MULTIPLE:
        nearest = INTERMEDIATE_MULTIPLE * max(1, round(shape.intermediate_size / INTERMEDIATE_MULTIPLE))
        return Violation(
            "info",
            f"intermediate_size is {shape.intermediate_size}.",
            f"a multiple of {INTERMEDIATE_MULTIPLE}, for which matrix kernels are optimized.",
            f"set model.shape.intermediate_size={nearest} if speed matters.",
        )
    return None


def longer_than_positions(prepared: PreparedRun) -> Violation | None:
    """Q31: sequences longer than the model was trained on. (The tokenizer's model_max_length is not reliable.)"""
    longest, seq_len = prepared.job.shape.max_position_embeddings, prepared.run.data.seq_len
    if prepared.run.weights == "random" or seq_len <= longest:
        return None
    return Violation(
        "warning",
        f"data.seq_len is {seq_len:,}, and max_position_embeddings in the model's config.json is {longest:,}.",
        "sequences as long as the model was trained on.",
        f"set data.seq_len to at most {longest:,}, unless you want to extend the context.",
    )


RULES = (
    Rule[PreparedRun]("Q19", "lr-range", learning_rate_range),
    Rule[PreparedRun]("Q20", "lora-scaling", adapter_scaling),
    Rule[PreparedRun]("Q22", "precision", slow_precision),
    Rule[PreparedRun]("Q26", "unusual-shape", unusual_shape),
    Rule[PreparedRun]("Q31", "beyond-positions", longer_than_positions),
)
