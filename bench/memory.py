"""Predicted against measured peak memory of a training step, for every method. Writes bench/results/memory-*.json.

On a CPU the allocator's events are summed (torch.profiler); on a GPU the allocator reports the peak. Two optimizer
steps are measured, so that moments and accumulated gradients exist. `--trace` also runs each step on fake tensors.

    python bench/memory.py [--device cuda] [--trace] [--only WORD]
"""

import argparse
import datetime
import gc
import json
import statistics
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.support.allocator import allocated_peak
from trivium.config.run import Adapter
from trivium.measure.synthetic import synthetic_batches, synthetic_engine
from trivium.model import catalog
from trivium.model.shape import QwenShape
from trivium.plan.memory import peak_memory
from trivium.plan.workload import Workload

RESULTS = Path(__file__).parent / "results"
STEPS = 2


def small_shape(family: Any, hidden: int, layers: int, heads: tuple[int, int, int], wide: int, vocab: int) -> QwenShape:
    """A network of a few million parameters; heads are query heads, key-value heads and their size."""
    return QwenShape(
        family=family,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=heads[2],
        tie_word_embeddings=vocab < 100_000,
    )


SMALL = {
    "qwen3 256 x 6, 16K": small_shape("qwen3", 256, 6, (4, 2, 64), 768, 16_000),
    "qwen2 384 x 4, 2K": small_shape("qwen2", 384, 4, (6, 2, 64), 1024, 2_048),
    "qwen3 192 x 3, 152K untied": small_shape("qwen3", 192, 3, (4, 4, 48), 512, 151_936),
    "qwen2 512 x 8, 4K": small_shape("qwen2", 512, 8, (8, 8, 64), 1365, 4_096),
}
LARGE = ("Qwen3-0.6B", "Qwen2.5-0.5B", "Qwen3-1.7B", "Qwen2.5-1.5B", "Qwen3-4B", "Qwen2.5-7B", "Qwen3-8B")
WAYS: dict[str, dict[str, Any]] = {
    "scratch": {"weights": "random", "adapter": None},
    "full": {"weights": "pretrained", "adapter": None, "supervised_share": 0.5},
    "lora": {"weights": "pretrained", "adapter": Adapter(), "supervised_share": 0.5},
    "qlora": {"weights": "nf4", "adapter": Adapter(rank=32), "supervised_share": 0.6},
}


def workload(shape: QwenShape, way: str, device_type: str, **changes: Any) -> Workload:
    """A step of 2,048 tokens in rows of 1,024, unless something else is asked for."""
    values: dict[str, Any] = {
        "shape": shape,
        "state_dtype": "fp32",
        "seq_len": 1024,
        "micro_tokens": 2048,
        "step_tokens": 2048,
        "activation_checkpointing": False,
        "compute_dtype": "bf16",
        "device_type": device_type,
        "document_tokens": 256,
    }
    return Workload(**values | WAYS[way] | changes)


