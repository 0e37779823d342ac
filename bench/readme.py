"""Write the figures of the README from bench/results, so that each number exists once.

python bench/readme.py [--check]
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


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
                f"Trainer of transformers {pretrain['versions']['transformers']}, default settings",
                f"{speed:.1f}x the tokens/s, {memory:.2f}x the peak memory",
            )
        )
    ways = {"full": "full fine-tuning", "lora": "LoRA"}
    others = {"trl_defaults": "default settings", "trl_tuned": "tuned: packed, no checkpointing"}
    for method, result in sft["results"].items():
        for name, how in others.items():
            against = result["against"][name]
            rows.append(
                (
                    f"{ways[method]} on short conversations, bfloat16, vocabulary 151,936",
                    f"SFTTrainer of TRL {sft['versions']['trl']}, {how}",
                    f"{against['speed_ratio']:.1f}x the tokens/s, {against['memory_ratio']:.2f}x the peak memory",
                )
            )
    rows.append(
        (
            f"tokenizing JSONL with Qwen's tokenizer, {tokenize['workers']} workers",
            f"preprocess_data.py of Megatron-LM {tokenize['versions']['megatron_lm']}",
            f"{tokenize['speed_ratio']:.1f}x the speed, {tokenize['memory_ratio']:.2f}x the peak memory; "
            f"{tokenize['large_memory_ratio']:.2f}x its own memory on 4x the corpus",
        )
    )
    rows.append(("`trivium --help`", "", f"{startup['help_seconds']:.2f} s"))
    slowest = f"rejecting an invalid run file, slowest of {startup['num_error_cases']}"
    rows.append((slowest, "", f"{startup['slowest_error_seconds']:.1f} s"))
    rows += planner_rows()
    lines = [
        f"## Measured\n\nOn {pretrain['cpu_cores']} CPU cores. Both sides of a comparison were measured in one run of "
        "`bench/`. Tokens do not include padding.\n",
        "| what | against | result |",
        "|---|---|---|",
        *(f"| {what} | {against} | {result} |" for what, against, result in rows),
    ]
    return "\n".join(lines) + "\n"


def planner_rows() -> list[tuple[str, str, str]]:
    """The planner's predictions against what happened."""
    memory = json.loads((RESULTS / "memory-cpu.json").read_text())["summary"]
    speed = json.loads((RESULTS / "speed.json").read_text())["summary"]
    limits = json.loads((RESULTS / "limits.json").read_text())["summary"]
    planning = json.loads((RESULTS / "planning.json").read_text())
    fits, impossible = limits["fits"], limits["impossible"]
    return [
        (
            f"predicted peak memory of a step, {memory['num']} training setups",
            "torch's allocator",
            f"median error {memory['median']:.2%}, worst {memory['worst']:.1%}",
        ),
        (
            f"predicted tokens/s after `--calibrate`, {speed['num_ways']} training setups",
            "timed steps",
            f"mean error {speed['mean_error']:.0%}, worst {speed['largest_error']:.0%}, "
            f"{speed['within_target']} of {speed['num_ways']} within 20%",
        ),
        (
            f"{fits['num'] + impossible['num']} random plans under a memory limit",
            "the same runs",
            f"{fits['right']} of {fits['num']} predicted to fit ran, {impossible['right']} of {impossible['num']} "
            "predicted not to fit ran out of memory",
        ),
        (
            f"`trivium plan`, slowest of {len(planning['answer_seconds'])} published models",
            "",
            f"{planning['slowest_answer_seconds']:.1f} s",
        ),
        (
            "slowest search over every device, micro-batch and strategy",
            "",
            f"{planning['slowest_search_seconds']:.1f} s",
        ),
    ]


def demo() -> str:
    """What the demo prints, and what it took."""
    found = json.loads((RESULTS / "demo.json").read_text())
    wall, cpu = (sum(part[kind] for part in found["seconds"].values()) for kind in ("wall", "cpu"))
    return (
        f"```\n{found['transcript']}\n```\n\n"
        f"The download, the training and the comparison took {wall / 60:.1f} minutes on {found['cpu_cores']} CPU "
        f"cores, and {cpu / 60:.1f} minutes of CPU time.\n"
    )


def replaced(text: str, name: str, made: str) -> str:
    """The text with the part between the two comments of a name made anew."""
    begin = f"<!-- {name}: made by bench/readme.py from bench/results; do not edit -->\n"
    end = f"<!-- end of {name} -->"
    before, rest = text.split(begin)
    return before + begin + made + end + rest.split(end, 1)[1]


def main() -> None:
    path = ROOT / "README.md"
    text = path.read_text()
    made = replaced(replaced(text, "demo", demo()), "figures", figures())
    if "--check" in sys.argv and made != text:
        raise SystemExit("README.md: the figures differ from bench/results. Run: python bench/readme.py")
    path.write_text(made)


if __name__ == "__main__":
    main()
