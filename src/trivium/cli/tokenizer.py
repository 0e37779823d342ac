"""`trivium tokenizer`: train a small tokenizer on text, and inspect any tokenizer.

This module only parses flags and prints.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from trivium.cli.data import DEFAULT_CACHE_DIR, DEFAULTS, DOCUMENTS, source_of
from trivium.errors import ConfigError, printable
from trivium.report.progress import building

if TYPE_CHECKING:
    from trivium.data.tokenizer import TokenizerKind


@click.group()
def tokenizer() -> None:
    """Train and inspect tokenizers."""


@tokenizer.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option(
    "--kind", type=click.Choice(["bpe", "byte", "char"]), default="bpe", show_default=True, help="Kind of tokenizer."
)
@click.option("--vocab-size", type=int, default=4096, show_default=True, help="Tokens, including special tokens.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to create.")
@click.option("--field", default="text", show_default=True, help="JSON field or Parquet column with the text.")
@click.option(
    "--documents", type=DOCUMENTS, default="file", show_default=True, help="Document unit of plain text files."
)
@click.option(
    "--cache-dir",
    type=click.Path(path_type=Path),
    default=DEFAULT_CACHE_DIR,
    show_default=True,
    help="Folder of trained tokenizers.",
)
def train(
    sources: tuple[str, ...], kind: str, vocab_size: int, out: Path, field: str, documents: str, cache_dir: Path
) -> None:
    """Train one tokenizer on the text of all SOURCEs and write it to --out as a Hugging Face folder.

    Example: trivium tokenizer train stories.jsonl --vocab-size 2048 --out my-tokenizer
    """
    from trivium.data.store.train_tokenizer import train_tokenizer_from_sources

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} already exists. Choose a new folder for --out; nothing is overwritten.")
    with building() as listener:
        trained = train_tokenizer_from_sources(
            [source_of(source, field, documents) for source in sources],
            kind=cast("TokenizerKind", kind),
            vocab_size=vocab_size,
            cache_dir=cache_dir,
            max_document_mib=DEFAULTS["max_document_mib"],
            listener=listener,
        )
    shutil.copytree(trained, out, dirs_exist_ok=True)
    click.echo(out)


@tokenizer.command()
@click.argument("path")
@click.argument("text", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(path: str, text: str | None, as_json: bool) -> None:
    """Show a tokenizer's size, special tokens and template, and how it splits TEXT.

    Example: trivium tokenizer inspect Qwen/Qwen3-0.6B "The quick brown fox"
    """
    from trivium.data.tokenizer import load_tokenizer

    loaded = load_tokenizer(path)
    template = loaded.chat_template
    facts: dict[str, object] = {
        "vocab_size": len(loaded),
        "eos": [loaded.eos_token, loaded.eos_token_id],
        "pad": [loaded.pad_token, loaded.pad_token_id],
        "special_tokens": {token.content: index for index, token in loaded.added_tokens_decoder.items()},
        "template_sha256": hashlib.sha256(template.encode()).hexdigest() if isinstance(template, str) else None,
    }
    if text:
        ids = loaded(text, add_special_tokens=False).input_ids
        facts["bytes_per_token"] = round(len(text.encode()) / len(ids), 3)
        facts["ids"] = ids
        facts["pieces"] = [loaded.decode([token]) for token in ids]
    if as_json:
        click.echo(json.dumps(facts, indent=2))
        return
    for key, value in facts.items():
        shown = value if isinstance(value, str | int | float) else json.dumps(value, ensure_ascii=False)
        click.echo(printable(f"{key:<16} {shown}"))
