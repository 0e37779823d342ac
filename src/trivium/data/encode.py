"""Blocks of raw rows -> token ids, in this process or in several; always in the order of the blocks.

Workers are fresh processes that import neither torch nor transformers. Memory is bounded: a few blocks a worker are
under way at any time, whatever the size of the corpus. Imported by `build.py` and `partial.py`.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import numpy as np

from trivium.data.blocks import Block, Position, Reading
from trivium.data.rows import Reject, Row, parse_piece
from trivium.data.tokenizer import DocumentEncoder, Encoding
from trivium.errors import TriviumError

HASH_BYTES = 16
BLOCKS_A_WORKER = 3


class RejectedRow(NamedTuple):
    """A line of rejects.jsonl."""

    file: str
    line: int
    reason: str
    detail: str


class EncodedBlock(NamedTuple):
    """The documents of a block as tokens, and the rows that are none."""

    after: Position
    tokens: np.ndarray
    """[sum(lengths)] uint16 or int32, all documents end to end."""
    lengths: np.ndarray
    """[documents] int32."""
    hashes: bytes
    """128-bit hash of each document's text."""
    rejected: list[RejectedRow]
    num_raw_bytes: int
    num_text_bytes: int
    num_control_rows: int
    """Documents in which a control token is written out (and was encoded as plain text)."""


class BlockEncoder:
    """Parses and encodes one block after the other."""

    def __init__(self, encoding: Encoding, reading: Reading) -> None:
        self._encoder = DocumentEncoder(encoding)
        self._reading = reading

    def __call__(self, block: Block) -> EncodedBlock:
        rows: list[Row] = []
        rejected: list[RejectedRow] = []
        for piece in block.pieces:
            for row in parse_piece(piece, self._reading.field, self._reading.max_row_bytes):
                if isinstance(row, Reject):
                    rejected.append(RejectedRow(piece.file, row.line, row.reason.value, row.detail))
                else:
                    rows.append(row)
        documents = self._encoder.encode([row.text for row in rows])
        return EncodedBlock(
            after=block.after,
            tokens=np.concatenate(documents) if documents else np.empty(0, self._encoder.dtype),
            lengths=np.array([len(document) for document in documents], dtype=np.int32),
            hashes=b"".join(hashlib.blake2b(row.utf8, digest_size=HASH_BYTES).digest() for row in rows),
            rejected=rejected,
            num_raw_bytes=sum(len(piece.data) for piece in block.pieces),
            num_text_bytes=sum(len(row.utf8) for row in rows),
            num_control_rows=sum(self._encoder.has_control_token(row.text) for row in rows),
        )


def encode_blocks(
    blocks: Iterator[Block], encoding: Encoding, reading: Reading, workers: int
) -> Iterator[EncodedBlock]:
    """Encode with `workers` processes, or in this one for 1; what comes out does not depend on their number.

    Raises: TriviumError when a worker dies.
    """
    if workers == 1:
        yield from map(BlockEncoder(encoding, reading), blocks)
        return
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(encoding, reading)
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


def _start_worker(encoding: Encoding, reading: Reading) -> None:
    global _encode
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _encode = BlockEncoder(encoding, reading)


def _exit_with_parent() -> None:
    """A pool's worker would wait for work for ever when its parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_block(block: Block) -> EncodedBlock:
    return _encode(block)
