"""Survey sources in seconds, without a build: records, tokens, lengths, supervised and reasoning shares.

Small sources are read completely; large ones are sampled evenly and extrapolated by their size. With a tokenizer, the
sampled records are encoded like in a build; without one, tokens are estimated from the bytes of the text. This module
does not import torch (a loaded tokenizer does).
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from trivium.config.inputs import Data, Source
from trivium.data.chat.formats import Conversation, Document
from trivium.data.chat.samples import ConversationSettings
from trivium.data.columns import LOSS_WEIGHTS, REASONING
from trivium.data.source.blocks import SourceBlock, file_kind
from trivium.data.source.corpus import Corpus, FileCorpus, NoHashes, find_corpus
from trivium.data.source.records import read_records
from trivium.data.source.spread import parquet_footer, plain_bytes, spread_blocks
from trivium.data.store.build import chat_reading
from trivium.data.store.encode import encode_blocks
from trivium.data.store.megatron import Store
from trivium.data.store.tally import Tally
from trivium.data.tokenizer import document_encoding
from trivium.errors import BadData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_BYTES_READ, MOST_BYTES_ENCODED = 16 << 20, 1 << 20
"""Maximum bytes of a source that are read to count records, and encoded to count tokens."""
NO_LIMIT = ConversationSettings(seq_len=1 << 30)
LOOKED_AT_DOCUMENTS = 10_000

# UTF-8 bytes per token by script. Measured with Qwen's tokenizer (2.5 and 3 give the same) on the prose of the Hugging
# Face course in 22 languages: English 5.0 bytes per token, other European languages 3.3 to 4.1, Python 4.1, Korean 3.7,
# Japanese 4.7, Chinese 3.9 to 4.5, Russian 5.8, Hindi 2.8, Thai 5.2, Burmese 2.1. Estimates are within about 20% for
# most of these.
SCRIPTS: tuple[tuple[re.Pattern[str], float], ...] = (
    (re.compile(r"[\x00-\x7f]+"), 4.4),
    (re.compile(r"[\u0080-\u036f\u1e00-\u1eff]+"), 2.0),  # Latin letters with accents
    (re.compile(r"[\u0370-\u052f]+"), 6.0),  # Greek, Cyrillic
    (re.compile(r"[\u1100-\u11ff\u3130-\u318f\uac00-\ud7af]+"), 3.6),  # Hangul
    (re.compile(r"[\u3000-\u312f\u3400-\u9fff\uff00-\uffef]+"), 4.3),  # Han, kana
)
OTHER_BYTES_PER_TOKEN = 2.7
TURN_TOKENS = 5
"""ChatML tokens around each message: <|im_start|>, role, newline, <|im_end|>, newline."""


@dataclass(frozen=True)
class Survey:
    """Results of a survey; the first seven are the planner's `DataFacts`.

    Attributes:
        num_rows: usable records.
        num_tokens: tokens of one epoch.
        kind: kind of record that most of the tokens belong to.
        mean_tokens: mean tokens of a document or a sample of a conversation.
        supervised_share: share of the tokens that are supervised if conversations are trained on answers only.
        reasoning_share: share of the conversations' samples with reasoning.
        is_measured: whether tokens were counted with a tokenizer rather than estimated.
        read_share: share of the sources that was read; below 1, counts are extrapolated.
        num_rejected: rejected records.
    """

    num_rows: int
    num_tokens: int
    kind: Literal["documents", "conversations"]
    mean_tokens: float
    supervised_share: float
    reasoning_share: float
    is_measured: bool
    read_share: float
    num_rejected: int

    @property
    def how(self) -> str:
        """How the data was surveyed, as text."""
        share = f"{self.read_share:.2g} of the data read, evenly spread"
        read = "all records read" if self.read_share == 1.0 else share
        return f"{read}; tokens {'counted' if self.is_measured else 'estimated from the bytes of the text'}"


@dataclass(frozen=True)
class _Found:
    """Counts of the part of a source that was read, and the factor to extrapolate them."""

    tally: Tally
    factor: float = 1.0
    is_measured: bool = True

    @property
    def num_rows(self) -> float:
        return (self.tally.kept + self.tally.split) * self.factor

    @property
    def num_supervised_tokens(self) -> int:
        """Counts every token of a document, although its first is never predicted."""
        return self.tally.supervised_tokens if self.tally.conversations else self.tally.num_tokens


def survey(
    sources: Sequence[Source],
    tokenizer: "PreTrainedTokenizerFast | None" = None,
    conversations: ConversationSettings = NO_LIMIT,
    cache_dir: Path | None = None,
) -> Survey:
    """Survey sources together.

    Args:
        sources: files, folders, Hub datasets or external stores.
        tokenizer: the model's, loaded; None to estimate tokens.
        conversations: how conversations become samples; no length limit by default.
        cache_dir: folder of the stores, which is skipped if it is inside a source.

    Raises: ConfigError or BadData when a source does not exist, cannot be read, or has no usable record.
    """
    found = [_survey(source, tokenizer, conversations, cache_dir) for source in sources]
    tokens = [one.tally.num_tokens * one.factor for one in found]
    samples = [one.tally.num_samples * one.factor for one in found]
    chats = [index for index, one in enumerate(found) if one.tally.conversations]
    num_tokens = sum(tokens)
    if not num_tokens:
        names = ", ".join(str(source.path or source.hub or source.store) for source in sources)
        raise BadData(f"{names}: no usable record was found. See the rejects with: trivium data inspect FILE")
    reasoned = sum(found[index].tally.reasoning_documents * found[index].factor for index in chats)
    return Survey(
        num_rows=max(1, round(sum(one.num_rows for one in found))),
        num_tokens=max(1, round(num_tokens)),
        kind="conversations" if 2 * sum(tokens[index] for index in chats) > num_tokens else "documents",
        mean_tokens=num_tokens / sum(samples),
        supervised_share=sum(one.num_supervised_tokens * one.factor for one in found) / num_tokens,
        reasoning_share=reasoned / sum(samples[index] for index in chats) if chats else 0.0,
        is_measured=all(one.is_measured for one in found),
        read_share=sum(one.tally.num_tokens for one in found) / num_tokens,
        num_rejected=round(sum(one.tally.rejected * one.factor for one in found)),
    )


def _survey(
    source: Source, tokenizer: "PreTrainedTokenizerFast | None", conversations: ConversationSettings, cache: Path | None
) -> _Found:
    if source.store is not None:
        return _of_store(Path(source.store).expanduser())
    hashes = NoHashes() if cache is None else NoHashes(cache)
    corpus = find_corpus(source, Data.model_fields["max_document_mib"].default, hashes)
    sizes = [plain_bytes(file) for file in corpus.files] if isinstance(corpus, FileCorpus) else []
    read, num_bytes = _estimate(corpus, _blocks(corpus, sizes, MOST_BYTES_READ))
    if not sizes and num_bytes >= MOST_BYTES_READ:
        raise BadData(
            f"{corpus.name} is larger than {MOST_BYTES_READ >> 20} MiB, and its total size is unknown. Give numbers "
            "instead (--rows or --tokens, with --kind), or download it."
        )
    num_records = _records_by_footer(corpus)
    if num_records is None:
        num_records = read.records * (sum(sizes) / max(1, num_bytes) if sum(sizes) > MOST_BYTES_READ else 1.0)
    if tokenizer is not None:
        read = _encode(corpus, _blocks(corpus, sizes, MOST_BYTES_ENCODED), tokenizer, conversations)
    return _Found(read, num_records / max(1, read.records), is_measured=tokenizer is not None)


def _blocks(corpus: Corpus, sizes: list[int], most_bytes: int) -> Iterator[SourceBlock]:
    """All of a small corpus, else blocks spread evenly over it; the beginning of a Hub dataset."""
    if isinstance(corpus, FileCorpus):
        yield from corpus.blocks() if sum(sizes) <= most_bytes else spread_blocks(corpus, sizes, most_bytes)
        return
    num_bytes = 0
    for block in corpus.blocks():
        yield block
        num_bytes += sum(len(piece.data) for piece in block.pieces)
        if num_bytes >= most_bytes:
            return


def _records_by_footer(corpus: Corpus) -> int | None:
    """Number of records by the footers of Parquet files; None for other files."""
    if not isinstance(corpus, FileCorpus) or any(file_kind(file.path) != "parquet" for file in corpus.files):
        return None
    return sum(parquet_footer(file.path).num_rows for file in corpus.files)


def _estimate(corpus: Corpus, blocks: Iterator[SourceBlock]) -> tuple[Tally, int]:
    """Count the records and raw bytes of blocks, and estimate their tokens."""
    tally, num_bytes = Tally(), 0
    for block in blocks:
        num_bytes += sum(len(piece.data) for piece in block.pieces)
        for record in read_records(block.pieces, corpus.reading):
            tally.add_record(record.content)
            if isinstance(record.content, Conversation):
                _estimate_conversation(record.content, tally)
            elif isinstance(record.content, Document):
                tally.num_tokens += estimated_tokens(record.content.text) + 1  # and the end token
    return tally, num_bytes


def _estimate_conversation(conversation: Conversation, tally: Tally) -> None:
    """Estimate the tokens of tools and messages with ChatML around them, as one sample."""
    if conversation.tools:
        tally.num_tokens += estimated_tokens(json.dumps(conversation.tools, ensure_ascii=False))
    for turn in conversation.turns:
        calls = json.dumps(turn.tool_calls, ensure_ascii=False) if turn.tool_calls else ""
        num_tokens = estimated_tokens(f"{turn.reasoning or ''}{turn.content}{calls}")
        tally.num_tokens += num_tokens + TURN_TOKENS
        tally.supervised_tokens += num_tokens + 1 if turn.weight else 0  # and the end of turn


def _encode(
    corpus: Corpus,
    blocks: Iterator[SourceBlock],
    tokenizer: "PreTrainedTokenizerFast",
    conversations: ConversationSettings,
) -> Tally:
    """Count the records and tokens of blocks, encoded like in a build."""
    tally = Tally()
    chat = chat_reading(corpus, tokenizer, conversations)
    for block in encode_blocks(blocks, document_encoding(tokenizer), corpus.reading, chat, workers=1):
        tally.add(block.tally)
    return tally


def estimated_tokens(text: str) -> int:
    """Estimate the tokens of a text with Qwen's tokenizer from its UTF-8 bytes in each script."""
    num_bytes, num_tokens = len(text.encode("utf-8", "surrogatepass")), 0.0
    for pattern, bytes_per_token in SCRIPTS:
        found = sum(len(run.encode("utf-8", "surrogatepass")) for run in pattern.findall(text))
        num_tokens += found / bytes_per_token
        num_bytes -= found
        if not num_bytes:
            break
    return max(1, round(num_tokens + num_bytes / OTHER_BYTES_PER_TOKEN))


def _of_store(path: Path) -> _Found:
    """Read the token count of an external store, and estimate supervised tokens from evenly spread documents."""
    store = Store(path)
    tally = Tally(num_samples=len(store), num_tokens=store.num_tokens, supervised_tokens=store.num_tokens)
    if LOSS_WEIGHTS not in store.columns:
        return _Found(tally)
    chosen = range(0, len(store), 1 + len(store) // LOOKED_AT_DOCUMENTS)
    weights = [store.column(LOSS_WEIGHTS.name, document) for document in chosen]
    share = sum(int(np.count_nonzero(one[1:])) for one in weights) / max(1, sum(map(len, weights)))
    tally.conversations, tally.supervised_tokens = len(store), round(store.num_tokens * share)
    if REASONING in store.columns:
        tally.reasoning_documents = int(store.values(REASONING.name).sum())
    return _Found(tally)
