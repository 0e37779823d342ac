"""`trivium compare`: options and printing. The table goes to stdout, the report's path to stderr."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from trivium.cli.progress import waiting

if TYPE_CHECKING:
    from trivium.use.compare import Comparison

FILE = click.Path(path_type=Path)


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="RUN...")
@click.option("--prompts", type=FILE, help="File of prompts, with or without expected answers.")
@click.option("--held-out", type=FILE, help="Measure the loss on this file. Default: the first run's held-out set.")
@click.option("--general", type=FILE, help="Measure forgetting: the increase in loss on this file of general text.")
@click.option(
    "--out",
    type=FILE,
    default=Path("comparison"),
    show_default=True,
    help="Folder for report.html and comparison.json.",
)
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=256, show_default=True, help="Maximum tokens of an answer."
)
@click.option("--thinking/--no-thinking", default=False, help="Turn reasoning on, if the template has the switch.")
@click.option("--json", "as_json", is_flag=True, help="Print the comparison as JSON.")
def compare(
    models: tuple[str, ...],
    prompts: Path | None,
    held_out: Path | None,
    general: Path | None,
    out: Path,
    max_new_tokens: int,
    thinking: bool,
    as_json: bool,
) -> None:
    """Compare runs and their base models: quality, forgetting, cost and answers.

    RUN is a run folder, the folder of a model or an adapter, or a Hub id.

    \b
    Examples:
      trivium compare runs/lora runs/qlora runs/full --prompts questions.jsonl
      trivium compare runs/lora --general encyclopedia.jsonl --json
    """
    from trivium.report.comparison import as_json as to_json
    from trivium.report.comparison import write_comparison
    from trivium.use.compare import compare as compare_models

    with waiting() as wait:
        comparison = compare_models(
            models,
            prompts=prompts,
            held_out=held_out,
            general=general,
            max_new_tokens=max_new_tokens,
            thinking=thinking,
            note=wait.note,
            bar=wait.bar,
        )
    page = write_comparison(comparison, out)
    if as_json:
        click.echo(to_json(comparison), nl=False)
    else:
        print_table(comparison)
    click.echo(f"report: {page}", err=True)


def print_table(comparison: "Comparison") -> None:
    """Print the table to stdout, with the best value of each row in bold."""
    from trivium.report.comparison import table

    rows = table(comparison)
    names = [model.name for model in comparison.models]
    columns = zip(names, *([row.text(value) for value in row.values] for row in rows), strict=True)
    widths = [3 + max(map(len, column)) for column in columns]
    label_width = max(len(row.label) for row in rows)
    click.echo(" " * label_width + "".join(name.rjust(width) for name, width in zip(names, widths, strict=True)))
    for row in rows:
        cells = [
            click.style(row.text(value).rjust(width), bold=(value is not None and value == row.best) or None)
            for value, width in zip(row.values, widths, strict=True)
        ]
        click.echo(row.label.ljust(label_width) + "".join(cells))
