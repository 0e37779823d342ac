"""Train a tokenizer on the text of sources; like token stores, the result is cached by a hash of its inputs."""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import tokenizers

from trivium.config.inputs import Source
from trivium.data.chat.formats import Conversation, Document
from trivium.data.source.corpus import Corpus, open_corpus
from trivium.data.source.records import read_records
from trivium.data.store.build import FORMAT, SILENT, Listener, content_key, made_once, partial_of
from trivium.data.tokenizer import TokenizerKind, train_tokenizer
from trivium.errors import BadData, ConfigError
from trivium.files import fsync_directory

SAMPLE_BYTES = 64 << 20


def train_tokenizer_from_sources(
    sources: Sequence[Source],
    *,
    kind: TokenizerKind,
    vocab_size: int,
    cache_dir: Path,
    max_document_mib: float,
    max_sample_bytes: int = SAMPLE_BYTES,
    listener: Listener = SILENT,
) -> Path:
    """Train a tokenizer on the sources' text, unless `cache_dir` already has it; return its folder.

    Reads up to `max_sample_bytes` of raw records, in blocks spread evenly over all sources. Documents that will be held
    out are read too, since a vocabulary does not reveal single documents.

    Raises: ConfigError when a source has no text or `vocab_size` is too small, BadData when no record can be used.
    """
    for source in sources:
        if source.store is not None:
            raise ConfigError(
                f"{source.store} is a token store, but a tokenizer is trained on text. Set tokenizer to an existing "
                "one."
            )
    cache_dir.mkdir(parents=True, exist_ok=True)
    corpora = [open_corpus(source, max_document_mib, cache_dir) for source in sources]
    inputs = {
        "format": FORMAT,
        "sources": [corpus.identity() for corpus in corpora],
        "kind": kind,
        "vocab_size": vocab_size,
        "max_sample_bytes": max_sample_bytes,
        "tokenizers": tokenizers.__version__,
    }

    def make(folder: Path) -> None:
        listener.note(f"training a {kind} tokenizer of {vocab_size:,} tokens on the data")
        partial = partial_of(folder)
        shutil.rmtree(partial, ignore_errors=True)
        train_tokenizer(sample_texts(corpora, max_sample_bytes), kind, vocab_size, partial)
        for corpus in corpora:
            corpus.require_unchanged()
        os.rename(partial, folder)
        fsync_directory(cache_dir)

    return made_once(cache_dir / f"tokenizer-{content_key(inputs)}", make, listener.note)


def sample_texts(corpora: Sequence[Corpus], max_bytes: int) -> Iterator[str]:
    """Yield texts from blocks spread evenly over the corpora, about `max_bytes` of raw records; deterministic.

    From a corpus of unknown size, the first blocks are taken, up to an equal part of `max_bytes`.
    Raises: BadData when there is no text.
    """
    num_texts = 0
    allowances = [corpus.num_bytes or max_bytes // len(corpora) for corpus in corpora]
    share = min(1.0, max_bytes / max(1, sum(allowances)))
    for corpus, allowance in zip(corpora, allowances, strict=True):
        num_read = num_taken = 0
        for block in corpus.blocks():
            num_raw_bytes = sum(len(piece.data) for piece in block.pieces)
            if num_taken <= share * num_read:
                num_taken += num_raw_bytes
                for record in read_records(block.pieces, corpus.reading):
                    texts = _texts(record.content)
                    num_texts += len(texts)
                    yield from texts
            num_read += num_raw_bytes
            if corpus.num_bytes is None and num_taken >= allowance * share:
                break
    if not num_texts:
        names = ", ".join(corpus.name for corpus in corpora)
        raise BadData(
            f"{names}: no record has text, so no tokenizer can be trained. See why with: trivium data inspect FILE"
        )


def _texts(content: object) -> list[str]:
    """The text of a document or of every message of a conversation; none for a reject."""
    if isinstance(content, Document):
        return [content.text]
    return [turn.content for turn in content.turns] if isinstance(content, Conversation) else []
