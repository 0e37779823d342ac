"""`trivium report`: write a run's report.html and print its path to stdout."""

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
def report(run: Path) -> None:
    """Write report.html into RUN, the folder of a finished or unfinished run, and print its path."""
    from trivium.report.html import write_report

    click.echo(write_report(run))
