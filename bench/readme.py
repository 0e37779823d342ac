"""Write the figures of the README from bench/results, so that each number exists once.

python bench/readme.py [--check]
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
BEGIN = "<!-- figures: made by bench/readme.py from bench/results; do not edit -->\n"
END = "<!-- end of figures -->"


def figures() -> str:
    """The table of measured ratios, in Markdown."""
    pretrain = json.loads((RESULTS / "pretrain.json").read_text())
    tokenize = json.loads((RESULTS / "tokenize_corpus.json").read_text())
    startup = json.loads((RESULTS / "startup.json").read_text())
    sft = json.loads((RESULTS / "sft.json").read_text())
    rows = []
    for dtype, result in pretrain["results"].items():
        speed, memory = result["speed_ratio"], result["memory_ratio"]
        rows.append(
            (
                f"training from scratch, {dtype}, vocabulary 151,936",
                f"the Trainer of transformers {pretrain['versions']['transformers']}, its defaults",
                f"{speed:.1f}x its real tokens/s, {memory:.2f}x its peak memory",
            )
        )
    ways = {"full": "full fine-tuning", "lora": "LoRA"}
    others = {"trl_defaults": "its defaults", "trl_tuned": "tuned: packed, no checkpointing"}
    for method, result in sft["results"].items():
        for name, how in others.items():
            against = result["against"][name]
            rows.append(
                (
                    f"{ways[method]} on short conversations, bfloat16, vocabulary 151,936",
                    f"SFTTrainer of TRL {sft['versions']['trl']}, {how}",
                    f"{against['speed_ratio']:.1f}x its real tokens/s, {against['memory_ratio']:.2f}x its peak memory",
                )
            )
    rows.append(
        (
            f"tokenizing JSONL with Qwen's tokenizer, {tokenize['workers']} workers",
            f"preprocess_data.py of Megatron-LM {tokenize['versions']['megatron_lm']}",
            f"{tokenize['speed_ratio']:.1f}x its speed, {tokenize['memory_ratio']:.2f}x its peak memory; "
            f"{tokenize['large_memory_ratio']:.2f}x the memory at 4x the corpus",
        )
    )
    rows.append(("`trivium --help`", "", f"{startup['help_seconds']:.2f} s"))
    slowest = f"refusing a wrong run file, the slowest of {startup['num_error_cases']}"
    rows.append((slowest, "", f"{startup['slowest_error_seconds']:.1f} s"))
    rows += planner_rows()
    lines = [
        f"## Measured\n\nOn {pretrain['cpu_cores']} CPU cores, each pair side by side in one run of `bench/`.\n",
        "| what | against | result |",
        "|---|---|---|",
        *(f"| {what} | {against} | {result} |" for what, against, result in rows),
    ]
    return "\n".join(lines) + "\n"


def planner_rows() -> list[tuple[str, str, str]]:
    """What the planner said against what came of it."""
    memory = json.loads((RESULTS / "memory-cpu.json").read_text())["summary"]
    speed = json.loads((RESULTS / "speed.json").read_text())["summary"]
    limits = json.loads((RESULTS / "limits.json").read_text())["summary"]
    planning = json.loads((RESULTS / "planning.json").read_text())
    fits, impossible = limits["fits"], limits["impossible"]
    return [
        (
            f"predicted peak memory of a step, {memory['num']} ways to train",
            "torch's allocator",
            f"off by {memory['median']:.2%} in the median, {memory['worst']:.1%} at most",
        ),
        (
            f"predicted tokens/s after `--calibrate`, {speed['num_ways']} ways to train",
            "timed steps",
            f"off by {speed['mean_error']:.0%} in the mean, {speed['largest_error']:.0%} at most, "
            f"{speed['within_target']} within 20%",
        ),
        (
            f"{fits['num'] + impossible['num']} random plans under a memory limit",
            "what ran",
            f"{fits['right']} of {fits['num']} that fit ran, {impossible['right']} of {impossible['num']} "
            "impossible ones ran out",
        ),
        (
            f"`trivium plan`, the slowest of {len(planning['answer_seconds'])} published models",
            "",
            f"{planning['slowest_answer_seconds']:.1f} s",
        ),
        (
            "a search over every device, portion and strategy, the slowest",
            "",
            f"{planning['slowest_search_seconds']:.1f} s",
        ),
    ]


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    before, rest = text.split(BEGIN)
    made = before + BEGIN + figures() + END + rest.split(END, 1)[1]
    if "--check" in sys.argv and made != text:
        raise SystemExit("README.md: the figures are not those of bench/results. Run: python bench/readme.py")
    path.write_text(made)


if __name__ == "__main__":
    main()
