"""Blocks of raw rows -> token ids, in this process or in several; always in the order of the blocks.

Workers are fresh processes; for documents they import neither torch nor transformers, for conversations they load the
tokenizer with its template. Memory is bounded: a few blocks a worker are under way at any time, whatever the size of
the corpus. Imported by `build.py` and `partial.py`.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import numpy as np

from trivium.data.chat.formats import Conversation, parse
from trivium.data.chat.samples import ChatEncoder, LongRows
from trivium.data.source.blocks import Block, Position, Reading
from trivium.data.source.records import Piece, Reject, Row, RowError, parse_piece
from trivium.data.tokenizer import DocumentEncoder, Encoding, load_tokenizer
from trivium.errors import BadData, TriviumError

HASH_BYTES = 16
BLOCKS_A_WORKER = 3
FULL_WEIGHT = 100


@dataclass(frozen=True)
class ChatReading:
    """How conversations become samples; part of a store's name."""

    tokenizer_folder: str
    template_sha256: str
    seq_len: int
    overlong: LongRows
    all_tokens: bool
    """Every token carries loss, not the assistant's alone."""


class RejectedRow(NamedTuple):
    """A line of rejects.jsonl."""

    file: str
    line: int
    reason: str
    detail: str


@dataclass
class Tally:
    """What became of the rows that were read. A row is kept (one sample), split (several) or rejected (none)."""

    num_documents: int = 0
    """Samples: documents, and conversations or parts of them."""
    num_tokens: int = 0
    num_supervised_tokens: int = 0
    num_text_bytes: int = 0
    num_control_rows: int = 0
    """Rows in which a control token is written out: plain text in a document, taken at its word in a conversation."""
    num_conversations: int = 0
    num_reasoning_documents: int = 0
    """Samples in which an answer is reasoned."""
    num_split_rows: int = 0
    num_split_documents: int = 0
    """Samples that came from split rows."""
    num_dropped_turns: int = 0
    num_cut_turns: int = 0
    num_lost_reasoning_turns: int = 0
    """Learnt turns whose reasoning the template does not show."""
    rejected: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.rejected = Counter(self.rejected)  # a plain dict when read back from JSON

    def add(self, other: "Tally") -> None:
        """Count what another tally counted, too."""
        for name in (one.name for one in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    @property
    def num_rejected(self) -> int:
        """Rows that became no document."""
        return self.rejected.total()

    @property
    def num_kept(self) -> int:
        """Rows that became one sample."""
        return self.num_documents - self.num_split_documents

    @property
    def num_rows(self) -> int:
        """All rows: kept, split and rejected ones."""
        return self.num_kept + self.num_split_rows + self.num_rejected

    @property
    def reject_share(self) -> float:
        """Refused rows among all rows; 0 when there are none."""
        return self.num_rejected / self.num_rows if self.num_rows else 0.0


class EncodedBlock(NamedTuple):
    """The samples of a block as tokens, and the rows that are none."""

    after: Position
    tokens: np.ndarray
    """[sum(lengths)] uint16 or int32, all samples end to end."""
    weights: np.ndarray
    """[sum(lengths)] uint8, the loss weight of each token in hundredths."""
    lengths: np.ndarray
    """[samples] int32."""
    hashes: bytes
    """128-bit hash of each sample's row; samples of one row share the first half, which decides who is held out."""
    reasoning: np.ndarray
    """[samples] uint8, 1 where an answer is reasoned."""
    rejected: list[RejectedRow]
    num_raw_bytes: int
    tally: Tally


class BlockEncoder:
    """Parses and encodes one block after the other."""

    def __init__(self, encoding: Encoding, reading: Reading, chat: ChatReading | None) -> None:
        self._documents = DocumentEncoder(encoding)
        self._reading = reading
        self._chat: ChatEncoder | None = None
        if chat is not None:
            tokenizer = load_tokenizer(chat.tokenizer_folder)
            self._chat = ChatEncoder(tokenizer, chat.seq_len, chat.overlong, chat.all_tokens)

    def __call__(self, block: Block) -> EncodedBlock:
        samples = _Samples(self._documents.dtype)
        rejected: list[RejectedRow] = []
        for piece in block.pieces:
            documents: list[Row] = []
            for row in parse_piece(piece, self._reading.field, self._reading.max_row_bytes):
                try:
                    if isinstance(row, Reject):
                        raise RowError(row.reason, row.detail)
                    if row.record is None:
                        documents.append(row)
                    else:
                        self._add_record(row, piece, samples)
                except RowError as error:
                    rejected.append(RejectedRow(piece.file, row.line, error.reason.value, error.detail))
            self._add_documents(documents, samples)
        samples.tally.rejected.update(row.reason for row in rejected)
        num_raw_bytes = sum(len(piece.data) for piece in block.pieces)
        return samples.encoded(block.after, rejected, num_raw_bytes)

    def _add_documents(self, rows: list[Row], samples: "_Samples") -> None:
        for row, ids in zip(rows, self._documents.encode([row.text for row in rows]), strict=True):
            digest = hashlib.blake2b(row.utf8, digest_size=HASH_BYTES).digest()
            samples.add(ids, np.full(len(ids), FULL_WEIGHT, np.uint8), digest, is_reasoned=False)
            samples.tally.num_text_bytes += len(row.utf8)
            samples.tally.num_control_rows += self._documents.has_control_token(row.text)

    def _add_record(self, row: Row, piece: Piece, samples: "_Samples") -> None:
        """Raises: RowError, BadData when the template cannot be trusted."""
        assert row.record is not None and piece.layout is not None and self._chat is not None
        content = parse(row.record, piece.layout)
        if not isinstance(content, Conversation):
            self._add_documents([Row(row.line, content.text, content.text.encode())], samples)
            return
        try:
            encoded = self._chat.encode(content)
        except BadData as error:
            raise BadData(f"{piece.file}:{row.line}: {error}") from error
        digest = hashlib.blake2b(repr(content).encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest()
        tally, half = samples.tally, HASH_BYTES // 2
        for number, sample in enumerate(encoded.samples):
            number_mixed_in = int.from_bytes(digest[half:], "big") ^ number
            own_digest = digest[:half] + number_mixed_in.to_bytes(half, "big")
            samples.add(sample.ids, sample.weights, own_digest, sample.has_reasoning)
        if len(encoded.samples) > 1:
            tally.num_split_rows += 1
            tally.num_split_documents += len(encoded.samples)
        tally.num_conversations += 1
        tally.num_text_bytes += len(row.utf8)
        tally.num_control_rows += encoded.has_control_text
        tally.num_dropped_turns += encoded.dropped_turns
        tally.num_cut_turns += encoded.cut_turns
        tally.num_lost_reasoning_turns += encoded.lost_reasoning


class _Samples:
    """The samples of one block as they come."""

    def __init__(self, dtype: np.dtype) -> None:
        self.tally = Tally()
        self._dtype = dtype
        self._ids: list[np.ndarray] = [np.empty(0, dtype)]
        self._weights: list[np.ndarray] = [np.empty(0, np.uint8)]
        self._hashes: list[bytes] = []
        self._reasoning: list[bool] = []

    def add(self, ids: np.ndarray, weights: np.ndarray, digest: bytes, is_reasoned: bool) -> None:
        self._ids.append(ids.astype(self._dtype, copy=False))
        self._weights.append(weights)
        self._hashes.append(digest)
        self._reasoning.append(is_reasoned)
        self.tally.num_documents += 1
        self.tally.num_tokens += len(ids)
        self.tally.num_supervised_tokens += int(np.count_nonzero(weights[1:]))  # nothing predicts a first token
        self.tally.num_reasoning_documents += is_reasoned

    def encoded(self, after: Position, rejected: list[RejectedRow], num_raw_bytes: int) -> EncodedBlock:
        return EncodedBlock(
            after=after,
            tokens=np.concatenate(self._ids),
            weights=np.concatenate(self._weights),
            lengths=np.array([len(ids) for ids in self._ids[1:]], dtype=np.int32),
            hashes=b"".join(self._hashes),
            reasoning=np.array(self._reasoning, dtype=np.uint8),
            rejected=rejected,
            num_raw_bytes=num_raw_bytes,
            tally=self.tally,
        )


def encode_blocks(
    blocks: Iterator[Block], encoding: Encoding, reading: Reading, chat: ChatReading | None, workers: int
) -> Iterator[EncodedBlock]:
    """Encode with `workers` processes, or in this one for 1; what comes out does not depend on their number.

    Raises: TriviumError when a worker dies, BadData when a chat template cannot be trusted.
    """
    if workers == 1:
        yield from map(BlockEncoder(encoding, reading, chat), blocks)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(encoding, reading, chat)
    )
    pending: deque[Future[EncodedBlock]] = deque()
    try:
        for block in blocks:
            pending.append(pool.submit(_encode_block, block))
            if len(pending) > BLOCKS_A_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise TriviumError(
            "A tokenising worker died; most often the system killed it for want of memory. What is done so far is "
            "kept: run the same command again, with fewer workers if memory is short."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_encode: BlockEncoder


def _start_worker(encoding: Encoding, reading: Reading, chat: ChatReading | None) -> None:
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encode = BlockEncoder(encoding, reading, chat)


def _exit_with_parent() -> None:
    """A pool's worker would wait for work for ever when its parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_block(block: Block) -> EncodedBlock:
    return _encode(block)
