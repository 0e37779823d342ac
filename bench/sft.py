"""Fine-tuning on short conversations against TRL's SFTTrainer: the same model, conversations, loss tokens and steps.

A Qwen3 of six layers with the real vocabulary learns from chats of 60 to 200 tokens, assistant turns only, once with
all weights and once with LoRA. Each contender trains in its own process, several times, alternating; figures are
medians, and ratios compare figures of one run of this script, since machines are noisy. Padding tokens are not counted;
memory is the peak of the whole process, loading and preparation included. Speed is also given in CPU time, which other
work on the machine disturbs less. Writes bench/results/sft.json.

    python bench/sft.py TOKENIZER_FOLDER [--repeats 3] [--steps 3]

TOKENIZER_FOLDER holds Qwen3's tokenizer and chat template.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from random import Random
from typing import Any

from pretrain import SHAPE, peak_gib

RESULT = Path(__file__).parent / "results" / "sft.json"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 16, 32
CONVERSATIONS_PER_STEP = 8  # TRL's default batch; their mean of about 130 tokens fills a row of 1024
SEQ_LEN = 1024
WARMUP_STEPS = 1
CONTENDERS = {
    "trivium": "bf16 products on fp32 weights (LoRA: a bf16 base), whole conversations in rows of 1024 tokens",
    "trl_defaults": "SFTConfig as it comes: bf16 autocast on fp32 weights, gradient checkpointing, 8 padded rows",
    "trl_tuned": "packed without padding, no checkpointing, bf16 autocast on fp32 weights (LoRA: a bf16 base)",
    "trl_tuned_bf16": "the same with bf16 weights, gradients and moments, which lose small updates",
}
TARGETS = {
    "trl_defaults": {"speed_ratio": 12.0, "memory_ratio": 0.25},
    "trl_tuned": {"speed_ratio": 8.0},
}


def write_inputs(tokenizer_folder: Path, num_conversations: int, folder: Path) -> None:
    """Write model/, a random Qwen3 with the given tokenizer, and chats.jsonl."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from trivium.quickstart.grammar import story

    torch.manual_seed(0)
    config = Qwen3Config(**SHAPE, rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    shutil.copytree(tokenizer_folder, folder / "model")
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    rng, lines = Random(0), []
    for _ in range(num_conversations):
        words = story(rng).text.split()
        question, answer = rng.randint(20, 60), rng.randint(20, 100)
        chat = {"user": words[:question], "assistant": words[question : question + answer]}
        messages = [{"role": role, "content": " ".join(text)} for role, text in chat.items()]
        lines.append(json.dumps({"messages": messages}) + "\n")
    (folder / "chats.jsonl").write_text("".join(lines))


class Count:
    """Tokens, scored rows and seconds of each step, and seconds spent in the output head and its loss."""

    def __init__(self) -> None:
        self.ends = [0.0]
        self.processor_ends = [0.0]
        self.tokens: list[int] = []
        self.supervised: list[int] = []
        self.scored: list[int] = []
        self.head_seconds = 0.0

    def batch(self, tokens: int, supervised: int, scored: int) -> None:
        self.tokens.append(tokens)
        self.supervised.append(supervised)
        self.scored.append(scored)

    def end_step(self) -> None:
        if len(self.ends) == WARMUP_STEPS:
            self.head_seconds = 0.0
        self.ends.append(time.perf_counter())
        self.processor_ends.append(time.process_time())

    def in_head(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.head_seconds += time.perf_counter() - start

        return timed

    def figures(self, steps: int) -> dict[str, float]:
        """Of the steps after the warm-up."""
        measured = slice(WARMUP_STEPS, WARMUP_STEPS + steps)
        seconds = self.ends[WARMUP_STEPS + steps] - self.ends[WARMUP_STEPS]
        processor_seconds = self.processor_ends[WARMUP_STEPS + steps] - self.processor_ends[WARMUP_STEPS]
        tokens = sum(self.tokens[measured])
        return {
            "tokens_per_second": tokens / seconds,
            "tokens_per_processor_second": tokens / processor_seconds,
            "peak_gib": peak_gib(),
            "tokens_per_step": tokens / steps,
            "supervised_share": sum(self.supervised[measured]) / tokens,
            "head_rows_per_step": sum(self.scored[measured]) / steps,
            "seconds_per_step": seconds / steps,
            "head_seconds_per_step": self.head_seconds / steps,
        }


def train_trivium(method: str, folder: Path, steps: int) -> dict[str, float]:
    """As `trivium train` does it, without the records and checkpoints."""
    from trivium.config.run import Run, with_method_defaults
    from trivium.engine.build import build_engine
    from trivium.engine.device import probe
    from trivium.engine.prepare import prepare
    from trivium.model import qwen

    values = {
        "method": method,
        "name": "bench",
        "model": str(folder / "model"),
        "data": {"sources": [str(folder / "chats.jsonl")], "seq_len": SEQ_LEN, "held_out": 0.0, "workers": 1},
        "batch": {"tokens": SEQ_LEN},
        "budget": {"steps": steps + WARMUP_STEPS},
        "device": "cpu",
        "precision": "bf16",
        "runs_dir": str(folder / "runs"),
    }
    run = Run.model_validate(with_method_defaults(values))
    machine, job = probe(run.device, run.precision), prepare(run, note=lambda _: None)
    engine = build_engine(job, machine)
    count = Count()
    qwen.cross_entropy_sum = count.in_head(qwen.cross_entropy_sum)  # its gradients are computed there
    for step in range(steps + WARMUP_STEPS):
        batches = job.batches.step(step)
        for batch in batches:
            count.batch(batch.num_tokens, batch.num_supervised, len(batch.supervised))
        engine.forward_backward(batches)
        engine.optimizer_step(run.optimizer.lr, batches)
        count.end_step()
    return count.figures(steps)


def train_trl(contender: str, method: str, folder: Path, steps: int) -> dict[str, float]:
    """SFTTrainer from the model's folder and the same file, with its own preparation and collator."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.utils import _ChunkedLogProbFunction as Head

    count = Count()

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            count.end_step()

    arguments: dict[str, Any] = {}
    if contender != "trl_defaults":
        arguments = {
            "packing": True,
            "max_length": SEQ_LEN,
            "per_device_train_batch_size": 1,
            "gradient_checkpointing": False,
            "model_init_kwargs": {"dtype": "bfloat16"} if method == "lora" or contender == "trl_tuned_bf16" else None,
        }
    trainer = SFTTrainer(
        model=str(folder / "model"),
        args=SFTConfig(
            output_dir=str(folder / "trl"),
            max_steps=steps + WARMUP_STEPS,
            assistant_only_loss=True,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=Dataset.from_list([json.loads(line) for line in (folder / "chats.jsonl").open()]),
        peft_config=LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=PROJECTIONS) if method == "lora" else None,
        callbacks=[Clock()],
    )
    collate = trainer.data_collator

    def counting(rows: list[dict[str, Any]]) -> Any:
        batch = collate(rows)
        tokens = int(batch["attention_mask"].sum()) if "attention_mask" in batch else batch["input_ids"].numel()
        count.batch(tokens, int((batch["labels"] != -100).sum()), batch["labels"][:, 1:].numel())
        return batch

    trainer.data_collator = counting
    Head.forward, Head.backward = staticmethod(count.in_head(Head.forward)), staticmethod(count.in_head(Head.backward))
    trainer.train()
    return count.figures(steps)


def measure(contender: str, method: str, folder: Path, steps: int) -> dict[str, float]:
    """One contender in its own process."""
    command = [sys.executable, __file__, str(folder), "--steps", str(steps), "--method", method]
    result = subprocess.run([*command, "--contender", contender], capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(result.stderr)
    print(method, contender, result.stdout.splitlines()[-1], file=sys.stderr)
    return json.loads(result.stdout.splitlines()[-1])


def compare(method: str, folder: Path, steps: int, repeats: int) -> dict[str, Any]:
    """All contenders of a method in turn, `repeats` times."""
    contenders = [name for name in CONTENDERS if method == "full" or name != "trl_tuned_bf16"]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name in contenders:
            runs[name].append(measure(name, method, folder, steps))
    medians = {name: {key: statistics.median(run[key] for run in runs[name]) for key in runs[name][0]} for name in runs}
    against = {}
    for name in contenders[1:]:
        pairs = [*zip(runs["trivium"], runs[name], strict=True)]
        ours, theirs = medians["trivium"], medians[name]
        elsewhere = [one["seconds_per_step"] - one["head_seconds_per_step"] for one in (theirs, ours)]
        ratios = {key: statistics.median(us[key] / they[key] for us, they in pairs) for key in ours}
        against[name] = {
            "speed_ratio": ratios["tokens_per_second"],
            "processor_speed_ratio": ratios["tokens_per_processor_second"],
            "memory_ratio": ratios["peak_gib"],
            "head_speed_ratio": theirs["head_seconds_per_step"] / ours["head_seconds_per_step"],
            "head_rows_ratio": theirs["head_rows_per_step"] / ours["head_rows_per_step"],
            "rest_speed_ratio": elsewhere[0] / elsewhere[1],
        }
    return {"medians": medians, "against": against, "runs": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="TOKENIZER_FOLDER")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--method", choices=("full", "lora"), help="this one only")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.contender == "trivium":
        print(json.dumps(train_trivium(options.method, options.folder, options.steps)))
        return
    if options.contender:
        print(json.dumps(train_trl(options.contender, options.method, options.folder, options.steps)))
        return
    with tempfile.TemporaryDirectory() as inputs:
        # Packing needs about a third more conversations than steps take, since TRL sorts them first.
        write_inputs(options.folder, 2 * CONVERSATIONS_PER_STEP * (options.steps + WARMUP_STEPS), Path(inputs))
        methods = [options.method] if options.method else ["full", "lora"]
        results = {method: compare(method, Path(inputs), options.steps, options.repeats) for method in methods}
    record = {
        "date": datetime.date.today().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate")},
        "cpu_cores": os.cpu_count(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "shape": SHAPE,
        "conversations_per_step": CONVERSATIONS_PER_STEP,
        "contenders": CONTENDERS,
        "targets": TARGETS,
        "results": results,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({method: result["against"] for method, result in results.items()}, indent=1))


if __name__ == "__main__":
    main()
