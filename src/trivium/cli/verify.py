"""`trivium verify`: options and printing."""

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def verify(run: Path, as_json: bool) -> None:
    """Verify that RUN read every sample of its plan once and in order.

    Recomputes the order and every token and compares them with the hash chain that training wrote; checks checkpoints
    byte by byte. Exit code 0 if everything matches, 1 with the first difference otherwise.
    """
    from rich.console import Console
    from rich.progress import Progress

    from trivium.use.verify import verify as verify_run

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("replaying the ledger")
        result = verify_run(
            run,
            lambda text: console.print(text, markup=False),
            lambda step, total: bar.update(task, completed=step, total=total),
        )
    if as_json:
        click.echo(json.dumps(asdict(result)))
        return
    state = "finished" if result.is_finished else "unfinished"
    click.echo(
        f"Verified: the {result.num_steps:,} steps of this {state} run read {result.num_tokens:,} tokens in the "
        f"planned order, none skipped, none repeated. {len(result.checkpoints)} checkpoints are intact."
    )
