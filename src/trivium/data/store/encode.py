"""Encoding: blocks of raw records become token ids, in one or several processes, in the order of the blocks.

Workers are spawned processes; they import transformers only if there are conversations to render. Memory is bounded,
since at most a few blocks per worker are in progress.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from types import ModuleType
from typing import NamedTuple

import numpy as np

from trivium.data.chat.formats import Conversation, Document
from trivium.data.chat.samples import ChatEncoder, ConversationSettings
from trivium.data.columns import FULL_WEIGHT, LOSS_WEIGHTS, REASONING
from trivium.data.rejects import RecordError, Reject
from trivium.data.source.blocks import Position, SourceBlock
from trivium.data.source.records import DataRecord, Reading, read_records
from trivium.data.store.tally import Tally
from trivium.data.tokenizer import DocumentEncoder, Encoding, load_tokenizer, token_dtype
from trivium.errors import BadData, TriviumError

HASH_BYTES = 16
BLOCKS_A_WORKER = 3


@dataclass(frozen=True)
class ChatReading:
    """How conversations become samples; part of the hash in a store's name."""

    tokenizer_folder: str
    template_sha256: str
    settings: ConversationSettings


class EncodedBlock(NamedTuple):
    """The samples and rejects of a block."""

    after: Position
    tokens: np.ndarray
    """[sum(lengths)] uint16 or int32, all samples concatenated."""
    lengths: np.ndarray
    """[samples] int32."""
    columns: dict[str, np.ndarray]
    """LOSS_WEIGHTS [sum(lengths)] and REASONING [samples]."""
    hashes: bytes
    """128 bits per sample; samples of one record share the high half, which decides what is held out."""
    rejects: list[Reject]
    num_raw_bytes: int
    tally: Tally


def content_hash(content: Document | Conversation) -> bytes:
    """128 bits that stand for a record; its high half decides whether it is held out."""
    text = content.text if isinstance(content, Document) else repr(content)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES).digest()


class BlockEncoder:
    """Parses and encodes blocks."""

    def __init__(self, encoding: Encoding, reading: Reading, chat: ChatEncoder | None) -> None:
        self._encoding = encoding
        self._reading = reading
        self._chat = chat

    @cached_property
    def _documents(self) -> DocumentEncoder:
        """Made for the first document, because it takes half a second."""
        return DocumentEncoder(self._encoding)

    def __call__(self, block: SourceBlock) -> EncodedBlock:
        samples = self.samples()
        rejects = [one for record in read_records(block.pieces, self._reading) if (one := self.add(record, samples))]
        num_raw_bytes = sum(len(piece.data) for piece in block.pieces)
        return samples.encoded(block.after, rejects, num_raw_bytes)

    def samples(self) -> "BlockSamples":
        """An empty collection for `add`."""
        return BlockSamples(token_dtype(self._encoding.vocab_size))

    def add(self, record: DataRecord, samples: "BlockSamples") -> Reject | None:
        """Encode one record; returns why if it cannot be used.

        Raises: BadData when the chat template is not usable for training.
        """
        content, reject = record.content, None
        if isinstance(content, Document):
            self._add_document(content, record, samples)
        elif isinstance(content, Conversation):
            try:
                self._add_conversation(content, record, samples)
            except RecordError as error:
                reject = Reject.of(error, record.file, record.line)
        else:
            reject = content
        if reject:
            samples.tally.rejected_by_reason[reject.reason] += 1
        return reject

    def _add_document(self, document: Document, record: DataRecord, samples: "BlockSamples") -> None:
        ids = self._documents.encode(document.text)
        weights = np.full(len(ids), FULL_WEIGHT, np.uint8)
        samples.add(ids, weights, content_hash(document), has_reasoning=False)
        samples.tally.text_bytes += record.num_bytes
        samples.tally.control_token_records += self._documents.has_control_token(document.text)

    def _add_conversation(self, conversation: Conversation, record: DataRecord, samples: "BlockSamples") -> None:
        """Raises: RecordError; BadData when the chat template is not usable for training."""
        assert self._chat is not None
        try:
            encoded = self._chat.encode(conversation)
        except BadData as error:
            raise BadData(f"{record.file}:{record.line}: {error}") from error
        digest, tally, half = content_hash(conversation), samples.tally, HASH_BYTES // 2
        for number, sample in enumerate(encoded.samples):
            low_half = int.from_bytes(digest[half:], "big") ^ number
            sample_digest = digest[:half] + low_half.to_bytes(half, "big")
            samples.add(sample.ids, sample.weights, sample_digest, sample.has_reasoning)
        if len(encoded.samples) > 1:
            tally.split += 1
            tally.num_split_samples += len(encoded.samples)
        tally.conversations += 1
        tally.text_bytes += record.num_bytes
        tally.control_token_records += encoded.has_control_text
        tally.dropped_turns += encoded.dropped_turns
        tally.cut_turns += encoded.cut_turns
        tally.lost_reasoning_turns += encoded.lost_reasoning_turns


