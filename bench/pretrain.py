"""Training from scratch against transformers' Trainer with default settings: same shape, data, dtype, tokens per step.

Each contender trains in its own process, several times, alternating; figures are medians, and ratios compare figures of
one run of this script, since machines are noisy. Padding tokens are not counted. Writes
bench/results/pretrain.json.

    python bench/pretrain.py [--repeats 3] [--steps 8]
"""

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path(__file__).parent / "results" / "pretrain.json"
SHAPE = {
    "vocab_size": 151_936,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}
DOCUMENTS_PER_STEP = 8  # the Trainer's default batch size
MEAN_TOKENS, MAX_TOKENS = 256, 1024
WARMUP_STEPS = 2


def documents(num_documents: int) -> list[np.ndarray]:
    """Documents of mixed length, log-normal around 256 tokens, of Zipf-distributed ids."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(MEAN_TOKENS) - 0.32, 0.8, num_documents).astype(int), 16, MAX_TOKENS)
    ids = np.minimum(rng.zipf(1.2, int(lengths.sum())), SHAPE["vocab_size"] - 10)
    return np.split(ids.astype(np.int64), np.cumsum(lengths)[:-1])


def train_trivium(dtype: str, steps: int) -> tuple[int, float]:
    """Real tokens and seconds of the steps after the warm-up."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import torch

    from tests.support.memory_store import MemoryStore
    from trivium.config.run import Optimizer
    from trivium.data.batch.order import Order
    from trivium.data.batch.pack import StoreBatches
    from trivium.engine.engine import Engine
    from trivium.model.qwen import Qwen, init_weights
    from trivium.model.shape import QwenShape

    store = MemoryStore(documents((steps + WARMUP_STEPS) * DOCUMENTS_PER_STEP))
    model = Qwen(QwenShape(family="qwen3", rope_theta=1e6, rms_norm_eps=1e-6, **SHAPE))
    init_weights(model, seed=0)
    model.compute_dtype = getattr(torch, dtype)
    engine = Engine(model, Optimizer(lr=5e-5, weight_decay=0.0))
    source = StoreBatches(
        [store],
        Order([store.lengths], None, 1024, seed=0),
        sequences_per_step=2,
        sequences_per_micro_batch=2,
        num_sequences=None,
    )
    num_tokens, start = 0, 0.0
    for step in range(steps + WARMUP_STEPS):
        if step == WARMUP_STEPS:
            start = time.perf_counter()
        batches = source.step(step)
        engine.forward_backward(batches)
        engine.optimizer_step(5e-5, batches)
        num_tokens += sum(batch.num_tokens for batch in batches) if step >= WARMUP_STEPS else 0
    return num_tokens, time.perf_counter() - start


def train_transformers(dtype: str, steps: int) -> tuple[int, float]:
    """The same through transformers' Trainer with its default arguments."""
    import torch
    from transformers import (
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Qwen3Config,
        Qwen3ForCausalLM,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from trivium.data.tokenizer import train_tokenizer

    texts = documents((steps + WARMUP_STEPS) * DOCUMENTS_PER_STEP)
    times: list[float] = []
    tokens: list[int] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(["a"], "byte", 259, Path(folder) / "tokenizer")
        tokenizer = AutoTokenizer.from_pretrained(Path(folder) / "tokenizer")
        collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)

        def counting(rows: list[dict[str, list[int]]]) -> Any:
            tokens.append(sum(len(row["input_ids"]) for row in rows))
            return collate(rows)

        model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps + WARMUP_STEPS,
            bf16=dtype == "bfloat16",
            use_cpu=not torch.cuda.is_available(),
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        dataset = [{"input_ids": text.tolist()} for text in texts]
        Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=counting, callbacks=[Clock()]).train()
    return sum(tokens[WARMUP_STEPS : WARMUP_STEPS + steps]), times[-1] - times[WARMUP_STEPS - 1]


CONTENDERS = {"trivium": train_trivium, "transformers": train_transformers}


def peak_gib() -> float:
    """The most memory this process has held, as the kernel counted it."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def measure(contender: str, dtype: str, steps: int) -> dict[str, float]:
    """One contender in its own process."""
    command = [sys.executable, __file__, "--contender", contender, "--dtype", dtype, "--steps", str(steps)]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--contender", choices=CONTENDERS)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    if options.contender:
        num_tokens, seconds = CONTENDERS[options.contender](options.dtype, options.steps)
        print(json.dumps({"tokens_per_second": num_tokens / seconds, "peak_gib": peak_gib()}))
        return
    results = {}
    for dtype in ("float32", "bfloat16"):
        runs = {name: [] for name in CONTENDERS}
        for _ in range(options.repeats):
            for name in CONTENDERS:
                runs[name].append(measure(name, dtype, options.steps))
                print(dtype, name, runs[name][-1], file=sys.stderr)
        results[dtype] = {
            "tokens_per_second": {n: statistics.median(r["tokens_per_second"] for r in runs[n]) for n in runs},
            "peak_gib": {n: statistics.median(r["peak_gib"] for r in runs[n]) for n in runs},
            "speed_ratio": statistics.median(
                ours["tokens_per_second"] / theirs["tokens_per_second"]
                for ours, theirs in zip(runs["trivium"], runs["transformers"], strict=True)
            ),
            "memory_ratio": statistics.median(
                ours["peak_gib"] / theirs["peak_gib"]
                for ours, theirs in zip(runs["trivium"], runs["transformers"], strict=True)
            ),
            "runs": runs,
        }
    record = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
        "cpu_cores": os.cpu_count(),
        "shape": SHAPE,
        "documents_per_step": DOCUMENTS_PER_STEP,
        "targets": {"speed_ratio": 1.5, "memory_ratio": 0.6},
        "results": results,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({dtype: {k: v for k, v in r.items() if k != "runs"} for dtype, r in results.items()}, indent=1))


if __name__ == "__main__":
    main()
