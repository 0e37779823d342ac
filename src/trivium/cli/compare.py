"""`trivium compare`: options and printing. The table goes to stdout, the report's path to stderr."""

import sys
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
@click.option("--general", type=FILE, help="Measure forgetting: the rise of the loss on this file of general text.")
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
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from trivium.report.comparison import table

    grid = Table(box=None, padding=(0, 3, 0, 0), header_style="bold")
    grid.add_column("", no_wrap=True)
    for model in comparison.models:
        grid.add_column(Text(model.name), justify="right", overflow="fold")
    for row in table(comparison):
        texts = [Text(row.text(v), style="bold" if v is not None and v == row.best else "") for v in row.values]
        grid.add_row(Text(row.label, style="dim"), *texts)
    # Wide enough for every column if stdout is not a terminal.
    Console(width=None if sys.stdout.isatty() else 40 + 24 * len(comparison.models)).print(grid)
