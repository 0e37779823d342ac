"""A comparison as a table and as `report.html`, which also shows the answers side by side.

The page is self-contained and has no scripts. Model output is escaped.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Literal

import click

from trivium.errors import count_of, printable
from trivium.files import atomic_write
from trivium.plan.cost import hours
from trivium.report.style import facts, page
from trivium.use.answers import EvalPrompt, ModelAnswer, matches
from trivium.use.compare import ComparedModel, Comparison

SHOWN_QUESTIONS = 20
TABLE_CSS = """
table { width: 100%; table-layout: fixed; border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { width: 12rem; font-weight: 400; text-align: left; }
thead th[scope] {
  width: auto; padding: 0 0 0.3rem 1.5rem; text-align: right; vertical-align: bottom; font-weight: 600;
  overflow-wrap: anywhere;
}
thead th small { display: block; font-weight: 400; }
tbody th { color: var(--muted); white-space: nowrap; }
tbody th, td { padding: 0.42rem 0; border-bottom: 1px solid var(--grid); vertical-align: top; }
td { padding-left: 1.5rem; text-align: right; white-space: nowrap; }
tr.group th { padding-top: 1.5rem; color: var(--ink); font-weight: 600; }
td.best { color: var(--held-out); font-weight: 600; }
.bar { display: block; height: 4px; margin: 0.25rem 0 0.15rem auto; border-radius: 2px; background: var(--train); }
td.best .bar { background: var(--held-out); }
.prompt { margin: 2rem 0 0.6rem; white-space: pre-wrap; font-weight: 600; }
.prompt small { display: block; font-weight: 400; }
.strip { grid-auto-columns: minmax(10.5rem, 1fr); }
.strip figcaption { display: flex; justify-content: space-between; gap: 1rem; }
.strip .expected { border-style: dashed; background: none; }
.right { color: var(--good); }
.strip figcaption b { font-weight: 600; color: var(--ink); overflow-wrap: anywhere; }
mark {
  padding: 0 0.1em; color: inherit; border-bottom: 2px solid var(--floor);
  background: color-mix(in srgb, var(--floor) 22%, transparent);
}
"""


@dataclass(frozen=True)
class TableRow:
    """One row of the table: a metric of every model.

    Attributes:
        group: `Quality`, `Forgetting` or `Cost`.
        values: one per model, None if unknown.
        form: a format for str.format, or `bytes` or `seconds`.
        better: whether low or high values are better; None for costs.
    """

    group: str
    label: str
    values: list[float | None]
    form: str
    better: Literal["low", "high"] | None = None

    @property
    def best(self) -> float | None:
        """The best value; None if all are equal."""
        known = [value for value in self.values if value is not None]
        if self.better is None or len(set(known)) < 2:
            return None
        return min(known) if self.better == "low" else max(known)

    def text(self, value: float | None) -> str:
        """A value as text."""
        if value is None:
            return "-"
        if self.form == "bytes":
            unit, size = next(((u, s) for u, s in (("GiB", 2**30), ("MiB", 2**20)) if value >= s), ("KiB", 2**10))
            return f"{value / size:,.1f} {unit}"
        if self.form == "seconds":
            return hours(value / 3600)
        return self.form.format(value)


def table(comparison: Comparison) -> list[TableRow]:
    """The rows of the table; rows without any value are left out."""
    models = comparison.models

    def of(part: str, figure: str) -> list[float | None]:
        return [getattr(getattr(model, part), figure, None) for model in models]

    rows = [
        TableRow("Quality", "held-out loss", of("held_out", "loss"), "{:.4f}", "low"),
        TableRow("Quality", "exact match", of("scores", "exact_match"), "{:.1%}", "high"),
        TableRow("Quality", "valid JSON", of("scores", "json_valid"), "{:.1%}", "high"),
        TableRow("Quality", "stop rate", of("scores", "stop_rate"), "{:.1%}", "high"),
        TableRow("Forgetting", "general loss", of("general", "loss"), "{:.4f}"),
        TableRow("Forgetting", "increase in general loss", [comparison.forgotten(m) for m in models], "{:+.4f}", "low"),
        TableRow("Cost", "parameters trained", [m.num_trained_params for m in models], "{:,.0f}"),
        TableRow("Cost", "training time", [m.train_seconds for m in models], "seconds"),
        TableRow("Cost", "tokens/s", [m.tokens_per_second for m in models], "{:,.0f}"),
        TableRow("Cost", "peak memory, GiB", [m.peak_memory_gib for m in models], "{:.2f}"),
        TableRow("Cost", "size on disk", [m.size_bytes for m in models], "bytes"),
    ]
    if not comparison.same_tokenizer:
        bits = of("held_out", "bits_per_byte")
        rows.insert(1, TableRow("Quality", "held-out bits per byte", bits, "{:.4f}", "low"))
    return [row for row in rows if any(value is not None for value in row.values)]


def as_text(comparison: Comparison, columns: int = sys.maxsize) -> str:
    """The table as lines of at most `columns` characters, in several parts if they are too few for all models.

    The best value of each row is bold.
    """
    rows = table(comparison)
    names = [printable(model.name) for model in comparison.models]
    by_model = zip(names, *([row.text(value) for value in row.values] for row in rows), strict=True)
    widths = [3 + max(map(len, column)) for column in by_model]
    label_width = max(len(row.label) for row in rows)
    parts = []
    for part in _parts(widths, columns - label_width):
        heading = "".join(name.rjust(width) for name, width in zip(names[part], widths[part], strict=True))
        lines = [" " * label_width + heading]
        for row in rows:
            cells = [
                click.style(row.text(value).rjust(width), bold=(value is not None and value == row.best) or None)
                for value, width in zip(row.values[part], widths[part], strict=True)
            ]
            lines.append(row.label.ljust(label_width) + "".join(cells))
        parts.append("".join(f"{line}\n" for line in lines))
    return "\n".join(parts)


def _parts(widths: list[int], room: int) -> list[slice]:
    """Consecutive columns that fit next to each other into `room` characters, at least one in each part."""
    parts, start = [], 0
    for stop in range(1, len(widths) + 1):
        if stop == len(widths) or sum(widths[start : stop + 1]) > room:
            parts.append(slice(start, stop))
            start = stop
    return parts


def stdout_columns() -> int:
    """Characters in a line of stdout; no limit if it is not a terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else sys.maxsize


def write_comparison(comparison: Comparison, folder: Path) -> Path:
    """Write comparison.json and report.html into a folder, and return the path of report.html."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / "comparison.json", as_json(comparison))
    atomic_write(folder / "report.html", render(comparison))
    return folder / "report.html"


def as_json(comparison: Comparison) -> str:
    """The comparison as JSON."""
    content = asdict(comparison)
    for model, entry in zip(comparison.models, content["models"], strict=True):
        entry["forgotten"] = comparison.forgotten(model)
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def render(comparison: Comparison) -> str:
    """The whole page."""
    sections = (_header(comparison), _summary(comparison), _figures(comparison), _answers(comparison))
    return page(_title(comparison), sections, TABLE_CSS)


def _title(comparison: Comparison) -> str:
    """The names of the runs."""
    bases = {model.base for model in comparison.models}
    names = [model.name for model in comparison.models if model.name not in bases]
    return ", ".join(names) + (" and base model" if bases - {None} else "")


def _header(comparison: Comparison) -> str:
    return (
        f"<header>\n<h1>{escape(_title(comparison))}</h1>\n<p>All models were evaluated on the same prompts (with "
        "greedy decoding) and the same held-out data. Costs were recorded during training.</p>\n</header>"
    )


def _summary(comparison: Comparison) -> str:
    notes = "\n".join(f'<p class="note">{escape(note)}</p>' for note in comparison.notes)
    return f"<section>\n<h2>Summary</h2>\n{facts(_facts(comparison))}{notes}</section>"


def _facts(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """The summary's labels and values, as HTML."""
    for row in table(comparison):
        if row.best is not None:
            winners = [m.name for m, value in zip(comparison.models, row.values, strict=True) if value == row.best]
            word = "Lowest" if row.better == "low" else "Highest"
            names = escape(", ".join(winners))
            yield f"{word} {row.label}", f"{row.text(row.best)} <small>{names}</small>"
    if comparison.held_out:
        yield "Held-out loss on", escape(comparison.held_out)
    if comparison.general:
        yield "General loss on", escape(comparison.general)
    if comparison.questions:
        yield "Prompts", f"{len(comparison.questions):,}"


def _figures(comparison: Comparison) -> str:
    """The table, with one column per model."""
    columns = "".join(f'<th scope="col">{_heading(model, comparison)}</th>' for model in comparison.models)
    body = []
    for group, rows in groupby(table(comparison), key=lambda row: row.group):
        body.append(f'<tr class="group"><th colspan="{len(comparison.models) + 1}">{group}</th></tr>')
        body += [f'<tr><th scope="row">{row.label}</th>{"".join(_cells(row))}</tr>' for row in rows]
    return (
        '<section>\n<h2>Metrics</h2>\n<div class="wide">\n'
        f'<table style="min-width:{12 + 8 * len(comparison.models)}rem">\n<thead>\n'
        f"<tr><th></th>{columns}</tr>\n</thead>\n<tbody>\n"
        + "\n".join(body)
        + '\n</tbody>\n</table>\n</div>\n<p class="note">Losses are nats per token. The best value of a row is '
        "colored, except for costs. A dash means not measured.</p>\n</section>"
    )


def _heading(model: ComparedModel, comparison: Comparison) -> str:
    """A model's name, its method, and whether it is the base model of another."""
    is_base = any(other.base == model.name for other in comparison.models)
    kind = ", ".join(word for word in (model.method or "", "base model" if is_base else "") if word)
    return f"{escape(model.name)}<small>{escape(kind) or '&nbsp;'}</small>"


def _cells(row: TableRow) -> Iterator[str]:
    """The values, with bars relative to the largest; differences have no bars."""
    largest = max(abs(value) for value in row.values if value is not None) or 1
    for value in row.values:
        best = ' class="best"' if value is not None and value == row.best else ""
        width = 0 if value is None or "+" in row.form else 100 * value / largest
        bar = f'<i class="bar" style="width:{width:.1f}%"></i>' if width else ""
        yield f"<td{best}>{row.text(value)}{bar}</td>"


def _answers(comparison: Comparison) -> str:
    """For each prompt, the expected answer and every model's, side by side."""
    if not comparison.questions:
        return ""
    parts = []
    for index, question in enumerate(comparison.questions[:SHOWN_QUESTIONS]):
        given = [(model, model.answers[index]) for model in comparison.models]
        reference = question.answer if question.answer is not None else given[0][1].text
        cards = [_card(model.name, question, answer, reference) for model, answer in given]
        if question.answer is not None:
            expected = f"<figcaption>expected</figcaption>\n<blockquote>{escape(question.answer)}</blockquote>"
            cards.insert(0, f'<figure class="expected">\n{expected}\n</figure>\n')
        parts.append(f'{_prompt(question)}\n<div class="strip" tabindex="0">\n{"".join(cards)}</div>')
    more = len(comparison.questions) - SHOWN_QUESTIONS
    if more > 0:
        parts.append(f'<p class="note">comparison.json has {count_of(more, "more prompt")} with answers.</p>')
    against = "the expected answer" if comparison.questions[0].answer is not None else "the first model's answer"
    return (
        f'<section>\n<h2>Answers</h2>\n<p class="note">The first word that differs from {against} is marked.</p>\n'
        + "\n".join(parts)
        + "\n</section>"
    )


def _prompt(question: EvalPrompt) -> str:
    """The messages, with roles if there are several."""
    html = ""
    for turn in question.turns:
        role = f"<small>{escape(str(turn.get('role')))}</small>" if len(question.turns) > 1 else ""
        html += role + escape(str(turn.get("content") or ""))
    return f'<p class="prompt">{html}</p>'


def _card(name: str, question: EvalPrompt, answer: ModelAnswer, reference: str) -> str:
    state = "" if answer.stopped else "<span>cut off</span>"
    if matches(question, answer):
        state = '<span class="right">exact</span>'
    text = _marked(answer.text.strip(), reference.strip()) or '<span class="absent">nothing</span>'
    return (
        f"<figure>\n<figcaption><b>{escape(name)}</b>{state}</figcaption>\n<blockquote>{text}</blockquote>\n</figure>\n"
    )


def _marked(text: str, reference: str) -> str:
    """A text as HTML, with the first word marked that differs from the reference; the end if the text is too short."""
    if text == reference:
        return escape(text)
    words, others = re.findall(r"\s+|\S+", text), re.findall(r"\s+|\S+", reference)
    same = 0
    while same < min(len(words), len(others)) and words[same] == others[same]:
        same += 1
    if same < len(words) and words[same].isspace() and same + 1 < len(words):
        same += 1
    before, marked, after = "".join(words[:same]), "".join(words[same : same + 1]), "".join(words[same + 1 :])
    return f"{escape(before)}<mark>{escape(marked) or '&hellip;'}</mark>{escape(after)}"
