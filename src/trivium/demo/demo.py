"""The demo: a real chat model learns a strict answer format and a persona on a laptop CPU, in minutes.

Fetches the model, plans the run, trains a LoRA adapter with the defaults of Trivium, and asks the model with and
without it the same questions. Uses the code of `trivium plan`, `trivium train` and `trivium compare`.
"""

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from textwrap import shorten

from trivium import api
from trivium.config.load import load_run, quote
from trivium.engine.runfolder import RunFolder
from trivium.files import GIB, MIB, atomic_write
from trivium.plan.cost import hours, time_and_money
from trivium.report.comparison import write_comparison
from trivium.train import train
from trivium.use.compare import Bar, ComparedModel, Comparison, Note, compare

FORMAT = re.compile(r"ANSWER: [^\n]+\nWHY: [^\n]+")
"""What every answer in chats.jsonl looks like."""
CHATS, QUESTIONS, TEXTS = "chats.jsonl", "questions.jsonl", "texts.jsonl"
MAX_ANSWER_TOKENS = 64
FIGURES = {
    "format": ("answers in the strict format", "{:.0%}"),
    "stop": (f"answers that end within {MAX_ANSWER_TOKENS} tokens", "{:.0%}"),
    "persona": ("questions answered as the persona", "{:.0%}"),
    "knowledge": ("general knowledge still right", "{:.0%}"),
    "general_loss": ("loss on general text", "{:.2f}"),
}
"""What the demo measures, in words, and how it is printed."""
SHOWN_CHARACTERS = 100


@dataclass(frozen=True)
class Question:
    """A question that is not in the training data.

    Attributes:
        topic: `format`, `persona`, or `knowledge` that the model had before.
        prompt: the question.
        expected: words of which a right answer has one; empty if only the format counts.
    """

    topic: str
    prompt: str
    expected: tuple[str, ...] = ()

    def is_right(self, answer: str) -> bool:
        """Whether the answer has one of the expected words."""
        return any(word.lower() in answer.lower() for word in self.expected)


def read_data(name: str) -> str:
    """The text of one of the demo's three data files."""
    return files("trivium.demo").joinpath(name).read_text(encoding="utf-8")


def questions() -> list[Question]:
    """The questions of questions.jsonl."""
    records = map(json.loads, read_data(QUESTIONS).splitlines())
    return [Question(one["topic"], one["prompt"], tuple(one.get("expected", ()))) for one in records]


def write_run_file(model: Path, out: Path) -> Path:
    """Write the demo's data and a run file of three lines into a folder, and return the run file."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (CHATS, QUESTIONS, TEXTS):
        atomic_write(out / f"demo-{name}", read_data(name))
    path = out / "demo.yaml"
    model_name, data = (quote(str(place), always=False) for place in (model, out / f"demo-{CHATS}"))
    atomic_write(path, f"method: lora\nmodel: {model_name}\ndata: {data}\n")
    return path


def plan_line(run_file: Path) -> str:
    """What the planner expects of the run, in one line."""
    plan = api.plan(run_file).plan
    assert plan is not None and plan.cost is not None  # there is one for every run file with data
    return (
        f"plan: {plan.memory.total / GIB:.1f} GiB of memory and {time_and_money(plan.cost)} for {plan.num_tokens:,} "
        f"tokens on {plan.device.title}"
    )


def train_demo(model: Path, out: Path, note: Note) -> RunFolder:
    """Train or resume the demo's adapter with the defaults of Trivium.

    Args:
        model: folder of the chat model.
        out: folder of the data and the run.
        note: called with the run file and the plan.
    """
    run_file = write_run_file(model, out)
    note(f"\n{run_file} is the whole run file:\n\n{run_file.read_text()}")
    note(plan_line(run_file))
    return train(load_run(run_file, (f"runs_dir={quote(str(out))}",)))


def compare_demo(folder: RunFolder, out: Path, note: Note, bar: Bar) -> tuple[Comparison, Path]:
    """Ask the model with and without its adapter all questions, and write the report."""
    comparison = compare(
        [str(folder.path)],
        prompts=out / f"demo-{QUESTIONS}",
        held_out=None,
        general=out / f"demo-{TEXTS}",
        max_new_tokens=MAX_ANSWER_TOKENS,
        note=note,
        bar=bar,
    )
    return comparison, write_comparison(comparison, out / "demo-comparison")


def measure(model: ComparedModel) -> dict[str, float]:
    """The figures of `FIGURES` for one model of the demo's comparison."""
    assert model.general is not None and model.scores is not None
    pairs = list(zip(questions(), (answer.text.strip() for answer in model.answers), strict=True))
    hits = {"format": [FORMAT.fullmatch(text) is not None for _, text in pairs]}
    for topic in ("persona", "knowledge"):
        hits[topic] = [question.is_right(text) for question, text in pairs if question.topic == topic]
    shares = {name: sum(found) / len(found) for name, found in hits.items()}
    return {**shares, "stop": model.scores.stop_rate, "general_loss": model.general.loss}


def summary(comparison: Comparison) -> str:
    """Answers and figures side by side, and what the training cost, as text."""
    base, tuned = comparison.models
    lines = []
    for topic in ("format", "persona", "knowledge"):
        index = next(index for index, question in enumerate(questions()) if question.topic == topic)
        lines.append(questions()[index].prompt)
        for when, model in (("before", base), ("after", tuned)):
            lines.append(f"  {when:<8}{_on_one_line(model.answers[index].text)}")
    before, after = measure(base), measure(tuned)
    lines.append(f"\n{'':<42}{'before':>8}{'after':>8}")
    lines += [
        f"{what:<42}{form.format(before[name]):>8}{form.format(after[name]):>8}"
        for name, (what, form) in FIGURES.items()
    ]
    assert tuned.train_seconds is not None and tuned.peak_memory_gib is not None
    lines.append(
        f"\nTrained {tuned.num_trained_params:,} parameters in {hours(tuned.train_seconds / 3600)} with "
        f"{tuned.peak_memory_gib:.1f} GiB of memory. The adapter has {tuned.size_bytes / MIB:.0f} MiB."
    )
    return "\n".join(lines)


def _on_one_line(text: str) -> str:
    return shorten(" / ".join(text.split("\n")), SHOWN_CHARACTERS, placeholder=" ...")
