"""Survey sources in seconds, without a build: records, tokens, lengths, supervised and reasoning shares.

Small sources are read completely; large ones are sampled evenly and extrapolated by their size. Tokens are estimated
from the text (`estimate.py`). With a tokenizer, records of about `MOST_BYTES_ENCODED` are also encoded like in a build,
and correct the estimate of the others. This module does not import torch.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from trivium.config.inputs import Data, Source
from trivium.data.chat.samples import ChatEncoder, ConversationSettings
from trivium.data.columns import LOSS_WEIGHTS, REASONING
from trivium.data.look.estimate import TemplateTokens, estimate
from trivium.data.rejects import Reject
from trivium.data.source.blocks import SourceBlock, file_kind
from trivium.data.source.corpus import Corpus, FileCorpus, NoHashes, find_corpus
from trivium.data.source.records import read_records
from trivium.data.source.spread import parquet_footer, plain_bytes, spread_blocks
from trivium.data.store.encode import HASH_BYTES, BlockEncoder, content_hash
from trivium.data.store.megatron import Store
from trivium.data.store.publish import held_out_limit, held_out_share
from trivium.data.store.tally import Tally
from trivium.data.tokenizer import document_encoding
from trivium.errors import BadData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_BYTES_READ, MOST_BYTES_ENCODED = 16 << 20, 1 << 18
"""Maximum bytes of a source that are read, and that are encoded to count tokens."""
NO_LIMIT = ConversationSettings(seq_len=1 << 30)
LOOKED_AT_DOCUMENTS = 10_000


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
        part = "" if self.read_share == 1.0 else f" in {self.read_share:.1%} of the data, evenly spread"
        if self.is_measured:
            return f"tokens counted with the model's tokenizer{part}"
        return f"tokens estimated from the text{part}, because the model's tokenizer is not on this machine"


@dataclass(frozen=True)
class _Found:
    """Counts of the part of a source that was looked at, and how to extrapolate them.

    Attributes:
        record_factor, token_factor, supervised_factor: records, tokens and supervised tokens of the source for each
            one in the tally.
        trained_share: share of the tokens that is not held out.
        is_measured: whether the tally's tokens were counted with a tokenizer.
    """

    tally: Tally
    record_factor: float = 1.0
    token_factor: float = 1.0
    supervised_factor: float = 1.0
    trained_share: float = 1.0
    is_measured: bool = True

    @property
    def num_rows(self) -> float:
        return (self.tally.kept + self.tally.split) * self.record_factor

    @property
    def num_tokens(self) -> float:
        """Of all samples, also held-out ones."""
        return self.tally.num_tokens * self.token_factor

    @property
    def num_samples(self) -> float:
        return self.tally.num_samples * self.token_factor

    @property
    def num_supervised_tokens(self) -> float:
        """Counts every token of a document, although its first is never predicted."""
        return self.tally.supervised_tokens * self.supervised_factor if self.tally.conversations else self.num_tokens


def survey(
    sources: Sequence[Source],
    tokenizer: "PreTrainedTokenizerFast | None" = None,
    conversations: ConversationSettings = NO_LIMIT,
    cache_dir: Path | None = None,
    held_out: float | None = 0.0,
    template: TemplateTokens = TemplateTokens(),  # noqa: B008 (immutable)
) -> Survey:
    """Survey sources together.

    Args:
        sources: files, folders, Hub datasets or external stores.
        tokenizer: the model's, loaded; None to estimate tokens.
        conversations: how conversations become samples; no length limit by default.
        cache_dir: folder of the stores, which is skipped if it is inside a source.
        held_out: see `config.Data.held_out`; `num_tokens` leaves these out.
        template: what the chat template adds, for an estimate without a tokenizer.

    Raises: ConfigError or BadData when a source does not exist, cannot be read, or has no usable record.
    """
    surveyor = _Surveyor(tokenizer, conversations, cache_dir, held_out, template)
    found = [surveyor.survey(source) for source in sources]
    chats = [one for one in found if one.tally.conversations]
    num_tokens = sum(one.num_tokens for one in found)
    if not num_tokens:
        names = ", ".join(str(source.path or source.hub or source.store) for source in sources)
        raise BadData(f"{names}: no usable record was found. See the rejects with: trivium data inspect FILE")
    reasoned = sum(one.tally.reasoning_documents * one.token_factor for one in chats)
    return Survey(
        num_rows=max(1, round(sum(one.num_rows for one in found))),
        num_tokens=max(1, round(sum(one.num_tokens * one.trained_share for one in found))),
        kind="conversations" if 2 * sum(one.num_tokens for one in chats) > num_tokens else "documents",
        mean_tokens=num_tokens / sum(one.num_samples for one in found),
        supervised_share=sum(one.num_supervised_tokens for one in found) / num_tokens,
        reasoning_share=reasoned / sum(one.num_samples for one in chats) if chats else 0.0,
        is_measured=all(one.is_measured for one in found),
        read_share=sum(one.tally.num_tokens for one in found) / num_tokens,
        num_rejected=round(sum(one.tally.rejected * one.record_factor for one in found)),
    )


@dataclass(frozen=True)
class _Surveyor:
    """Surveys one source after the other; see `survey` for the attributes."""

    tokenizer: "PreTrainedTokenizerFast | None"
    conversations: ConversationSettings
    cache_dir: Path | None
    held_out: float | None
    template: TemplateTokens

    def survey(self, source: Source) -> _Found:
        if source.store is not None:
            return _of_store(Path(source.store).expanduser())
        hashes = NoHashes() if self.cache_dir is None else NoHashes(self.cache_dir)
        corpus = find_corpus(source, Data.model_fields["max_document_mib"].default, hashes)
        sizes = [plain_bytes(file) for file in corpus.files] if isinstance(corpus, FileCorpus) else []
        encoder = self._encoder(corpus)
        encoded_share = 0.0
        if encoder:
            encoded_share = MOST_BYTES_ENCODED / max(1, min(MOST_BYTES_READ, sum(sizes) or MOST_BYTES_READ))
        looked = _Looked(encoder, encoded_share)
        for block in _blocks(corpus, sizes):
            looked.add(block, corpus, self.template, self.conversations)
        if not sizes and looked.num_bytes >= MOST_BYTES_READ:
            raise BadData(
                f"{corpus.name}: is larger than {MOST_BYTES_READ >> 20} MiB, and its total size is unknown. Give the "
                "number of its records or tokens instead, or download it."
            )
        num_records = _records_by_footer(corpus)
        if num_records is None:
            size_factor = sum(sizes) / max(1, looked.num_bytes) if sum(sizes) > MOST_BYTES_READ else 1.0
            num_records = looked.guessed.records * size_factor
        return self._found(looked, num_records)

    def _encoder(self, corpus: Corpus) -> BlockEncoder | None:
        if self.tokenizer is None:
            return None
        chats = ChatEncoder(self.tokenizer, **asdict(self.conversations)) if corpus.has_conversations else None
        return BlockEncoder(document_encoding(self.tokenizer), corpus.reading, chats)

    def _found(self, looked: "_Looked", num_records: float) -> _Found:
        read_factor = num_records / max(1, looked.guessed.records)
        trained_share = looked.trained_share(self.held_out, read_factor)
        if looked.samples is None:
            return _Found(looked.guessed, read_factor, read_factor, read_factor, trained_share, is_measured=False)
        counted, guessed, sampled = looked.samples.tally, looked.guessed, looked.sampled
        return _Found(
            counted,
            record_factor=num_records / max(1, counted.records),
            token_factor=read_factor * guessed.num_tokens / max(1, sampled.num_tokens),
            supervised_factor=read_factor * guessed.supervised_tokens / max(1, sampled.supervised_tokens),
            trained_share=trained_share,
        )


class _Looked:
    """Records that were read, with their estimated tokens, and the samples of those that were encoded.

    Attributes:
        guessed: estimates of all records.
        sampled: estimates of the encoded records.
        samples: the encoded records; None without a tokenizer.
        num_bytes: bytes of the blocks.
    """

    def __init__(self, encoder: BlockEncoder | None, encoded_share: float) -> None:
        self.guessed, self.sampled = Tally(), Tally()
        self.samples = encoder.samples() if encoder else None
        self.num_bytes = 0
        self._samples_of: Counter[bytes] = Counter()
        self._tokens_of: Counter[bytes] = Counter()
        self._encoder, self._encoded_share = encoder, encoded_share
        self._read_bytes = self._encoded_bytes = 0

    def add(
        self, block: SourceBlock, corpus: Corpus, template: TemplateTokens, conversations: ConversationSettings
    ) -> None:
        """Read a block, and encode the given share of its records, evenly spread."""
        self.num_bytes += sum(len(piece.data) for piece in block.pieces)
        for record in read_records(block.pieces, corpus.reading):
            guess = Tally()
            estimate(record.content, guess, template, conversations)
            self.guessed.add(guess)
            num_tokens = guess.num_tokens
            is_due = self._encoded_share >= 1.0 or self._encoded_bytes <= self._encoded_share * self._read_bytes
            self._read_bytes += record.num_bytes
            if self._encoder and self.samples and is_due:
                before = self.samples.tally.num_tokens
                self._encoder.add(record, self.samples)
                num_tokens = self.samples.tally.num_tokens - before
                self.sampled.add(guess)
                self._encoded_bytes += record.num_bytes
            if not isinstance(record.content, Reject):
                key = content_hash(record.content)
                self._samples_of[key] = guess.num_samples
                self._tokens_of[key] += num_tokens

    def trained_share(self, held_out: float | None, factor: float) -> float:
        """Share of the tokens that a build does not hold out: by its own rule if all the data was read."""
        num_distinct = round(factor * self._samples_of.total())
        share = held_out_share(num_distinct) if held_out is None else held_out
        if factor > 1.0 or not self._tokens_of:
            return 1.0 - share
        smallest, largest = (int.from_bytes(key, "big") for key in (min(self._tokens_of), max(self._tokens_of)))
        limit = held_out_limit(share, smallest, largest)
        trained = sum(
            count for key, count in self._tokens_of.items() if int.from_bytes(key[: HASH_BYTES // 2], "big") > limit
        )
        return trained / max(1, self._tokens_of.total())


def _blocks(corpus: Corpus, sizes: list[int]) -> Iterator[SourceBlock]:
    """All of a small corpus, else blocks spread evenly over it; the beginning of a Hub dataset."""
    if isinstance(corpus, FileCorpus):
        is_small = sum(sizes) <= MOST_BYTES_READ
        yield from corpus.blocks() if is_small else spread_blocks(corpus, sizes, MOST_BYTES_READ)
        return
    num_bytes = 0
    for block in corpus.blocks():
        yield block
        num_bytes += sum(len(piece.data) for piece in block.pieces)
        if num_bytes >= MOST_BYTES_READ:
            return


def _records_by_footer(corpus: Corpus) -> int | None:
    """Number of records by the footers of Parquet files; None for other files."""
    if not isinstance(corpus, FileCorpus) or any(file_kind(file.path) != "parquet" for file in corpus.files):
        return None
    return sum(parquet_footer(file.path).num_rows for file in corpus.files)


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
