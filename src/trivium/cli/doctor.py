"""`trivium doctor`: what would make a run fail, or silently learn the wrong thing.

The rules are `trivium.doctor`; here are flags and printing. Findings go to stdout, progress to stderr.
"""

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
@click.option("--allow", multiple=True, metavar="ID", help="Go on in spite of this rule's errors; may be repeated.")
def doctor(run_file: Path, overrides: tuple[str, ...], as_json: bool, allow: tuple[str, ...]) -> None:
    """Examine RUN_FILE without training: tokens, data, adapter, numbers, machine, one step and one checkpoint.

    Builds the token stores, as training would. Exit codes: 0 nothing stops the run, else what `trivium train` would end
    with: 2 configuration, 3 does not fit, 4 data. Each rule's reasons are in docs/doctor.md.

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
        # Also when the run could not be prepared: what was found until then may be the reason.
        if as_json:
            click.echo(json.dumps([finding.record() for finding in findings], indent=2))
        else:
            click.echo(_page(findings, allowed), nl=False)
    if errors := stopping(findings, allowed):
        raise refusal(errors, with_paragraphs=False)
    if not findings:
        click.echo("Nothing to mend: the run is sound as far as can be known beforehand.", err=True)


def _page(findings: "list[Finding]", allowed: frozenset[str]) -> str:
    """All findings to read, errors first."""
    order = list(COLORS)
    blocks = []
    for finding in sorted(findings, key=lambda finding: order.index(finding.severity)):
        mark = " (allowed)" if finding.severity == "error" and finding.id in allowed else ""
        label = click.style(f"{finding.severity}{mark}", fg=COLORS[finding.severity], bold=True)
        lines = [f"{label}  {click.style(finding.id, bold=True)} {finding.title}"]
        trouble = finding.trouble
        for name, text in (("Found", trouble.found), ("Expected", trouble.expected), ("To do", trouble.todo)):
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
