"""`trivium export`: options and printing. The written folder goes to stdout."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trivium.api import DTYPES, Dtype
from trivium.errors import count_of

if TYPE_CHECKING:
    from trivium.use.export import Export


@click.command()
@click.argument("model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to create.")
@click.option("--merge", is_flag=True, help="Merge the adapter into its base model, so that PEFT is not needed.")
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Dtype of the merged weights. Default: the base model's.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the measurements as JSON.")
def export(model: str, out: Path, merge: bool, dtype: Dtype | None, as_json: bool) -> None:
    """Export MODEL (a run folder, or the folder of a model or an adapter) to a Hugging Face folder.

    The export is loaded again with transformers (and PEFT) and its logits are compared with the original's. If they
    differ, the export is deleted. Existing files are never overwritten.

    \b
    Examples:
      trivium export runs/tuned --merge --out tuned-merged
      trivium export runs/tuned --out tuned-adapter
    """
    from trivium.api import export as write

    done = write(model, out, merge=merge, dtype=dtype)
    if as_json:
        click.echo(json.dumps(asdict(done), indent=1))
        return
    for line in _remarks(done):
        click.echo(line, err=True)
    click.echo(done.folder)


def _remarks(done: "Export") -> list[str]:
    """The measurements as sentences."""
    lines = [
        f"verified: after reloading, the logits on {count_of(done.num_prompts, done.prompts_from.removesuffix('s'))} "
        f"differ by at most {done.max_difference:.2g}"
    ]
    if done.rounding is not None:
        lines.append(f"rounding to {done.dtype} changes a logit by at most {done.rounding:.2g}")
    if done.quantized_difference is not None:
        lines.append(
            f"the adapter was trained on the NF4 base model; with the full-precision one, logits change by at "
            f"most {done.quantized_difference:.2g} and the loss on these prompts is {done.loss:.4f} instead of "
            f"{done.quantized_loss:.4f}"
        )
    return lines
