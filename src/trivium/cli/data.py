"""`trivium data`: build, import and inspect token stores.

This module only parses flags and prints. Results go to stdout, progress and notes to stderr.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from pydantic import ValidationError

from trivium.config.inputs import Data, Source
from trivium.errors import ConfigError, count_of, printable
from trivium.report.progress import building

if TYPE_CHECKING:
    from trivium.data.chat.samples import ConversationSettings
    from trivium.data.look.inspect import Inspection
    from trivium.data.look.show import Shown, TextSpan

DEFAULTS = {name: info.default for name, info in Data.model_fields.items()}
DOCUMENTS = click.Choice(["file", "paragraph", "line"])
FORMAT = click.Choice(["auto", "messages", "sharegpt", "alpaca", "prompt", "text"])
DEFAULT_CACHE_DIR = Path("runs") / "cache"
MAX_SHOWN_CHARS = 2000
BAR_COLUMNS = 40
FULL_WEIGHT = 100


@click.group()
def data() -> None:
    """Build, import and inspect token stores."""


def _pairs(_context: click.Context, _option: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    if wrong := [value for value in values if "=" not in value]:
        raise click.BadParameter(f"{wrong[0]!r} does not have the form OURS=THEIRS, for example prompt=question")
    return dict(value.split("=", 1) for value in values)


READING_OPTIONS = [
    click.option("--field", default="text", show_default=True, help="JSON field or Parquet column with the text."),
    click.option(
        "--documents", type=DOCUMENTS, default="file", show_default=True, help="Document unit of plain text files."
    ),
    click.option("--format", type=FORMAT, default="auto", show_default=True, help="Format of the records."),
    click.option(
        "--fields", multiple=True, callback=_pairs, metavar="OURS=THEIRS", help="Field name, e.g. prompt=question."
    ),
    click.option("--dataset", metavar="NAME", help="Entry to read if SOURCE is a dataset_info.json."),
    click.option(
        "--seq-len",
        type=click.IntRange(8),
        default=DEFAULTS["seq_len"],
        show_default=True,
        help="Maximum tokens of a sample of a conversation.",
    ),
    click.option(
        "--overlong",
        type=click.Choice(["drop", "split", "truncate"]),
        default=DEFAULTS["overlong"],
        show_default=True,
        help="What to do with answers that do not fit.",
    ),
    click.option(
        "--loss-tokens",
        type=click.Choice(["assistant", "all"]),
        default="assistant",
        show_default=True,
        help="Which tokens of a conversation are supervised.",
    ),
]
READING_KEYS = ("field", "documents", "format", "fields", "dataset")


def reading_options(command: Callable[..., None]) -> Callable[..., None]:
    """Decorator that adds the options for reading sources."""
    for option in reversed(READING_OPTIONS):
        command = option(command)
    return command


def source_of(name: str, field: str, documents: str, **reading: Any) -> Source:
    """The source of a SOURCE argument.

    Raises: ConfigError when the options contradict each other.
    """
    place = {"hub": name.removeprefix("hub:")} if name.startswith("hub:") else {"path": name}
    try:
        return Source.model_validate({**place, "field": field, "documents": documents, **reading})
    except ValidationError as error:
        raise ConfigError(f"{name}: {error.errors()[0]['msg'].removeprefix('Value error, ')}.") from None


def _sources(names: tuple[str, ...], options: dict[str, Any]) -> list[Source]:
    return [source_of(name, **{key: options[key] for key in READING_KEYS}) for name in names]


def _conversations(options: dict[str, Any]) -> "ConversationSettings":
    from trivium.data.chat.samples import ConversationSettings

    return ConversationSettings(options["seq_len"], options["overlong"], options["loss_tokens"] == "all")


@data.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--tokenizer", required=True, help="Tokenizer folder or Hub id.")
@reading_options
@click.option(
    "--held-out",
    type=click.FloatRange(0, 1, max_open=True),
    help="Share of documents kept out of training. Default: 0.01; for small data, about 20 documents, at most 0.1.",
)
@click.option(
    "--max-reject-share",
    type=click.FloatRange(0, 1),
    default=DEFAULTS["max_reject_share"],
    show_default=True,
    help="Maximum share of rejected records.",
)
@click.option("--workers", type=click.IntRange(1, 512), help="Tokenizing processes. Default: one per core.")
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    default=DEFAULT_CACHE_DIR,
    show_default=True,
    help="Folder of the stores.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the reports as JSON.")
def build(
    sources: tuple[str, ...],
    tokenizer: str,
    held_out: float | None,
    max_reject_share: float,
    workers: int | None,
    cache_dir: Path,
    as_json: bool,
    **reading: Any,
) -> None:
    """Build a token store for each SOURCE, or find the existing one, and print its path.

    A SOURCE is a file or folder of .txt .md .jsonl .json .parquet (also .gz .zst), or hub:ID for a Hub dataset.
    The format (documents or conversations) is detected from each file's first records.

    Example: trivium data build stories.jsonl --tokenizer Qwen/Qwen3-0.6B
    """
    from trivium.data.store.build import BuildSettings, build_sources
    from trivium.data.store.tally import describe_counts
    from trivium.data.tokenizer import load_tokenizer

    settings = BuildSettings(
        cache_dir=cache_dir,
        conversations=_conversations(reading),
        held_out=held_out,
        max_reject_share=max_reject_share,
        workers=workers,
    )
    with building() as listener:
        built = build_sources(_sources(sources, reading), load_tokenizer(tokenizer), settings, listener)
    total = sum(store.report["tokens"] for store in built)
    if as_json:
        reports = [{"source": store.name, "store": str(store.path), **store.report} for store in built]
        click.echo(json.dumps(reports, indent=2))
        return
    for store in built:
        report = store.report
        all_tokens = report["tokens"] + report["held_out_tokens"]
        click.echo(
            f"{store.name}: {count_of(report['tokens'], 'token')} ({report['tokens'] / total:.1%} of all) in "
            f"{count_of(report['documents'], 'document')}, {report['held_out_documents']:,} held out, "
            f"{count_of(report['duplicates'], 'duplicate')}",
            err=True,
        )
        for line in describe_counts(report):
            click.echo(f"  {line}", err=True)
        if report["conversations"]:
            click.echo(f"  {_supervised(report['supervised_tokens'], all_tokens)}", err=True)
        click.echo(store.path)


def _supervised(num_supervised: int, num_tokens: int) -> str:
    return f"{count_of(num_supervised, 'supervised token')} ({num_supervised / max(1, num_tokens):.1%})"


@data.command("import")
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to create for the store.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def import_(folder: Path, out: Path, as_json: bool) -> None:
    """Convert a FOLDER of padded .mmap files from Qwen3-Coder's binarize_data.py to a store with loss weights.

    Padding is removed, and samples without a supervised token are rejected. To train on the store, set `store:` in the
    run file to the printed path.

    Example: trivium data import binarized --out imported
    """
    from trivium.data.store.imports import import_padded_mmap
    from trivium.data.store.tally import describe_counts

    report = import_padded_mmap(folder, out)
    if as_json:
        click.echo(json.dumps({"store": str(out / "tokens"), **report}, indent=2))
        return
    click.echo(
        f"{folder}: {count_of(report['tokens'], 'token')} in {count_of(report['documents'], 'sample')}", err=True
    )
    for line in [*describe_counts(report), _supervised(report["supervised_tokens"], report["tokens"])]:
        click.echo(f"  {line}", err=True)
    for reason, count in report["rejected_by_reason"].items():
        click.echo(f"  rejected: {reason}, {count_of(count, 'record')}", err=True)
    click.echo(out / "tokens")


@data.command()
@click.argument("paths", nargs=-1, required=True, metavar="STORE_OR_SOURCE...")
@click.option("--tokenizer", help="Tokenizer folder or Hub id, to decode stores and to encode sources.")
@reading_options
@click.option(
    "-n", "num_shown", type=click.IntRange(0), default=3, show_default=True, help="Records to show per source."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(paths: tuple[str, ...], tokenizer: str | None, num_shown: int, as_json: bool, **reading: Any) -> None:
    """Show the first records, lengths, shares and rejects of stores and sources.

    With --tokenizer, conversations are shown as samples. Supervised tokens are green, or yellow if their loss weight is
    not 1; without colors they are in [[brackets]]. Each answer's prompt is verified to be what serving sends.

    \b
    Examples:
      trivium data inspect chats.jsonl --tokenizer Qwen/Qwen3-0.6B
      trivium data inspect runs/cache/store-* --tokenizer Qwen/Qwen3-0.6B
    """
    from trivium.data.look.inspect import Look, inspect_all
    from trivium.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(tokenizer) if tokenizer else None
    found = inspect_all(_sources(paths, reading), Look(loaded, _conversations(reading), num_shown))
    if as_json:
        click.echo(json.dumps([asdict(inspection) for inspection in found], indent=2))
        return
    for inspection in found:
        _print(inspection)


def _print(inspection: "Inspection") -> None:
    from trivium.data.store.tally import describe_counts

    unit, num_documents = inspection.unit, inspection.num_documents
    click.echo(
        f"{printable(inspection.name)}: {count_of(num_documents, 'document')}, {inspection.size:,} {unit}, "
        f"{inspection.share:.1%} of all {unit}"
    )
    if inspection.counts:
        click.echo("\n".join(f"  {line}" for line in describe_counts(inspection.counts)))
    if inspection.num_supervised is not None:
        click.echo(f"  {_supervised(inspection.num_supervised, inspection.size)}")
    if inspection.counts.get("conversations"):
        reasoned = inspection.num_reasoning
        click.echo(
            f"  {count_of(reasoned, 'document')} with reasoning ({reasoned / max(1, num_documents):.1%}), "
            f"{num_documents - reasoned:,} without"
        )
    if inspection.lengths:
        lengths = ", ".join(_length(key, value) for key, value in inspection.lengths.items())
        click.echo(f"  {unit} per document: {lengths}")
    most = max((count for _, count in inspection.histogram), default=1)
    for low, count in inspection.histogram:
        bar = "#" * max(1, round(BAR_COLUMNS * count / most))
        click.echo(f"  {low:>12,} to {2 * low - 1:<12,} {count:>12,} {bar}")
    for reason, count in inspection.rejected_by_reason.items():
        click.echo(f"  rejected: {reason}, {count_of(count, 'record')}")
        for reject in inspection.rejects.get(reason, []):
            click.echo(f"    {printable(reject)}")
    for shown in inspection.documents:
        _print_shown(shown)
    if inspection.documents:
        click.echo(click.style("-" * (BAR_COLUMNS + 18), dim=True))


def _length(key: str, value: float) -> str:
    """A figure of the lengths; large percentiles are not exact."""
    from trivium.data.store.publish import EXACT_BELOW

    return f"{key} about {value:,}" if key.startswith("p") and value >= EXACT_BELOW else f"{key} {value:,}"


def _print_shown(shown: "Shown") -> None:
    size = "" if shown.num_tokens is None else f", {count_of(shown.num_tokens, 'token')}"
    click.echo(click.style(f"----- {printable(shown.name)}{size} " + "-" * BAR_COLUMNS, dim=True))
    for note in shown.notes:
        click.echo(f"  {printable(note)}")
    for proof in shown.proofs:
        thinking = "" if proof.thinking is None else f", enable_thinking={proof.thinking}"
        click.echo(
            f"  turn {proof.turn} verified: {count_of(proof.prompt_tokens, 'prompt token')} + "
            f"{count_of(proof.answer_tokens, 'answer token')}{thinking}"
        )
    left = MAX_SHOWN_CHARS
    for span in shown.spans:
        click.echo(_marked(span, printable(span.text[:left])), nl=False)
        left = max(0, left - len(span.text))
    cut = sum(len(span.text) for span in shown.spans) - MAX_SHOWN_CHARS
    click.echo(f" [{cut:,} more characters]" if cut > 0 else "")


def _marked(span: "TextSpan", text: str) -> str:
    """The text in the color of its loss weight, or in brackets without colors."""
    if span.weight is None or not text:
        return text
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        if not span.weight:
            return click.style(text, dim=True)
        return click.style(text, fg="green" if span.weight == FULL_WEIGHT else "yellow")
    if not span.weight:
        return text
    return f"[[{text}]]" if span.weight == FULL_WEIGHT else f"[[{span.weight / FULL_WEIGHT:g}: {text}]]"
