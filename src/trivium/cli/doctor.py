"""`trivium doctor`: options and printing. Findings go to stdout, progress to stderr."""

import json
from pathlib import Path

import click


@click.command()
@click.argument("run_file", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--allow", multiple=True, metavar="ID", help="Ignore errors of this rule; may be repeated.")
def doctor(run_file: Path, overrides: tuple[str, ...], as_json: bool, allow: tuple[str, ...]) -> None:
    """Check RUN_FILE for mistakes without training.

    Checks the tokens, data, adapter, hyperparameters and machine, and runs one forward and backward pass. Builds the
    token stores as training does. Exit codes: 0 no errors, 2 configuration error, 3 not enough memory or disk, 4 bad
    data. docs/doctor.md explains each rule.

    \b
    Example:
      trivium doctor lora.yaml data.seq_len=4096
    """
    from trivium.api import doctor as examine

    diagnosis = examine(run_file, *overrides, allow=allow)
    # Printed even if the run cannot be prepared: a finding may be the reason.
    if as_json:
        click.echo(json.dumps([finding.record() for finding in diagnosis.findings], indent=2))
    else:
        click.echo(diagnosis.page, nl=False)
    diagnosis.require_sound()
    if not diagnosis.findings:
        click.echo("Nothing to fix: all checks passed.", err=True)
