"""`trivium doctor`: options and printing. Findings go to stdout, progress to stderr."""

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from trivium.doctor.findings import Finding

COLORS = {"error": "red", "warning": "yellow", "info": "cyan"}
COLUMNS = 100


@click.command()
@click.argument("run_file", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--allow", multiple=True, metavar="ID", help="Ignore errors of this rule; may be repeated.")
def doctor(run_file: Path, overrides: tuple[str, ...], as_json: bool, allow: tuple[str, ...]) -> None:
    """Check RUN_FILE without training: tokens, data, adapter, numbers, machine, one forward and backward pass.

    Builds the token stores, as training does. Exit code 0 if nothing stops the run, otherwise the one that `trivium
    train` would return: 2 configuration, 3 does not fit, 4 bad data. docs/doctor.md explains each rule.

    Example: trivium doctor lora.yaml data.seq_len=4096
    """
    from trivium.config.load import load_run

    resolved = load_run(run_file, overrides)

    from trivium.doctor.examine import allowed_ids, examine
    from trivium.doctor.findings import refusal, stopping

    allowed = allowed_ids(allow)
    findings: list[Finding] = []
    try:
        for finding in examine(resolved.run, allowed, lambda text: click.echo(text, err=True)):
            findings.append(finding)
    finally:
        # Printed even when the run could not be prepared: a finding may be the reason.
        if as_json:
            click.echo(json.dumps([finding.record() for finding in findings], indent=2))
        else:
            click.echo(_page(findings, allowed), nl=False)
    if errors := stopping(findings, allowed):
        raise refusal(errors, with_paragraphs=False)
    if not findings:
        click.echo("Nothing to fix: every check passed.", err=True)


def _page(findings: "list[Finding]", allowed: frozenset[str]) -> str:
    """All findings for people, errors first."""
    order = list(COLORS)
    blocks = []
    for finding in sorted(findings, key=lambda finding: order.index(finding.severity)):
        mark = " (allowed)" if finding.severity == "error" and finding.id in allowed else ""
        label = click.style(f"{finding.severity}{mark}", fg=COLORS[finding.severity], bold=True)
        lines = [f"{label}  {click.style(finding.id, bold=True)} {finding.title}"]
        for name, text in zip(("Found", "Expected", "Fix"), finding.violation[1:], strict=True):
            lines.append(
                textwrap.fill(
                    f"{name + ':':<10}{text}",
                    COLUMNS,
                    initial_indent="  ",
                    subsequent_indent=" " * 12,
                    break_long_words=False,
                    break_on_hyphens=False,
                )
            )
        blocks.append("\n".join([*lines, f"  {finding.anchor}"]))
    return "\n\n".join(blocks) + "\n" if blocks else ""
