"""Tokenizing speed and memory of `trivium data build` against Megatron-LM's tools/preprocess_data.py.

Both read the same generated JSONL with the same Hugging Face tokenizer and number of workers, alternating; each is
timed as a whole command, and their tokens must be identical. Then Trivium reads a corpus four times as large, to see
whether its memory grows. Writes bench/results/tokenize_corpus.json.

    python bench/tokenize_corpus.py --megatron DIR --tokenizer DIR

DIR is a checkout of https://github.com/NVIDIA/Megatron-LM; what it imports beyond Trivium's dev extra (omegaconf) must
be on PYTHONPATH.
"""

import argparse
import filecmp
import itertools
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import psutil

RESULT = Path(__file__).parent / "results" / "tokenize_corpus.json"
POLL_SECONDS = 0.05
GROWTH = 4
SYLLABLES = [
    "ba", "ce", "di", "fo", "gu", "ha", "je", "ki", "lo", "mu", "na", "pe", "qui", "ro", "su", "ta", "ve",
    "wi", "xo", "ya", "ze", "str", "and", "ing", "est", "ed", "ly", "er", "tion", "ment",
]  # fmt: skip
SCRIPTS = (
    "\u0430\u0431\u0432\u0433\u0434\u0435\u0436\u0437\u0438\u043a\u043b\u043c\u043d\u043e\u043f\u0440\u0441\u0442\u0443\u0444\u0445\u0446\u0447\u0448\u0449\u044b\u044d\u044e\u044f",
    "\u65e5\u672c\u8a9e\u4e2d\u6587\u5b57\u6f22\u56fd\u4eba\u5927\u5b66\u751f\u5e74\u6708\u6642\u5206",
    "\u03b1\u03b2\u03b3\u03b4\u03b5\u03b6\u03b7\u03b8\u03b9\u03ba\u03bb\u03bc\u03bd\u03be\u03bf\u03c0\u03c1\u03c3\u03c4\u03c5\u03c6\u03c7\u03c8\u03c9",
    "\uac00\ub098\ub2e4\ub77c\ub9c8\ubc14\uc0ac\uc544\uc790\ucc28\uce74\ud0c0\ud30c\ud558",
)
CODE = "def {0}({1}, {2}):\n    if {1} > {3}:\n        return {0}({1} - 1, {2} + {3})\n    return {2}  # {1}\n\n"


def write_corpus(path: Path, num_bytes: int, seed: int) -> None:
    """Documents of mixed length: Zipf-distributed words, code, numbers and other scripts, one JSON object a line."""
    generator = random.Random(seed)
    words = ["".join(generator.choices(SYLLABLES, k=generator.randint(1, 4))) for _ in range(30_000)]
    cumulative = list(itertools.accumulate(1 / (rank + 3) for rank in range(len(words))))
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < num_bytes:
            line = json.dumps({"text": make_document(generator, words, cumulative)}, ensure_ascii=False) + "\n"
            file.write(line)
            written += len(line.encode())


def make_document(generator: random.Random, words: list[str], cumulative: list[float]) -> str:
    """One document of a few sentences to a few pages."""
    paragraphs = []
    for _ in range(min(40, 1 + int(generator.paretovariate(1.1)))):
        kind = generator.random()
        chosen = generator.choices(words, cum_weights=cumulative, k=generator.randint(20, 120))
        if kind < 0.75:
            chosen[0] = chosen[0].capitalize()
            paragraphs.append(" ".join(chosen) + f", {generator.randint(0, 99999)}.")
        elif kind < 0.9:
            paragraphs.append(CODE.format(*chosen[:3], generator.randint(0, 999)) * 2)
        else:
            script = generator.choice(SCRIPTS)
            paragraphs.append(" ".join("".join(generator.choices(script, k=len(word))) for word in chosen))
    return "\n\n".join(paragraphs)


class Cost(NamedTuple):
    """What a command took, its child processes included."""

    seconds: float
    """From its start to its end."""
    cpu_seconds: float
    """Of all cores; what other work on the machine changes least."""
    peak_mib: float
    """Resident memory."""


def measure(command: list[str], folder: Path, environment: dict[str, str]) -> Cost:
    """Run a command to its end.

    Raises: CalledProcessError with the end of its output when it fails.
    """
    begin, cpu_begin = time.perf_counter(), cpu_seconds_of_children()
    with (folder / "output.txt").open("w") as output:
        process = psutil.Popen(command, cwd=folder, env=os.environ | environment, stdout=output, stderr=output)
        peak_bytes = 0
        while process.poll() is None:
            peak_bytes = max(peak_bytes, resident_bytes(process))
            time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - begin
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, (folder / "output.txt").read_text()[-3000:])
    return Cost(seconds, cpu_seconds_of_children() - cpu_begin, peak_bytes / 2**20)


