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
    tokenise = json.loads((RESULTS / "tokenise.json").read_text())
    startup = json.loads((RESULTS / "startup.json").read_text())
    lines = [
        f"## Measured\n\nOn {pretrain['cpu_cores']} CPU cores, each pair side by side in one run (`bench/`), medians.\n",
        "| what | against | result |",
        "|---|---|---|",
    ]
    for dtype, result in pretrain["results"].items():
        lines.append(
            f"| training from scratch, {dtype}, vocabulary 151,936 | transformers {pretrain['versions']['transformers']} "
            f"Trainer, its defaults | {result['speed_ratio']:.1f}x its real tokens/s, "
            f"{result['memory_ratio']:.2f}x its peak memory |"
        )
    lines.append(
        f"| tokenising JSONL, Qwen tokenizer, {tokenise['workers']} workers | Megatron-LM's preprocess_data.py | "
        f"{tokenise['speed_ratio']:.1f}x its speed |"
    )
    lines.append(f"| `trivium --help` | | {startup['help_seconds']:.2f} s |")
    lines.append(
        f"| refusing a wrong run file, the slowest of {startup['num_error_cases']} | | {startup['slowest_error_seconds']:.1f} s |"
    )
    return "\n".join(lines) + "\n"


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
