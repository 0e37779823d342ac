"""Measure the seconds per unit of each kind of work on this machine, for `trivium plan --calibrate`.

Times steps of the engine that stress different kinds of work (`plan/speed.py`) and fits non-negative seconds per unit
with least squares of the relative errors. Takes minutes. `plan/calibration.py` saves the result.
"""

import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Literal, get_args

import numpy as np
import torch

from trivium.config.run import Adapter
from trivium.engine.device import Machine, measure_flops, probe
from trivium.errors import TriviumError
from trivium.measure.synthetic import DTYPES, synthetic_batches, synthetic_engine
from trivium.model.shape import QwenShape
from trivium.plan.calibration import Calibration
from trivium.plan.speed import KINDS, WorkKind, step_work
from trivium.plan.workload import ComputeDtype, DeviceType, Workload

SECONDS_PER_TIMING = 2.0
MIN_REPEATS, MAX_REPEATS = 3, 30
EMULATED_SHARE = 0.5  # a dtype with less than this share of fp32's FLOP/s is emulated, too slow for training
GPU_WIDTH, GPU_TOKENS = 4, 8  # factors by which steps are larger on a GPU
HIDDEN_SHARE = 0.8  # launches that take less than this share of a GPU's step are hidden behind the compute
MAX_ERROR = 0.4  # with a larger relative error the fit is worse than a data sheet

Trained = Literal["everything", "adapter", "packed"]
WEIGHTS: dict[Trained, Literal["pretrained", "nf4", "random"]] = {
    "everything": "random",
    "adapter": "pretrained",
    "packed": "nf4",
}


@dataclass(frozen=True)
class Timing:
    """A step to time, at its size for a CPU: micro-batches of one packed sequence of `document` tokens each."""

    hidden: int
    layers: int
    vocab: int
    tokens: int
    document: int
    head_dim: int = 64
    trained: Trained = "everything"
    micro_batches: int = 1
    activation_checkpointing: bool = False
    supervised_share: float = 1.0

    def workload(self, dtype: ComputeDtype, device_type: DeviceType) -> Workload:
        """The step as numbers; larger on a GPU."""
        width, times = (GPU_WIDTH, GPU_TOKENS) if device_type == "gpu" else (1, 1)
        hidden, tokens = width * self.hidden, times * self.tokens
        heads = hidden // self.head_dim
        shape = QwenShape(
            family="qwen3",
            vocab_size=self.vocab,
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=self.head_dim,
            tie_word_embeddings=True,
        )
        return Workload(
            shape=shape,
            weights=WEIGHTS[self.trained],
            adapter=None if self.trained == "everything" else Adapter(),
            state_dtype="fp32",
            seq_len=tokens,
            micro_tokens=tokens,
            step_tokens=tokens * self.micro_batches,
            activation_checkpointing=self.activation_checkpointing,
            compute_dtype=dtype,
            device_type=device_type,
            supervised_share=self.supervised_share,
            document_tokens=times * self.document,
        )


# The comments name the kind of work that takes most time.
TIMINGS = (
    Timing(64, 6, 512, tokens=64, document=64, head_dim=32),  # launches; on a GPU nothing else
    Timing(512, 2, 1024, tokens=1024, document=128),  # products
    Timing(1024, 1, 1024, tokens=512, document=128, head_dim=128),  # wide products
    Timing(1024, 2, 1024, tokens=1024, document=128),  # wide products over many tokens
    Timing(128, 3, 1024, tokens=2048, document=64, head_dim=32),  # activations
    Timing(512, 1, 16384, tokens=512, document=128),  # the head
    Timing(64, 1, 65536, tokens=512, document=128, head_dim=32),  # logits
    Timing(128, 1, 151936, tokens=256, document=128, head_dim=32),  # the head of a large vocabulary
    Timing(128, 2, 1024, tokens=2048, document=2048, head_dim=32),  # scores, of narrow heads
    Timing(256, 2, 1024, tokens=2048, document=2048, head_dim=128),  # attention's products, of wide heads
    Timing(128, 4, 1024, tokens=1024, document=32, head_dim=32),  # documents
    Timing(768, 2, 16384, tokens=64, document=64, micro_batches=4),  # weights, several times a step
    Timing(512, 1, 65536, tokens=128, document=128),  # the optimizer
    Timing(256, 3, 1024, tokens=1024, document=256, activation_checkpointing=True),  # activation checkpointing
    Timing(384, 2, 32768, tokens=1024, document=512, supervised_share=0.5),  # a typical step
    Timing(512, 2, 1024, tokens=1024, document=128, trained="adapter"),  # frozen products
    Timing(
        192, 3, 8192, 1024, 256, 32, trained="adapter", activation_checkpointing=True, supervised_share=0.25
    ),  # the adapter
    Timing(256, 1, 32768, tokens=512, document=256, trained="adapter"),  # a frozen head
    Timing(768, 2, 1024, tokens=128, document=128, trained="packed"),  # dequantization
    Timing(
        384, 2, 8192, 512, 256, trained="packed", activation_checkpointing=True, supervised_share=0.5
    ),  # dequantization, with checkpointing
)


