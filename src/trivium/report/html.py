"""`report.html`: a self-contained page about one run, without scripts. Content of the run folder is escaped."""

from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

from trivium.engine.metrics import MFU_FORMULA
from trivium.engine.record import Record, read_record
from trivium.files import GIB, atomic_write
from trivium.plan.check import Figure
from trivium.plan.cost import hours
from trivium.report import plots
from trivium.report.style import facts, page

STATUS_MEANS = {
    "finished": "The run is finished.",
    "failed": "The run failed.",
    "running": "The run is in progress; this page shows its state when the page was written.",
    "stopped": "The run is not finished, and no process is running it. Run the same command again to resume.",
}
SMALL_PLOTS = {
    "train/learning_rate": "learning rate",
    "train/grad_norm": "gradient norm before clipping",
    "train/tokens_per_second": "training tokens/s",
    "train/peak_memory_gib": "peak memory, GiB",
}
ABSENT = '<span class="absent">not recorded</span>'


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder, finished or not, and return its path.

    Raises: TriviumError when `run_folder` is not a run folder.
    """
    record = read_record(run_folder)
    path = run_folder / "report.html"
    atomic_write(path, render(record))
    return path


def render(record: Record) -> str:
    """The whole page."""
    sections = (_header, _failure, _summary, _plan, _curves, _samples, _origin)
    return page(record.name, (section(record) for section in sections))


def floor_note(record: Record) -> str:
    """The distance of the last held-out loss from the floor; empty without a floor."""
    if record.floor is None:
        return ""
    if record.above_floor is None:
        return f"floor {record.floor['nats_per_token']:.3f}; no held-out loss yet"
    side = "above" if record.above_floor >= 0 else "below"
    return f"held-out loss is {abs(record.above_floor):.1%} {side} the floor"


def _header(record: Record) -> str:
    return (
        f'<header>\n<h1>{escape(record.name)} <span class="status {record.status}">{record.status}</span></h1>\n'
        f"<p>{STATUS_MEANS[record.status]}</p>\n</header>"
    )


def _failure(record: Record) -> str:
    if record.failure is None:
        return ""
    kind, message = str(record.failure.get("kind", "failure")), str(record.failure.get("message", "no message"))
    where = f" at step {record.failure['step']:,}" if isinstance(record.failure.get("step"), int) else ""
    return (
        f'<section class="failure" role="alert">\n<h2>{escape(kind)}{where}</h2>\n<p>{escape(message)}</p>\n</section>'
    )


def _summary(record: Record) -> str:
    rows = facts((label, value or ABSENT) for label, value in _facts(record))
    note = f'<p class="note">MFU = {escape(MFU_FORMULA)}</p>\n' if record.curve("train/mfu").values else ""
    return f"<section>\n<h2>Summary</h2>\n{rows}{note}</section>"


def _facts(record: Record) -> Iterator[tuple[str, str]]:
    """The summary's labels and values as HTML; an empty value was not recorded."""
    model, hardware = (_mapping(record.provenance.get(name)) for name in ("model", "hardware"))
    yield "Method", escape(str(record.config.get("method", "")))
    yield "Model", escape(_model_name(record.config.get("model"), model))
    yield "Parameters", _number(model.get("num_params"), "{:,.0f}")
    if model.get("num_trained_params") not in (None, model.get("num_params")):
        yield "Parameters trained", _number(model.get("num_trained_params"), "{:,.0f}")
    planned = record.provenance.get("num_steps")
    yield "Steps", f"{record.step:,} of {planned:,}" if isinstance(planned, int) else f"{record.step:,}"
    yield "Training tokens", _number(record.curve("train/num_tokens").last, "{:,.0f}")
    yield "Training loss", _number(record.curve("train/loss").last, "{:.4f} <small>nats per token</small>")
    yield "Held-out loss", _number(record.curve("eval/loss").last, "{:.4f} <small>nats per token</small>")
    if record.floor is not None:
        what = escape(str(record.floor.get("what", "the lowest possible loss")))
        yield "Floor", f"{_number(record.floor['nats_per_token'], '{:.4f}')} <small>{what}</small>"
        yield "Distance from floor", escape(floor_note(record).removeprefix("held-out loss is "))
    seconds = record.curve("train/seconds").last
    yield "Training time", "" if seconds is None else hours(seconds / 3600)
    speed = record.curve("train/tokens_per_second").typical
    yield "Speed", _number(speed, "{:,.0f} tokens/s <small>median</small>")
    yield "MFU", _number(record.curve("train/mfu").typical, "{:.1%} <small>median</small>")
    yield "Peak memory", _number(record.curve("train/peak_memory_gib").highest, "{:.2f} <small>GiB</small>")
    yield "Device", escape(", ".join(str(hardware[key]) for key in ("device", "compute_dtype") if key in hardware))
    yield "Checkpoints", escape(", ".join(record.checkpoints)) or "none"


