"""How much prefetching gains: the same steps with batches packed in the step and in a background thread.

Small models on short conversations, where packing is the largest part of a step. Both alternate in one process; the
figures are medians over all steps and their ratios. Writes bench/results/prefetch.json.

    python bench/prefetch.py [--steps 60] [--repeats 5] [--device cuda]
"""

import argparse
import datetime
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from trivium.config.run import Optimizer
from trivium.data.batch.order import Order
from trivium.data.batch.pack import Batch, StoreBatches
from trivium.data.batch.prefetch import Prefetch
from trivium.data.store.megatron import Store, StoreWriter
from trivium.engine.engine import Engine
from trivium.model.catalog import size_for_budget
from trivium.model.qwen import Qwen, init_weights

RESULT = Path(__file__).parent / "results" / "prefetch.json"
VOCAB_SIZE, SEQ_LEN, SEQUENCES = 2048, 1024, 2
NUM_DOCUMENTS, MEAN_TOKENS = 20_000, 40


def random_store(folder: str) -> Store:
    """Many short documents of random tokens, on disk."""
    rng = np.random.default_rng(0)
    lengths = rng.poisson(MEAN_TOKENS, NUM_DOCUMENTS) + 2
    with StoreWriter(Path(folder) / "tokens", np.dtype(np.uint16)) as writer:
        writer.add(rng.integers(0, VOCAB_SIZE, lengths.sum()).astype(np.uint16), lengths)
    return Store(Path(folder))


def seconds_of_steps(engine: Engine, next_batches: Callable[[], list[Batch]], steps: int) -> list[float]:
    """Seconds of each step, packing or waiting for it included."""
    found = []
    for _ in range(steps):
        start = time.perf_counter()
        engine.forward_backward(next_batches())
        engine.optimizer_step(1e-4)
        found.append(time.perf_counter() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    store = random_store(tempfile.mkdtemp())
    order = Order([store.lengths], None, SEQ_LEN, seed=0, whole=True)
    source = StoreBatches([store], order, SEQUENCES, SEQUENCES, None)
    source.step(0)  # lays out the epoch

    pin = Batch.pinned if device.type == "cuda" else None

    results = {}
    for name, num_params in (("0.25M", 250_000), ("1M", 1_000_000)):
        model = Qwen(size_for_budget(num_params, VOCAB_SIZE))
        init_weights(model, seed=0)
        if device.type == "cuda":
            model.compute_dtype = torch.bfloat16
        engine = Engine(model.to(device), Optimizer(lr=1e-4, weight_decay=0.1))
        seconds: dict[str, list[float]] = {"in the step": [], "ahead": []}
        step = 0
        for _ in range(arguments.repeats):
            numbers = map(source.step, range(step, step + arguments.steps))
            seconds["in the step"] += seconds_of_steps(engine, numbers.__next__, arguments.steps)
            with Prefetch(source, step, step + arguments.steps, prepare=pin) as ahead:
                seconds["ahead"] += seconds_of_steps(engine, ahead.next, arguments.steps)
            step += arguments.steps
        start = time.perf_counter()
        for number in range(20):
            source.step(number)
        medians = {how: statistics.median(found) for how, found in seconds.items()}
        results[name] = {
            "packing_seconds": (time.perf_counter() - start) / 20,
            "step_seconds": medians,
            "speed_ratio": medians["in the step"] / medians["ahead"],
        }
        print(name, results[name])
    content = {
        "date": datetime.date.today().isoformat(),
        "versions": {"torch": version("torch")},
        "device": str(device),
        "threads": torch.get_num_threads(),
        "steps": arguments.steps * arguments.repeats,
        "tokens_per_step": SEQUENCES * SEQ_LEN,
        "results": results,
    }
    RESULT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
