"""`trivium data`: build token stores, and look into stores and sources.

The work is `trivium.data.build` and `trivium.data.inspect`; here are flags and printing. Paths and figures go to
stdout, progress and remarks to stderr.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trivium.config import Data, Source

if TYPE_CHECKING:
    from trivium.data.inspect import Inspection

DEFAULTS = {name: info.default for name, info in Data.model_fields.items()}
DOCUMENTS = click.Choice(["file", "paragraph", "line"])
DEFAULT_CACHE_DIR = Path("runs") / "cache"
MAX_SHOWN_CHARS = 2000
BAR_COLUMNS = 40


@click.group()
def data() -> None:
    """Build and inspect token stores."""


@data.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--tokenizer", required=True, help="Tokenizer folder or Hub id.")
@click.option(
    "--held-out",
    type=click.FloatRange(0, 1, max_open=True),
    default=DEFAULTS["held_out"],
    show_default=True,
    help="Share of the documents kept out of training.",
)
@click.option("--field", default="text", show_default=True, help="JSON field or Parquet column with the text.")
@click.option(
    "--documents", type=DOCUMENTS, default="file", show_default=True, help="One document of a plain text file."
)
@click.option(
    "--max-reject-share",
    type=click.FloatRange(0, 1),
    default=DEFAULTS["max_reject_share"],
    show_default=True,
    help="Largest share of unusable rows.",
)
@click.option("--workers", type=click.IntRange(1, 512), help="Processes that tokenise. Default: one a core.")
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    default=DEFAULT_CACHE_DIR,
    show_default=True,
    help="Where stores are kept.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the reports as JSON.")
def build(
    sources: tuple[str, ...],
    tokenizer: str,
    held_out: float,
    field: str,
    documents: str,
    max_reject_share: float,
    workers: int | None,
    cache_dir: Path,
    as_json: bool,
) -> None:
    """Turn each SOURCE into a token store, or find the one that is there; print where it lies.

    A SOURCE is a file or folder of .txt .md .jsonl .json .parquet (also .gz .zst), or hub:ID for a Hub data set.

    Example: trivium data build stories.jsonl --tokenizer Qwen/Qwen3-0.6B
    """
    from trivium.data.build import build_sources
    from trivium.data.tokenizer import load_tokenizer

    built = build_sources(
        [source_of(source, field, documents) for source in sources],
        load_tokenizer(tokenizer),
        held_out=held_out,
        max_reject_share=max_reject_share,
        max_document_mib=DEFAULTS["max_document_mib"],
        cache_dir=cache_dir,
        workers=workers,
    )
    total = sum(store.report["tokens"] for store in built)
    if as_json:
        rows = [{"source": store.name, "store": str(store.path), **store.report} for store in built]
        click.echo(json.dumps(rows, indent=2))
        return
    for store in built:
        report = store.report
        click.echo(
            f"{store.name}: {report['tokens']:,} tokens ({report['tokens'] / total:.1%} of all) in "
            f"{report['documents']:,} documents, {report['held_out_documents']:,} held out, {report['duplicates']:,} "
            f"duplicates, {report['rejected']:,} of {report['rows']:,} rows refused, "
            f"{report['control_token_rows']:,} with control tokens written out as text",
            err=True,
        )
        click.echo(store.path)


def source_of(name: str, field: str, documents: str) -> Source:
    """What a SOURCE argument names."""
    place = {"hub": name.removeprefix("hub:")} if name.startswith("hub:") else {"path": name}
    return Source.model_validate({**place, "field": field, "documents": documents})


@data.command()
@click.argument("paths", nargs=-1, required=True, metavar="STORE_OR_SOURCE...", type=click.Path(path_type=Path))
@click.option("--tokenizer", help="Tokenizer folder or Hub id, to see a store's tokens as text.")
@click.option("--field", default="text", show_default=True, help="JSON field or Parquet column with the text.")
@click.option(
    "--documents", type=DOCUMENTS, default="file", show_default=True, help="One document of a plain text file."
)
@click.option(
    "-n", "num_shown", type=click.IntRange(0), default=3, show_default=True, help="Documents to show of each."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(
    paths: tuple[Path, ...], tokenizer: str | None, field: str, documents: str, num_shown: int, as_json: bool
) -> None:
    """Show first documents, lengths, shares and refused rows of stores and sources.

    Example: trivium data inspect runs/cache/store-* --tokenizer Qwen/Qwen3-0.6B
    """
    from trivium.data.inspect import inspect_all
    from trivium.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer) if tokenizer else None
    decode = (lambda ids: str(loaded.decode(list(ids)))) if loaded else None
    found = inspect_all(paths, field, documents, num_shown, decode)
    if as_json:
        click.echo(json.dumps([asdict(inspection) for inspection in found], indent=2))
        return
    for inspection in found:
        _print(inspection)


def _print(inspection: "Inspection") -> None:
    unit = inspection.unit
    click.echo(
        f"{inspection.name}: {inspection.num_documents:,} documents, {inspection.size:,} {unit}, "
        f"{inspection.share:.1%} of all {unit}"
    )
    if inspection.lengths:
        click.echo(
            f"  {unit} a document: " + ", ".join(f"{key} {value:,}" for key, value in inspection.lengths.items())
        )
    most = max((count for _, count in inspection.histogram), default=1)
    for low, count in inspection.histogram:
        bar = "#" * max(1, round(BAR_COLUMNS * count / most))
        click.echo(f"  {low:>12,} to {2 * low - 1:<12,} {count:>12,} {bar}")
    for reason, count in inspection.rejected_by_reason.items():
        click.echo(f"  refused: {reason}, {count:,} rows")
    for reject in inspection.rejects:
        click.echo(f"    {reject}")
    for number, text in enumerate(inspection.documents):
        click.echo(click.style(f"----- document {number} " + "-" * BAR_COLUMNS, dim=True))
        cut = len(text) - MAX_SHOWN_CHARS
        click.echo(text[:MAX_SHOWN_CHARS] + (f" [{cut:,} characters more]" if cut > 0 else ""))
    if inspection.documents:
        click.echo(click.style("-" * (BAR_COLUMNS + 18), dim=True))