def calibrate(note: Callable[[str], None] = lambda text: None, device: str = "auto") -> Calibration:
    """Measure a device in every dtype with hardware support; `note` receives progress messages.

    Raises: TriviumError if the timings contradict each other, for example because something else was running.
    """
    machine = probe(device, "auto")
    # Without bitsandbytes, dequantization keeps the estimate from the data sheet.
    timings = [timing for timing in TIMINGS if timing.trained != "packed" or find_spec("bitsandbytes")]
    rates, errors = {}, {}
    for dtype in (dtype for dtype in get_args(ComputeDtype) if _is_in_hardware(machine, dtype)):
        steps = [timing.workload(dtype, machine.device_type) for timing in timings]
        seconds = []
        for number, workload in enumerate(steps, start=1):
            note(f"{dtype}: step {number} of {len(steps)}")
            seconds.append(measure_step(workload, machine.device))
        rates[dtype], errors[dtype] = fit(steps, seconds)
        if errors[dtype] > MAX_ERROR:
            raise TriviumError(
                f"The timings in {dtype} contradict each other: their best fit is {errors[dtype]:.0%} off; "
                f"expected at most {MAX_ERROR:.0%}. Something else was probably running. Nothing was saved; stop other "
                "programs and measure again."
            )
    planned = machine.as_planned
    return Calibration(
        device=planned.name,
        title=planned.title,
        num_threads=torch.get_num_threads(),
        seconds_per_unit=rates,
        error=errors,
        date=datetime.date.today().isoformat(),
        versions={"torch": version("torch"), "trivium": version("trivium")},
    )


def _is_in_hardware(machine: Machine, dtype: ComputeDtype) -> bool:
    fp32 = measure_flops(machine.device, torch.float32)
    return dtype == "fp32" or measure_flops(machine.device, DTYPES[dtype]) > EMULATED_SHARE * fp32


def measure_step(workload: Workload, device: torch.device) -> float:
    """Median seconds of an optimizer step."""
    return statistics.median(timed_steps(workload, device, SECONDS_PER_TIMING))


def timed_steps(workload: Workload, device: torch.device, least_seconds: float) -> list[float]:
    """Seconds of each of several optimizer steps on random tokens, after one warm-up step."""
    engine, batches = synthetic_engine(workload, device), synthetic_batches(workload)
    times: list[float] = []
    while len(times) <= MIN_REPEATS or (sum(times[1:]) < least_seconds and len(times) <= MAX_REPEATS):
        start = time.perf_counter()
        engine.forward_backward(batches)
        engine.optimizer_step(1e-5, batches)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return times[1:]


def fit(steps: Sequence[Workload], seconds: Sequence[float]) -> tuple[dict[str, float], float]:
    """Fit seconds per unit of each kind of work in the steps; also returns the largest relative error of the fit.

    A GPU computes while the CPU launches operations. There the first, small step gives the seconds per launch, and the
    other kinds are fitted to the steps that are limited by compute.
    """
    amounts = np.array([[_amount(workload, kind) for kind in KINDS] for workload in steps])
    times, operations = np.array(seconds), KINDS.index("operations")
    launch = 0.0
    if steps[0].device_type == "gpu":
        launch = times[0] / amounts[0, operations]
        is_busy = amounts[:, operations] * launch < HIDDEN_SHARE * times
        amounts, times = amounts[is_busy], times[is_busy]
        amounts[:, operations] = 0.0
    shares = amounts / times[:, None]
    per_unit = non_negative_fit(shares, np.ones(len(times)))
    error = float(np.abs(shares @ per_unit - 1.0).max())
    per_unit[operations] += launch
    fitted = {KINDS[index] for index in np.flatnonzero(shares.any(axis=0))} | {"operations"}
    return {kind: float(rate) for kind, rate in zip(KINDS, per_unit, strict=True) if kind in fitted}, error


def _amount(workload: Workload, kind: WorkKind) -> float:
    return sum(term.amount for term in step_work(workload) if term.kind == kind)


def non_negative_fit(matrix: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The x >= 0 with the least |matrix @ x - target|.

    Source: Lawson and Hanson 1974, "Solving Least Squares Problems", chapter 23.
    """
    scale = np.linalg.norm(matrix, axis=0)
    scale[scale == 0.0] = 1.0
    matrix = matrix / scale
    x = np.zeros(matrix.shape[1])
    free = np.zeros(len(x), dtype=bool)
    for _ in range(10 * len(x)):
        slope = matrix.T @ (target - matrix @ x)
        slope[free] = -np.inf
        if slope.max() <= 1e-12:
            break
        free[slope.argmax()] = True
        while True:
            solution = np.zeros(len(x))
            solution[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            if (solution[free] > 0.0).all():
                x = solution
                break
            blocked = free & (solution <= 0.0)
            fraction = np.min(x[blocked] / np.maximum(x[blocked] - solution[blocked], np.finfo(float).tiny))
            x += fraction * (solution - x)
            free &= x > 1e-12
    return x / scale