class BlockSamples:
    """Collects samples, for example of one block."""

    def __init__(self, dtype: np.dtype) -> None:
        self.tally = Tally()
        self._dtype = dtype
        self._ids: list[np.ndarray] = [np.empty(0, dtype)]
        self._weights: list[np.ndarray] = [np.empty(0, LOSS_WEIGHTS.dtype)]
        self._reasoning: list[bool] = []
        self._hashes: list[bytes] = []

    def add(self, ids: np.ndarray, weights: np.ndarray, digest: bytes, has_reasoning: bool) -> None:
        self._ids.append(ids.astype(self._dtype, copy=False))
        self._weights.append(weights)
        self._reasoning.append(has_reasoning)
        self._hashes.append(digest)
        self.tally.num_samples += 1
        self.tally.num_tokens += len(ids)
        self.tally.supervised_tokens += int(np.count_nonzero(weights[1:]))  # the first token is never predicted
        self.tally.reasoning_documents += has_reasoning

    def encoded(self, after: Position, rejects: list[Reject], num_raw_bytes: int) -> EncodedBlock:
        return EncodedBlock(
            after=after,
            tokens=np.concatenate(self._ids),
            lengths=np.array([len(ids) for ids in self._ids[1:]], dtype=np.int32),
            columns={
                LOSS_WEIGHTS.name: np.concatenate(self._weights),
                REASONING.name: np.array(self._reasoning, dtype=REASONING.dtype),
            },
            hashes=b"".join(self._hashes),
            rejects=rejects,
            num_raw_bytes=num_raw_bytes,
            tally=self.tally,
        )


def encode_blocks(
    blocks: Iterator[SourceBlock], encoding: Encoding, reading: Reading, chat: ChatReading | None, workers: int
) -> Iterator[EncodedBlock]:
    """Encode with `workers` processes, or in this one for 1; the result does not depend on their number.

    Raises: TriviumError when a worker dies, BadData when the chat template is not usable for training.
    """
    if workers == 1:
        yield from map(_block_encoder(encoding, reading, chat), blocks)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(encoding, reading, chat)
    )
    pending: deque[Future[EncodedBlock]] = deque()
    try:
        for block in blocks:
            with without_main():
                pending.append(pool.submit(_encode_block, block))
            if len(pending) > BLOCKS_A_WORKER * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise TriviumError(
            "A tokenizer process died, most likely killed because memory ran out. Finished work is kept; run the same "
            "command again, with data.workers=1 (or --workers 1) if memory is short."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def without_main() -> Iterator[None]:
    """Hide the program's main module while a worker starts.

    A new worker would run a script's file again, and with it the call of `trivium.train` that needs the worker.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _block_encoder(encoding: Encoding, reading: Reading, chat: ChatReading | None) -> BlockEncoder:
    chats = ChatEncoder(load_tokenizer(chat.tokenizer_folder), **asdict(chat.settings)) if chat else None
    return BlockEncoder(encoding, reading, chats)


_encode: BlockEncoder


def _start_worker(encoding: Encoding, reading: Reading, chat: ChatReading | None) -> None:
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker process
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encode = _block_encoder(encoding, reading, chat)


def _exit_with_parent() -> None:
    """Exit when the parent is killed; a pool's worker would otherwise wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_block(block: SourceBlock) -> EncodedBlock:
    return _encode(block)
