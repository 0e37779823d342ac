"""`trivium export`: options and printing. The written folder goes to stdout."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trivium.cli.progress import waiting

if TYPE_CHECKING:
    from trivium.use.export import Export


@click.command()
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The folder to create.")
@click.option("--merge", is_flag=True, help="Merge the adapter into its base: one model without PEFT.")
@click.option("--to", type=click.Choice(["hf"]), default="hf", show_default=True, help="hf: a Hugging Face folder.")
@click.option(
    "--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Of merged weights. Default: the base's."
)
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON.")
def export(model: str, out: Path, merge: bool, to: str, dtype: str | None, as_json: bool) -> None:
    """Export MODEL, a run folder or the folder of a model or adapter.

    The export is loaded with stock transformers (and PEFT) and its logits are compared; if they differ, nothing is
    kept. Existing files at --out are never overwritten.

    \b
    Examples:
      trivium export runs/tuned --merge --out tuned-merged
      trivium export runs/tuned --out tuned-adapter
    """
    import torch

    from trivium.use.export import export as write

    with waiting() as wait:
        done = write(model, out, merge, getattr(torch, dtype) if dtype else None, wait.note)
    if as_json:
        click.echo(json.dumps(asdict(done), indent=1))
        return
    for line in _remarks(done):
        click.echo(line, err=True)
    click.echo(done.folder)


def _remarks(done: "Export") -> list[str]:
    """The measurements in words."""
    lines = [
        f"verified: reloaded, its logits on {done.num_prompts} {done.prompts_from} differ by at most "
        f"{done.max_difference:.2g}"
    ]
    if done.rounding is not None:
        lines.append(f"rounding to {done.dtype} moved a logit by at most {done.rounding:.2g}")
    if done.quantized_difference is not None:
        lines.append(
            f"trained on the NF4 base: on the full-precision base a logit moves by at most "
            f"{done.quantized_difference:.2g}, and the loss on these prompts is {done.loss:.4f} instead of "
            f"{done.quantized_loss:.4f}"
        )
    return lines
