"""`trivium quickstart`: the first model, minutes after the clone."""

from pathlib import Path

import click


@click.command()
@click.argument("text_file", required=False, type=click.Path(path_type=Path))
@click.option(
    "--runs-dir", default="runs", show_default=True, type=click.Path(path_type=Path), help="Where it is made."
)
@click.option("-s", "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a field of the run file.")
def quickstart(text_file: Path | None, runs_dir: Path, overrides: tuple[str, ...]) -> None:
    """Train a small model from nothing, offline, in a few minutes on two CPU cores.

    It learns little generated stories, whose exact entropy shows how far the model is from the best possible; give
    TEXT_FILE to train on your own text instead. The same command goes on after a stop.

    \b
    Examples:
      trivium quickstart
      trivium quickstart shakespeare.txt -s budget.tokens=500K
    """
    from trivium.quickstart.quickstart import quickstart as run
    from trivium.quickstart.quickstart import summary

    click.echo(summary(run(text_file, runs_dir, overrides)))