def _model_name(asked: object, shape: dict[str, Any]) -> str:
    """The model's name in the run file, then its shape."""
    named = asked if isinstance(asked, str) else str(_mapping(asked).get("name") or "")
    if not {"family", "num_hidden_layers", "hidden_size", "vocab_size"} <= shape.keys():
        return named
    size = "{family}, {num_hidden_layers} layers of width {hidden_size}, vocabulary {vocab_size}".format_map(shape)
    return f"{named}: {size}" if named else size


def _number(value: object, pattern: str) -> str:
    return pattern.format(value) if isinstance(value, int | float) else ""


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _plan(record: Record) -> str:
    """The planner's predictions at the first start, and the measurements."""
    plan = record.plan
    if plan.status == "no plan":
        return ""
    rows = {
        "Peak memory": _prediction(plan.peak_bytes, lambda size: f"{size / GIB:,.2f} GiB"),
        "Speed": _prediction(plan.tokens_per_second, lambda rate: f"{rate:,.0f} tokens/s"),
        "Training time": _prediction(plan.hours, hours),
    }
    items = sorted((plan.memory_items or {}).items(), key=lambda item: -item[1])
    table = ", ".join(f"{name} {size / GIB:,.2f}" for name, size in items if size >= GIB / 100)
    rates = "speeds measured on this machine" if plan.is_calibrated else "speeds from a data sheet"
    return (
        f"<section>\n<h2>Plan</h2>\n{facts(rows.items())}"
        f'<p class="note">Predicted when the run first started, for {escape(plan.device)}, with {rates}. Parentheses '
        "show the bounds of a prediction. Memory is "
        f"{escape(plan.measured_how)}. The predicted peak is {escape(plan.instant)}; its parts in GiB: "
        f"{escape(table)}.</p>\n</section>"
    )


def _prediction(figure: Figure | None, show: Callable[[float], str]) -> str:
    """A prediction with its bounds, and the measured value with how far the prediction is from it."""
    if figure is None:
        return ABSENT
    predicted = f"{show(figure.predicted)} <small>predicted ({_range(show(figure.low), show(figure.high))})</small>"
    if figure.measured is None or figure.error is None:
        return predicted
    off = f"predicted {abs(figure.error):.1%} too {'high' if figure.error > 0 else 'low'}"
    return f"{predicted}<br>{show(figure.measured)} <small>measured; {off}</small>"


def _range(low: str, high: str) -> str:
    """Two figures, with their unit once if it is the same."""
    (number, _, unit), (_, _, other) = low.partition(" "), high.partition(" ")
    return f"{number if unit == other else low} to {high}"


def _curves(record: Record) -> str:
    train, held_out = record.curve("train/loss"), record.curve("eval/loss")
    if not train.values and not held_out.values:
        return '<section>\n<h2>Curves</h2>\n<p class="absent">No metrics were recorded.</p>\n</section>'
    floor = record.floor["nats_per_token"] if record.floor is not None else None
    small = []
    for metric, label in SMALL_PLOTS.items():
        curve = record.curve(metric)
        name = metric.partition("/")[2]
        drawn = plots.small_plot(name, curve, label) if curve.values else f'<p class="absent">{ABSENT}</p>'
        small.append(f"<figure>\n<figcaption>{label}</figcaption>\n{drawn}\n</figure>")
    return (
        '<section>\n<h2>Curves</h2>\n<figure class="wide">\n<figcaption>loss</figcaption>\n'
        + plots.loss_plot(train, held_out, floor, floor_note(record))
        + '\n</figure>\n<div class="grid">\n'
        + "\n".join(small)
        + "\n</div>\n</section>"
    )


def _samples(record: Record) -> str:
    """Each prompt, and below it its completions side by side, oldest first."""
    by_prompt: dict[str, list[str]] = {}
    for line in record.samples:
        text = escape(str(line.get("text", "")))
        by_prompt.setdefault(str(line.get("prompt", "")), []).append(
            f"<figure>\n<figcaption>step {line['step']:,}</figcaption>\n<blockquote>{text}</blockquote>\n</figure>"
        )
    if not by_prompt:
        return '<section>\n<h2>Samples</h2>\n<p class="absent">No samples were recorded.</p>\n</section>'
    strips = "\n".join(
        f'<p class="prompt"><small>prompt</small> {escape(prompt)}</p>\n'
        f'<div class="strip" tabindex="0">\n{"".join(cards)}\n</div>'
        for prompt, cards in by_prompt.items()
    )
    return f"<section>\n<h2>Samples during training</h2>\n{strips}\n</section>"


def _origin(record: Record) -> str:
    parts = [
        f"<details>\n<summary>{name}</summary>\n<pre>{escape(text)}</pre>\n</details>"
        for name, text in (("run.yaml", record.run_yaml), ("provenance.json", record.provenance_json))
        if text
    ]
    if record.missing:
        parts.append(f'<p class="note">Missing from the folder: {escape(", ".join(record.missing))}.</p>')
    return "<section>\n<h2>Configuration and provenance</h2>\n" + "\n".join(parts) + "\n</section>"
