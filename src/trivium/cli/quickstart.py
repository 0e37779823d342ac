"""`trivium quickstart`: options and printing."""

from pathlib import Path

import click

FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("text_file", required=False, type=FOLDER)
@click.option("--runs-dir", default="runs", show_default=True, type=FOLDER, help="Folder for the data and the runs.")
@click.option("-s", "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the first run.")
def quickstart(text_file: Path | None, runs_dir: Path, overrides: tuple[str, ...]) -> None:
    """Train small models with every method and compare them, offline, in minutes on two CPU cores.

    The first model is trained from scratch on generated stories, whose exact entropy is the lowest possible loss.
    It is then fine-tuned to answer questions about stories: with LoRA, QLoRA and full fine-tuning. With TEXT_FILE,
    only a model of your own text is trained. Run the same command again to resume.

    \b
    Examples:
      trivium quickstart
      trivium quickstart shakespeare.txt -s budget.tokens=500K
    """
    from trivium.quickstart.quickstart import compare_all, summary, train_all, train_on_text
    from trivium.report.comparison import as_text, stdout_columns
    from trivium.report.progress import waiting

    if text_file is not None:
        click.echo(summary(train_on_text(text_file, runs_dir, overrides)))
        return
    folders = train_all(runs_dir, overrides, note=lambda text: click.echo(text, err=True))
    with waiting() as wait:
        comparison, page = compare_all(folders, runs_dir, wait.note, wait.bar)
    click.echo(summary(folders[0]))
    click.echo("\nFine-tuned with every method to answer questions about unseen stories:\n")
    click.echo(as_text(comparison, stdout_columns()), nl=False)
    click.echo(f"\nComparison: {page}\nNext: trivium chat {folders[1].path}")
