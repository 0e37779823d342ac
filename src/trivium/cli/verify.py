"""`trivium verify`: options and printing."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from trivium.errors import count_of
from trivium.report.progress import waiting


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(run: Path, as_json: bool) -> None:
    """Verify that RUN read every sample exactly once and in order.

    Recomputes the order and the tokens of every step and compares them with the hash chain that training wrote. Also
    checks the SHA-256 of every checkpoint. Exit codes: 0 everything matches, 1 at the first difference.
    """
    from trivium.use.verify import verify as verify_run

    with waiting() as wait:
        result = verify_run(run, wait.note, wait.bar("replaying the ledger"))
    if as_json:
        click.echo(json.dumps(asdict(result)))
        return
    state = "finished" if result.is_finished else "unfinished"
    click.echo(
        f"Verified: this {state} run read {count_of(result.num_tokens, 'token')} in "
        f"{count_of(result.num_steps, 'step')}, in order, with none skipped or repeated. "
        f"Intact checkpoints: {len(result.checkpoints)}."
    )