def cpu_workloads() -> Iterator[tuple[str, Workload]]:
    """Every way on every small network, with and without recomputation, and each setting that moves memory."""
    for shape_name, shape in SMALL.items():
        for way in WAYS:
            for activation_checkpointing in (False, True):
                name = f"{way}, {shape_name}{', activation_checkpointing' if activation_checkpointing else ''}"
                yield name, workload(shape, way, "cpu", activation_checkpointing=activation_checkpointing)
    first, second, wide, deep = SMALL.values()
    for way in ("scratch", "lora"):
        for name, changes in {
            "fp32": {"compute_dtype": "fp32"},
            "fp32, activation_checkpointing": {"compute_dtype": "fp32", "activation_checkpointing": True},
            "accumulated": {"step_tokens": 8192},
            "fp32, accumulated, activation_checkpointing": {
                "compute_dtype": "fp32",
                "step_tokens": 8192,
                "activation_checkpointing": True,
            },
            "one document a row": {"document_tokens": None},
            "one row": {"micro_tokens": 1024, "step_tokens": 1024, "document_tokens": None},
            "long rows": {"seq_len": 4096, "micro_tokens": 4096, "step_tokens": 4096, "document_tokens": None},
            "few tokens": {"seq_len": 128, "micro_tokens": 256, "step_tokens": 256, "document_tokens": None},
        }.items():
            shape = {"one row": second, "long rows": deep, "few tokens": wide}.get(name, first)
            yield f"{way}, {name}", workload(shape, way, "cpu", **changes)
    yield "scratch, 8-bit moments", workload(deep, "scratch", "cpu", state_dtype="8bit", activation_checkpointing=True)
    yield (
        "scratch, 8-bit moments, few tokens",
        workload(
            deep,
            "scratch",
            "cpu",
            state_dtype="8bit",
            micro_tokens=1024,
            step_tokens=1024,
            activation_checkpointing=True,
        ),
    )
    some = Adapter(rank=8, targets=["q_proj", "v_proj"])
    yield "lora, two targets", workload(first, "lora", "cpu", adapter=some)
    yield "lora, rank 64", workload(deep, "lora", "cpu", adapter=Adapter(rank=64), activation_checkpointing=True)
    yield "lora, dropout", workload(first, "lora", "cpu", adapter=Adapter(dropout=0.05))
    yield "lora, DoRA", workload(first, "lora", "cpu", adapter=Adapter(dora=True))
    yield "lora, token rows", workload(first, "lora", "cpu", num_token_rows=2)


def gpu_workloads() -> Iterator[tuple[str, Workload]]:
    """Published sizes up to 8B in every way, as they would be run on one large GPU."""
    for size in LARGE:
        shape = catalog.get(size)
        for way in WAYS:
            tokens = 8192 if way != "scratch" else 4096
            changes = {"seq_len": 2048, "micro_tokens": tokens, "document_tokens": 512}
            for activation_checkpointing in (False, True):
                if way in ("lora", "qlora") or shape.num_params < 5e9:
                    made = workload(
                        shape,
                        way,
                        "gpu",
                        activation_checkpointing=activation_checkpointing,
                        step_tokens=2 * tokens,
                        **changes,
                    )
                    yield f"{way}, {size}{', activation_checkpointing' if activation_checkpointing else ''}", made


def measured_on_gpu(work: Workload) -> int:
    """The CUDA allocator's own peak."""
    engine = synthetic_engine(work, "cuda")
    batches = synthetic_batches(work)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(STEPS):
        engine.forward_backward(batches)
        engine.optimizer_step(1e-5, batches)
    peak = torch.cuda.max_memory_allocated()
    del engine, batches
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--trace", action="store_true")
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    on_cpu = options.device == "cpu"
    rows = []
    for name, work in cpu_workloads() if on_cpu else gpu_workloads():
        if options.only not in name:
            continue
        peak = allocated_peak(work) if on_cpu else measured_on_gpu(work)
        predicted = peak_memory(work)
        row = {
            "name": name,
            "measured_bytes": peak,
            "predicted_bytes": predicted.allocated,
            "error": predicted.allocated / peak - 1,
            "instant": predicted.instant,
        }
        if options.trace:
            from tests.support.trace import trace_peak

            row["traced_bytes"] = trace_peak(work).peak_bytes
        rows.append(row)
        traced = f"  traced {row['traced_bytes'] / peak - 1:+.1%}" if options.trace else ""
        print(f"{row['error']:+7.2%}  {peak / 2**20:9,.1f} MiB  {name}  ({predicted.instant}){traced}", file=sys.stderr)
    errors = [abs(row["error"]) for row in rows]
    summary = {"num": len(rows), "median": statistics.median(errors), "worst": max(errors)}
    print(json.dumps(summary))
    if not options.only:
        packages = ("torch", "peft", "bitsandbytes", "trivium")
        device = torch.cuda.get_device_name() if not on_cpu else "cpu"
        content = {
            "date": datetime.date.today().isoformat(),
            "device": device,
            "versions": {package: version(package) for package in packages},
            "summary": summary,
            "rows": rows,
        }
        path = RESULTS / f"memory-{options.device}.json"
        path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
