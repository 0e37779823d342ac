"""`trivium doctor`: options and printing. Findings go to stdout, progress to stderr."""

import json
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from trivium.doctor.findings import Finding

COLORS = {"error": "red", "warning": "yellow", "info": "cyan"}


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
        # Printed even if the run cannot be prepared: a finding may be the reason.
        if as_json:
            click.echo(json.dumps([finding.record() for finding in findings], indent=2))
        else:
            click.echo(_page(findings, allowed), nl=False)
    if errors := stopping(findings, allowed):
        raise refusal(errors, with_paragraphs=False)
    if not findings:
        click.echo("Nothing to fix: all checks passed.", err=True)


def _page(findings: "list[Finding]", allowed: frozenset[str]) -> str:
    """All findings as text, errors first."""
    order = list(COLORS)
    wrapper = textwrap.TextWrapper(
        100, initial_indent="  ", subsequent_indent=" " * 12, break_long_words=False, break_on_hyphens=False
    )
    blocks = []
    for finding in sorted(findings, key=lambda finding: order.index(finding.severity)):
        mark = " (allowed)" if finding.severity == "error" and finding.id in allowed else ""
        label = click.style(f"{finding.severity}{mark}", fg=COLORS[finding.severity], bold=True)
        lines = [f"{label}  {click.style(finding.id, bold=True)} {finding.title}"]
        texts = {"Found:": finding.found, "Expected:": finding.expected, "Fix:": finding.fix}
        lines += [wrapper.fill(f"{name:<10}{text}") for name, text in texts.items()]
        blocks.append("\n".join([*lines, f"  {finding.anchor}"]))
    return "\n\n".join(blocks) + "\n" if blocks else ""
