"""`trivium train`: run a run file to its end, or go on with it."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from trivium.doctor.findings import Finding


@click.command()
@click.argument("run_file", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--allow", multiple=True, metavar="ID", help="Train in spite of this rule of the doctor; repeatable.")
def train(run_file: Path, overrides: tuple[str, ...], allow: tuple[str, ...]) -> None:
    """Train what RUN_FILE describes; the same command goes on after any stop.

    KEY=VALUE overrides a field, such as optimizer.lr=1e-3. The doctor looks first, and stops a run that
    would fail or silently learn the wrong thing (`trivium doctor` looks closer). The result is a Hugging Face folder
    in RUNS_DIR/NAME/model, or a PEFT folder in RUNS_DIR/NAME/adapter, and its path goes to stdout. Exit codes: 0 done,
    2 configuration, 3 does not fit, 4 data, 75 stopped and saved.

    \b
    Example:
      trivium train story.yaml budget.tokens=3M
    """
    from trivium.config.load import load_run

    resolved = load_run(run_file, overrides)

    from trivium.doctor.examine import allowed_ids, require_sound, require_startable
    from trivium.report.watch import train_with_report

    allowed = allowed_ids(allow)
    _show(require_startable(resolved.run, allowed))
    folder = train_with_report(resolved, examine=lambda job, machine: _show(require_sound(job, machine, allowed)))
    click.echo(folder.result)


def _show(findings: "list[Finding]") -> None:
    for finding in findings:
        click.echo(f"{finding.severity}: {finding.paragraph()}", err=True)
