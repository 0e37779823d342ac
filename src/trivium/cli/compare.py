"""`trivium compare`: options and printing. The table goes to stdout, the report's path to stderr."""

from pathlib import Path

import click

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
    from trivium.api import compare as compare_models

    found = compare_models(
        *models,
        prompts=prompts,
        held_out=held_out,
        general=general,
        out=out,
        max_new_tokens=max_new_tokens,
        thinking=thinking,
    )
    from trivium.report.comparison import as_json as to_json
    from trivium.report.comparison import as_text, stdout_columns

    comparison = found.comparison
    click.echo(to_json(comparison) if as_json else as_text(comparison, stdout_columns()), nl=False)
    click.echo(f"report: {out / 'report.html'}", err=True)
