"""Predicted against measured speed: this machine is calibrated, then trains setups that the calibration has not seen.

Each setup is a real engine on random tokens: from scratch, all weights, LoRA and QLoRA, with several widths, depths,
vocabularies and lengths, in fp32 and bf16, with and without activation checkpointing. Speed is the mean over a few
seconds of steps, after one warm-up step. The prediction from the data sheet alone is recorded too. Run it on an idle
machine. Writes bench/results/speed.json.

    python bench/speed.py [--seconds 6] [--first 18]
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from trivium.config.run import Adapter
from trivium.model.shape import Family, QwenShape
from trivium.plan.workload import ComputeDtype, Workload

RESULT = Path(__file__).parent / "results" / "speed.json"
TARGET_ERROR = 0.2


@dataclass(frozen=True)
class Way:
    """One way to train: the network, and how a step of it is cut."""

    method: Literal["scratch", "full", "lora", "qlora"]
    dtype: ComputeDtype
    hidden: int
    wide: int
    layers: int
    heads: tuple[int, int, int]  # of queries, of keys and values, and their width
    vocab: int
    seq_len: int
    micro_tokens: int
    micro_batches: int = 1
    document: int | None = None
    activation_checkpointing: bool = False
    supervised_share: float = 1.0
    rank: int = 16
    family: Family = "qwen3"

    def workload(self) -> Workload:
        shape = QwenShape(
            family=self.family,
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.wide,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads[0],
            num_key_value_heads=self.heads[1],
            head_dim=self.heads[2],
            tie_word_embeddings=True,
        )
        return Workload(
            shape=shape,
            weights={"lora": "pretrained", "qlora": "nf4"}.get(self.method, "random"),
            adapter=Adapter(rank=self.rank) if self.method in ("lora", "qlora") else None,
            state_dtype="fp32",
            seq_len=self.seq_len,
            micro_tokens=self.micro_tokens,
            step_tokens=self.micro_tokens * self.micro_batches,
            activation_checkpointing=self.activation_checkpointing,
            compute_dtype=self.dtype,
            device_type="cpu",
            supervised_share=self.supervised_share,
            document_tokens=self.document,
        )


WAYS = (
    Way("scratch", "bf16", 128, 320, 4, (4, 4, 32), 2048, 256, 1024),
    Way("lora", "bf16", 512, 1536, 8, (8, 4, 64), 32768, 1024, 1024, document=256, supervised_share=0.3),
    Way("qlora", "bf16", 768, 2304, 4, (12, 4, 64), 8192, 512, 512),
    Way("scratch", "fp32", 384, 1152, 6, (6, 6, 64), 4096, 1024, 1024),
    Way("scratch", "bf16", 256, 768, 6, (4, 2, 64), 8192, 512, 2048, micro_batches=2),
    Way("scratch", "bf16", 256, 768, 6, (4, 2, 64), 151936, 1024, 1024, document=256),
    Way("full", "bf16", 512, 1536, 6, (8, 4, 64), 32768, 1024, 1024, document=128, supervised_share=0.4),
    Way("full", "bf16", 1024, 3072, 3, (16, 8, 128), 8192, 512, 1024),
    Way("full", "bf16", 896, 4864, 3, (14, 2, 64), 16384, 512, 512, activation_checkpointing=True, family="qwen2"),
    Way("full", "fp32", 512, 1536, 3, (8, 8, 64), 2048, 2048, 2048, activation_checkpointing=True),
    Way(
        "lora",
        "bf16",
        1024,
        3072,
        3,
        (16, 8, 128),
        32768,
        2048,
        2048,
        activation_checkpointing=True,
        supervised_share=0.5,
    ),
    Way("lora", "fp32", 256, 768, 4, (4, 2, 64), 8192, 512, 1024, document=128),
    Way("lora", "bf16", 768, 2048, 4, (12, 12, 64), 151936, 512, 512, supervised_share=0.5, rank=64),
    Way("qlora", "bf16", 1024, 2816, 3, (16, 4, 64), 16384, 1024, 1024, activation_checkpointing=True, family="qwen2"),
    Way("qlora", "fp32", 512, 1536, 3, (8, 4, 64), 2048, 256, 512),
    Way("scratch", "bf16", 192, 576, 8, (6, 6, 32), 2048, 2048, 2048),
    Way("scratch", "bf16", 640, 1728, 4, (10, 5, 64), 4096, 512, 4096, document=64),
    Way("full", "fp32", 256, 768, 4, (4, 2, 64), 151936, 256, 512, supervised_share=0.5),
)


def describe(workload: Workload) -> dict[str, Any]:
    """A step's numbers, as far as they are set."""
    left_out = ("shape", "adapter", "num_devices", "strategy", "offload", "device_type")
    values = {key: value for key, value in asdict(workload).items() if key not in left_out}
    return asdict(workload.shape) | values | {"rank": workload.adapter.rank if workload.adapter else None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6.0, help="at least, for each way to train")
    parser.add_argument("--first", type=int, default=len(WAYS), help="only so many ways")
    options = parser.parse_args()
    import torch

    from trivium.measure.calibrate import calibrate, timed_steps
    from trivium.plan.devices import processor
    from trivium.plan.speed import predict_speed

    calibration = calibrate(lambda text: print(text, file=sys.stderr), "cpu")
    device, results = processor(), []
    for way in WAYS[: options.first]:
        workload = way.workload()
        seconds = statistics.median(timed_steps(workload, torch.device("cpu"), options.seconds))
        speed, by_data_sheet = predict_speed(workload, device, calibration), predict_speed(workload, device)
        result = {
            "method": way.method,
            "workload": describe(workload),
            "measured_tokens_per_second": workload.step_tokens / seconds,
            "predicted_tokens_per_second": speed.tokens_per_second,
            "error": speed.tokens_per_second * seconds / workload.step_tokens - 1.0,
            "is_within_bounds": speed.low <= seconds <= speed.high,
            "seconds_per_step": seconds,
            "predicted_items": speed.items,
            "data_sheet_tokens_per_second": by_data_sheet.tokens_per_second,
            "is_within_data_sheet_bounds": by_data_sheet.low <= seconds <= by_data_sheet.high,
        }
        results.append(result)
        shown = f"{result['measured_tokens_per_second']:8,.0f} measured {result['error']:+.1%}"
        print(way.method, way.dtype, way.hidden, way.vocab, shown, file=sys.stderr)
    errors = [abs(result["error"]) for result in results]
    record = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "bitsandbytes", "peft", "numpy")},
        "machine": {"processor": device.title, "num_threads": torch.get_num_threads(), "cores": os.cpu_count()},
        "platform": platform.platform(),
        "calibration": asdict(calibration),
        "targets": {"error": TARGET_ERROR},
        "summary": {
            "num_ways": len(results),
            "mean_error": statistics.mean(errors),
            "largest_error": max(errors),
            "within_target": sum(error <= TARGET_ERROR for error in errors),
            "within_bounds": sum(result["is_within_bounds"] for result in results),
            "within_data_sheet_bounds": sum(result["is_within_data_sheet_bounds"] for result in results),
        },
        "results": results,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record["summary"], indent=1))


if __name__ == "__main__":
    main()
