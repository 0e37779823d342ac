"""`trivium train`: train a run file, or resume it."""

from pathlib import Path

import click


@click.command()
@click.argument("run_file", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--allow", multiple=True, metavar="ID", help="Ignore errors of this doctor rule; may be repeated.")
def train(run_file: Path, overrides: tuple[str, ...], allow: tuple[str, ...]) -> None:
    """Train the model that RUN_FILE describes. Run the same command again to resume.

    KEY=VALUE overrides a key of the run file. Before training, the doctor checks the run and refuses one with errors
    (`trivium doctor` checks even more). The result is a Hugging Face model in RUNS_DIR/NAME/model or a PEFT adapter in
    RUNS_DIR/NAME/adapter; its path is printed to stdout. Exit codes: 0 done, 2 configuration error, 3 not enough
    memory or disk, 4 bad data, 75 stopped and saved.

    \b
    Examples:
      trivium train story.yaml
      trivium train story.yaml budget.tokens=3M optimizer.lr=1e-3
    """
    from trivium.api import train as train_run

    click.echo(train_run(run_file, *overrides, allow=allow).result)