def cpu_seconds_of_children() -> float:
    """User and system time of every process below this one that has ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def resident_bytes(process: psutil.Process) -> int:
    """Resident memory of a process and all below it; pages they share count once for each."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            total += one.memory_info().rss
        except psutil.Error:
            continue
    return total


def run_trivium(corpus: Path, folder: Path, tokenizer: Path, workers: int) -> tuple[Cost, Path]:
    """Build a store in an empty cache; give its cost and the file of tokens."""
    folder.mkdir()
    options = ["--tokenizer", str(tokenizer), "--workers", str(workers), "--held-out", "0", "--cache-dir", str(folder)]
    program = "from trivium.cli.main import main; main()"
    cost = measure([sys.executable, "-c", program, "data", "build", str(corpus), *options], folder, {})
    (tokens,) = folder.glob("store-*/tokens.bin")
    return cost, tokens


def run_megatron(corpus: Path, folder: Path, tokenizer: Path, workers: int, checkout: Path) -> tuple[Cost, Path]:
    """The same with Megatron's tool."""
    folder.mkdir()
    options = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer), "--append-eod"]
    options += ["--workers", str(workers), "--input", str(corpus), "--output-prefix", str(folder / "store")]
    search = os.pathsep.join(filter(None, (str(checkout), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, str(checkout / "tools" / "preprocess_data.py"), *options]
    return measure(command, folder, {"PYTHONPATH": search}), folder / "store_text_document.bin"


def compare(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs, and the figures drawn from them."""
    corpus, large = folder / "corpus.jsonl", folder / "large.jsonl"
    write_corpus(corpus, arguments.mib << 20, seed=0)
    write_corpus(large, GROWTH * arguments.mib << 20, seed=1)
    options = (arguments.tokenizer.resolve(), arguments.workers)
    runs = []
    for number in range(arguments.runs):
        ours, our_tokens = run_trivium(corpus, folder / f"trivium{number}", *options)
        checkout = arguments.megatron.resolve()
        theirs, their_tokens = run_megatron(corpus, folder / f"megatron{number}", *options, checkout)
        same = filecmp.cmp(our_tokens, their_tokens, shallow=False)
        runs.append({"trivium": ours._asdict(), "megatron": theirs._asdict(), "same_tokens": same})
        print(runs[-1], file=sys.stderr, flush=True)
    large_cost, _ = run_trivium(large, folder / "trivium-large", *options)
    return {
        "corpus_mib": arguments.mib,
        "workers": arguments.workers,
        "same_tokens": all(run["same_tokens"] for run in runs),
        "speed_ratio": median(runs, "megatron", "seconds") / median(runs, "trivium", "seconds"),
        "cpu_ratio": median(runs, "megatron", "cpu_seconds") / median(runs, "trivium", "cpu_seconds"),
        "memory_ratio": median(runs, "trivium", "peak_mib") / median(runs, "megatron", "peak_mib"),
        "large_corpus_mib": GROWTH * arguments.mib,
        "large_memory_ratio": large_cost.peak_mib / median(runs, "trivium", "peak_mib"),
        "runs": runs,
        "large": large_cost._asdict(),
    }


def median(runs: list[dict[str, Any]], tool: str, figure: str) -> float:
    """Of one figure of one tool over the runs."""
    return statistics.median(run[tool][figure] for run in runs)


def main() -> None:
    """Parse the flags, run, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--megatron", type=Path, required=True, help="checkout of Megatron-LM")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a real tokenizer folder")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--mib", type=int, default=32, help="size of the corpus")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(arguments, Path(folder))
    result = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cores": os.cpu_count(), "architecture": platform.machine(), "load_before": load_before},
        "versions": {"python": platform.python_version(), "megatron_lm": megatron_version(arguments.megatron),
                     **{name: version(name) for name in ("trivium", "tokenizers", "transformers", "numpy")}},
        "tokenizer": arguments.tokenizer.name,
        **figures,
    }  # fmt: skip
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def megatron_version(checkout: Path) -> str:
    """MAJOR.MINOR.PATCH as the checkout says it."""
    facts: dict[str, str] = {}
    for line in (checkout / "megatron" / "core" / "package_info.py").read_text().splitlines():
        name, equals, value = line.partition(" = ")
        if equals and name in ("MAJOR", "MINOR", "PATCH"):
            facts[name] = value.strip()
    return ".".join(facts[name] for name in ("MAJOR", "MINOR", "PATCH"))


if __name__ == "__main__":
    main()
