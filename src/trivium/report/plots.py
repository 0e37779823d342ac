"""Curves as inline SVG in the page's CSS colors, for light and dark mode. Uses matplotlib without pyplot."""

import io
import re
from html import escape

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from trivium.engine.record import Curve

# matplotlib needs real colors; the SVG has the page's CSS variables instead.
STAND_INS = {
    "ink": "#000001",
    "muted": "#000002",
    "grid": "#000003",
    "train": "#000004",
    "held-out": "#000005",
    "floor": "#000006",
}
WIDE_INCHES, SMALL_INCHES = (8.6, 3.7), (4.2, 2.1)
LOG_SCALE_FROM_RATIO = 4


def loss_plot(train: Curve, held_out: Curve, floor: float | None, note: str) -> str:
    """Training and held-out loss in nats per token, with the floor as a line and `note` as its label."""
    with rc_context(_style()):
        figure, axes = _axes(WIDE_INCHES)
        drawn = [*train.values, *held_out.values]
        axes.plot(train.steps, train.values, color=STAND_INS["train"], linewidth=1.1, label="training")
        style = {"linewidth": 1.8, "marker": "o" if len(held_out.values) <= 40 else "", "markersize": 4.5}
        axes.plot(held_out.steps, held_out.values, color=STAND_INS["held-out"], label="held-out", **style)
        if floor is not None:
            drawn.append(floor)
            color = STAND_INS["floor"]
            axes.axhline(floor, color=color, linewidth=1.5, linestyle=(0, (5, 3)), label=f"floor {floor:.3f}")
            place = {"xycoords": ("axes fraction", "data"), "xytext": (-2, -5), "textcoords": "offset points"}
            axes.annotate(note, (1, floor), ha="right", va="top", color=color, **place)
        _loss_scale(axes, drawn)
        axes.set_ylabel("loss, nats per token")
        axes.legend(loc="upper right", frameon=False)
        return _svg(figure, "loss", "Loss over the optimizer steps. " + note)


def small_plot(name: str, curve: Curve, label: str) -> str:
    """One metric over the optimizer steps; the axis starts at zero."""
    with rc_context(_style()):
        figure, axes = _axes(SMALL_INCHES)
        marker = "o" if len(curve.values) == 1 else ""
        axes.plot(curve.steps, curve.values, color=STAND_INS["train"], linewidth=1.2, marker=marker)
        axes.set_ylim(0, 1.08 * max(curve.values) or 1)
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(_plain)
        return _svg(figure, name, f"{label} over the optimizer steps.")


def _style() -> dict[str, object]:
    """Text stays text in the page's font, and identifiers are reproducible."""
    colors = {"text.color": STAND_INS["ink"], "axes.labelcolor": STAND_INS["muted"]}
    return {"svg.fonttype": "none", "svg.hashsalt": "trivium", "font.size": 10, "axes.axisbelow": True, **colors}


def _axes(size_inches: tuple[float, float]) -> tuple[Figure, Axes]:
    figure = Figure(figsize=size_inches, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(STAND_INS["grid"])
    axes.tick_params(which="both", length=0, pad=6, colors=STAND_INS["muted"])
    axes.grid(axis="y", color=STAND_INS["grid"], linewidth=0.8)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(_plain)
    return figure, axes


def _loss_scale(axes: Axes, values: list[float]) -> None:
    """A logarithmic axis if the loss fell far, so that the first steps do not flatten the rest."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= LOG_SCALE_FROM_RATIO:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(_plain)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(low / 1.22, high * 1.08)
    else:
        margin = 0.12 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)


def _plain(value: float, _: float) -> str:
    """A number without powers of ten, for example 12,000 or 0.003."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _svg(figure: Figure, name: str, description: str) -> str:
    """The drawing as an `<svg>` element with unique identifiers and the page's colors."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg.replace("xlink:href", "href"))
    for variable, color in STAND_INS.items():
        svg = svg.replace(color, f"var(--{variable})")
    view = re.search(r'viewBox="([^"]*)"', svg)
    assert view is not None, "matplotlib writes a viewBox"
    return f'<svg viewBox="{view[1]}" role="img" aria-label="{escape(description)}">' + svg[svg.index(">") + 1 :]
