"""`trivium train`: run a run file to its end, or go on with it."""

from pathlib import Path

import click


@click.command()
@click.argument("run_file", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
def train(run_file: Path, overrides: tuple[str, ...]) -> None:
    """Train what RUN_FILE describes; the same command goes on after any stop.

    KEY=VALUE overrides a field, such as optimizer.learning_rate=1e-3. The result is a Hugging Face folder in
    RUNS_DIR/NAME/model, or a PEFT folder in RUNS_DIR/NAME/adapter, and its path goes to stdout. Exit codes: 0 done,
    2 configuration, 4 data, 75 stopped and saved.

    \b
    Example:
      trivium train story.yaml budget.tokens=3M
    """
    from trivium.runfile import load_run

    resolved = load_run(run_file, overrides)

    from trivium.report.watch import train_with_report

    folder = train_with_report(resolved)
    click.echo(folder.result)
