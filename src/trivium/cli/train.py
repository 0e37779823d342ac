"""`trivium train`: train a run file to its end, or resume it."""

from pathlib import Path

import click


@click.command()
@click.argument("run_file", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--allow", multiple=True, metavar="ID", help="Ignore an error of this doctor rule; repeatable.")
def train(run_file: Path, overrides: tuple[str, ...], allow: tuple[str, ...]) -> None:
    """Train what RUN_FILE describes; run the same command again to resume after any stop.

    KEY=VALUE overrides a field, for example optimizer.lr=1e-3. The doctor checks the run first and stops one that
    would fail or silently learn the wrong thing (`trivium doctor` checks more). The result is a Hugging Face folder
    in RUNS_DIR/NAME/model, or a PEFT folder in RUNS_DIR/NAME/adapter; its path goes to stdout. Exit codes: 0 done,
    2 configuration, 3 does not fit, 4 data, 75 stopped and saved.

    \b
    Example:
      trivium train story.yaml budget.tokens=3M
    """
    from trivium.config.load import load_run

    resolved = load_run(run_file, overrides)

    from trivium.doctor.examine import allowed_ids
    from trivium.train import train as train_run

    click.echo(train_run(resolved, allowed_ids(allow)).result)
