"""`trivium verify`: prove that no sample of a run was skipped or repeated."""

import json
from dataclasses import asdict
from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the proof as JSON.")
def verify(run: Path, as_json: bool) -> None:
    """Prove from RUN's records that it read every sample of its plan once, in order.

    The order and every token are computed anew and compared with the hash chain that training wrote; checkpoints are
    checked byte by byte. Exit code 0: proven. 1: something differs, and it says what.
    """
    from rich.console import Console
    from rich.progress import Progress

    from trivium.use.verify import verify as prove

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("replaying the ledger")
        proof = prove(
            run,
            lambda text: console.print(text, markup=False),
            lambda step, total: bar.update(task, completed=step, total=total),
        )
    if as_json:
        click.echo(json.dumps(asdict(proof)))
        return
    state = "finished" if proof.is_finished else "unfinished"
    click.echo(
        f"Proven: the {proof.num_steps:,} steps of this {state} run read {proof.num_tokens:,} tokens, those of its "
        f"plan in its order, none skipped, none repeated. {len(proof.checkpoints)} checkpoints hold what was written."
    )
