"""A hundred random plans under a memory limit: plans predicted to fit must run, plans predicted not to must fail.

Each plan is a random small network, method, setting and memory size. A child process limits itself to that memory
(RLIMIT_DATA; the libraries loaded before count as the planner's `framework`) and takes two real steps, returning freed
blocks to the system, as a run that is short of memory does. Plans that fit only without the planner's margin are left
out. Writes bench/results/limits.json.

    python bench/limits.py [--plans 100] [--seed 0]
"""

import argparse
import datetime
import gc
import json
import os
import random
import resource
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import peft  # noqa: F401  (imported before the limit, as libraries are)
import torch

from trivium.config.run import Adapter
from trivium.engine.device import is_out_of_memory, return_freed_blocks
from trivium.files import MIB
from trivium.measure.synthetic import synthetic_batches, synthetic_engine
from trivium.model.shape import QwenShape
from trivium.plan.fit import FIT_SHARE, fits
from trivium.plan.memory import FRAMEWORK_BYTES, peak_memory
from trivium.plan.workload import Workload

RESULT = Path(__file__).parent / "results" / "limits.json"
RAN, RAN_OUT = 0, 3


def random_plan(rng: random.Random) -> tuple[Workload, int]:
    """A step, and a memory that is either somewhat less than it needs or just enough with the margin, in bytes."""
    head_dim, heads = rng.choice((32, 64)), rng.choice((2, 4, 8))
    hidden = head_dim * heads
    shape = QwenShape(
        family=rng.choice(("qwen2", "qwen3")),
        vocab_size=rng.choice((2_048, 16_000, 60_000, 151_936)),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=rng.randint(2, 10),
        num_attention_heads=heads,
        num_key_value_heads=rng.choice([count for count in (1, 2, 4, 8) if heads % count == 0]),
        head_dim=head_dim,
        tie_word_embeddings=rng.random() < 0.7,
    )
    way: dict[str, Any] = {"weights": "random", "adapter": None}
    if rng.random() < 0.6:
        way = {"weights": rng.choice(("pretrained", "nf4")), "adapter": Adapter(rank=rng.choice((4, 16, 64)))}
        way["supervised_share"] = rng.choice((0.3, 0.7, 1.0))
    seq_len = rng.choice((256, 512, 1024))
    micro_tokens = seq_len * rng.choice((1, 2, 4))
    work = Workload(
        shape,
        **way,
        state_dtype=rng.choice(("fp32", "fp32", "8bit")),
        seq_len=seq_len,
        micro_tokens=micro_tokens,
        step_tokens=micro_tokens * rng.choice((1, 2)),
        activation_checkpointing=rng.random() < 0.5,
        compute_dtype=rng.choice(("fp32", "bf16")),
        device_type="cpu",
        document_tokens=rng.choice((None, 100, 256)),
    )
    needed = peak_memory(work)
    if rng.random() < 0.25:
        return work, FRAMEWORK_BYTES["cpu"] + round(needed.allocated * rng.uniform(0.5, 0.98))
    return work, round(max(needed.high, needed.total / FIT_SHARE) * rng.uniform(1.0, 1.1))


def verdict(work: Workload, memory_bytes: int) -> str:
    """What the planner says of it."""
    needed = peak_memory(work)
    if fits(needed, memory_bytes):
        return "fits"
    return "impossible" if needed.total > memory_bytes else "too close"


def run_limited(work: Workload, memory_bytes: int) -> int:
    """Two steps in a child process whose tensors have what the memory leaves beside the framework; its exit status."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        limit = private_bytes() + memory_bytes - FRAMEWORK_BYTES["cpu"]
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        status = two_steps(work)
    except MemoryError:  # also what is left of it was too little to say so
        status = RAN_OUT
    finally:
        os._exit(status)


def two_steps(work: Workload) -> int:
    try:
        engine = synthetic_engine(work)
        batches = synthetic_batches(work)
        for _ in range(2):
            engine.forward_backward(batches)
            engine.optimizer_step(1e-5, batches)
    except (MemoryError, OSError, RuntimeError) as error:
        return RAN_OUT if is_out_of_memory(error) else 1
    return RAN


def private_bytes() -> int:
    """What RLIMIT_DATA counts of this process now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmData:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    return_freed_blocks()
    for dtype in ("fp32", "bf16"):  # what is imported or made on the way is there before the limit
        two_steps(replace(small_step(), compute_dtype=dtype))
    gc.collect()
    rng, rows = random.Random(options.seed), []
    while len(rows) < options.plans:
        work, memory_bytes = random_plan(rng)
        said = verdict(work, memory_bytes)
        if said == "too close":
            continue
        status = run_limited(work, memory_bytes)
        needed = peak_memory(work).total
        is_right = status == (RAN if said == "fits" else RAN_OUT)
        rows.append({"verdict": said, "status": status, "right": is_right, "share": needed / memory_bytes})
        print(
            f"{len(rows):3} {said:10} needs {needed / MIB:7,.0f} of {memory_bytes / MIB:7,.0f} MiB: "
            f"{ {RAN: 'ran', RAN_OUT: 'ran out'}.get(status, status) }{'' if is_right else '   WRONG'}",
            file=sys.stderr,
        )
        if not is_right:
            print(work, file=sys.stderr)
    summary = {
        said: {"num": len(found), "right": sum(row["right"] for row in found)}
        for said in ("fits", "impossible")
        for found in [[row for row in rows if row["verdict"] == said]]
    }
    print(json.dumps(summary))
    content = {"date": datetime.date.today().isoformat(), "versions": {"torch": version("torch")}, "summary": summary}
    RESULT.write_text(json.dumps(content | {"rows": rows}, indent=1) + "\n")


def small_step() -> Workload:
    """A step that loads what steps load."""
    shape = QwenShape("qwen3", 2048, 64, 192, 2, 2, 2, 32, tie_word_embeddings=True)
    return replace(
        Workload(shape, "nf4", Adapter(rank=4), "8bit", 256, 256, 256, True, "bf16", "cpu"), document_tokens=100
    )


if __name__ == "__main__":
    main()
