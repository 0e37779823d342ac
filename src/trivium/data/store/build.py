"""Sources -> token stores, and a tokenizer trained on them: in parallel, restartable, each thing made only once.

A store's folder is named by the hash of all that decides its content (files, how they are read, tokenizer, held-out
share), so the same inputs are never tokenised twice. One store a source: mixing weights can change without any work.
Does not decide the order or the mixture of documents. Imported by `engine`, `quickstart` and `cli`.
"""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers

from trivium.config.run import Data, Source
from trivium.data.chat.formats import Document, content_of
from trivium.data.chat.samples import LongRows, describe_template
from trivium.data.progress import BuildProgress
from trivium.data.source.blocks import BLOCK_BYTES, Block, Reading
from trivium.data.source.corpus import Corpus, open_corpus
from trivium.data.source.records import RowError, parse_piece
from trivium.data.store.encode import ChatReading, Tally, encode_blocks
from trivium.data.store.megatron import Store, has_mask
from trivium.data.store.partial import REJECTS, Partial
from trivium.data.store.publish import REASONING_FILE, publish
from trivium.data.tokenizer import Encoding, TokenizerKind, document_encoding, token_dtype, train_tokenizer
from trivium.errors import BadData, ConfigError, TriviumError
from trivium.files import FolderLock, fsync_directory, require_free_space, sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 2
KEY_DIGITS = 20
BLOCKS_WORTH_A_WORKER = 4
EARLY_STOP_ROWS = 10_000
EARLY_STOP_SHARE = 0.5
SMALL_VOCAB_SIZE = 1024
SAMPLE_BYTES = 64 << 20


@dataclass(frozen=True)
class BuiltStore:
    """A store that is ready to be read."""

    name: str
    """The source, as the user named it."""
    path: Path
    """The store's folder, or the prefix of a ready Megatron store."""
    manifest: dict[str, Any]
    """What manifest.json says; empty for a ready store."""
    report: dict[str, Any]
    """What report.json says; empty for a ready store."""

    def open(self) -> Store:
        """The documents to train on."""
        return Store(self.path)

    @property
    def has_conversations(self) -> bool:
        """Whether its samples must stay whole, each in one row."""
        return bool(self.report.get("conversations")) or has_mask(self.path)

    def reasoning(self) -> np.ndarray | None:
        """Which training samples have a reasoned answer, bool [documents]; None when none has."""
        path = self.path / REASONING_FILE
        return np.load(path, allow_pickle=False) if path.is_file() else None

    def open_held_out(self) -> Store | None:
        """The documents kept out of training, None when there are none."""
        return Store(self.path / "held_out") if self.manifest.get("held_out_documents") else None


@dataclass(frozen=True)
class ConversationSettings:
    """What becomes of conversations; documents do not ask."""

    seq_len: int = Data.model_fields["seq_len"].default
    """Tokens of the longest sample."""
    overlong: LongRows = "drop"
    """What becomes of longer ones; see `config.Data.overlong`."""
    all_tokens: bool = False
    """Every token carries loss, not the assistant's alone."""


def build_sources(
    sources: Sequence[Source],
    tokenizer: "PreTrainedTokenizerFast",
    *,
    held_out: float,
    max_reject_share: float,
    max_document_mib: float,
    cache_dir: Path,
    conversations: ConversationSettings = ConversationSettings(),
    workers: int | None = None,
    block_bytes: int = BLOCK_BYTES,
) -> list[BuiltStore]:
    """Give one store a source, building those that are not in `cache_dir` yet.

    Args:
        sources: files, folders, Hub data sets or ready stores.
        tokenizer: a loaded Hugging Face tokenizer.
        conversations: what becomes of conversations.
        held_out: share of each source's documents kept out of training; 0 for none.
        max_reject_share: largest share of a source's rows that may be unusable.
        max_document_mib: a longer row is refused.
        cache_dir: where stores are kept.
        workers: processes that tokenise; None for one a core.
        block_bytes: raw bytes a worker takes at a time; changes nothing in the store.

    Raises: BadData when a source cannot be read or too many of its rows are unusable, ConfigError when it is not there.
    """
    encoding = document_encoding(tokenizer)
    cache_dir.mkdir(parents=True, exist_ok=True)
    built = []
    for source in sources:
        if source.store is not None:
            built.append(_ready_store(Path(source.store).expanduser(), encoding))
        else:
            corpus = open_corpus(source, max_document_mib, cache_dir)
            job = StoreJob(
                corpus=corpus,
                encoding=encoding,
                chat=chat_reading(corpus, tokenizer, conversations),
                held_out=held_out,
                max_reject_share=max_reject_share,
                cache_dir=cache_dir,
                workers=workers or os.cpu_count() or 1,
                block_bytes=block_bytes,
            )
            built.append(job.run())
    return built


def chat_reading(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerFast", conversations: ConversationSettings
) -> ChatReading | None:
    """How the conversations of a corpus become samples; None where it has none.

    Raises: ConfigError or BadData when the tokenizer's chat template is of no use.
    """
    if not corpus.has_conversations:
        return None
    return ChatReading(tokenizer.name_or_path, describe_template(tokenizer).sha256, **asdict(conversations))


@dataclass(frozen=True)
class StoreJob:
    """The making of one store; see `build_sources` for the fields."""

    corpus: Corpus
    encoding: Encoding
    chat: ChatReading | None
    held_out: float
    max_reject_share: float
    cache_dir: Path
    workers: int
    block_bytes: int

    def run(self) -> BuiltStore:
        """Find the store or build it, and check it."""
        inputs = {
            "format": FORMAT,
            "source": self.corpus.identity(),
            "tokenizer_sha256": self.encoding.fingerprint,
            "vocab_size": self.encoding.vocab_size,
            "end_id": self.encoding.end_id,
            "held_out": self.held_out,
        }
        if self.chat is not None:
            chat = asdict(self.chat)  # the tokenizer's content is in the key already, wherever it lies
            inputs["conversations"] = {key: value for key, value in chat.items() if key != "tokenizer_folder"}
        folder = made_once(self.cache_dir / f"store-{content_key(inputs)}", lambda folder: self._build(folder, inputs))
        manifest = _verified_manifest(folder)
        report = json.loads((folder / "report.json").read_text())
        tally = Tally(num_documents=report["kept"] + report["split"], rejected=Counter(report["rejected_by_reason"]))
        self._require_few_rejects(tally, folder)
        return BuiltStore(self.corpus.name, folder, manifest, report)

    def _build(self, folder: Path, inputs: dict[str, Any]) -> None:
        """Tokenise all that the partial store does not hold yet, then publish it as `folder`."""
        partial_folder = partial_of(folder)
        with Partial(partial_folder, token_dtype(self.encoding.vocab_size), self.chat is not None) as partial:
            with _disk_full_explained(partial_folder):
                self._encode_into(partial)
            try:
                self.corpus.require_unchanged()
            except BadData:
                shutil.rmtree(partial_folder)
                raise
            self._require_few_rejects(partial.tally, partial_folder)
            if not partial.tally.num_documents:
                raise BadData(
                    f"{self.corpus.name}: holds no document. Expected at least one row with text; is it the right file?"
                )
            with _disk_full_explained(partial_folder):
                publish(partial, folder, self.held_out, inputs)

    def _encode_into(self, partial: Partial) -> None:
        workers, num_bytes = self.workers, self.corpus.num_bytes
        if num_bytes is not None:
            workers = max(1, min(workers, num_bytes // (BLOCKS_WORTH_A_WORKER * self.block_bytes)))
            needed_bytes = _disk_bytes(num_bytes, self.encoding) - partial.num_bytes
            require_free_space(self.cache_dir, needed_bytes, f"the token store of {self.corpus.name}")
        blocks = self.corpus.blocks(partial.position, self.block_bytes)
        tally, hopeless_share = partial.tally, max(EARLY_STOP_SHARE, self.max_reject_share)
        with BuildProgress(self.corpus.name, num_bytes) as progress:
            for block in encode_blocks(blocks, self.encoding, self.corpus.reading, self.chat, workers):
                partial.append(block)
                progress.advance(block.num_raw_bytes, tally.num_tokens, tally.num_rejected)
                if tally.num_rows >= EARLY_STOP_ROWS and tally.reject_share > hopeless_share:
                    break
            partial.commit()

    def _require_few_rejects(self, tally: Tally, folder: Path) -> None:
        """Raises: BadData that names the commonest reasons and where every refused row is listed."""
        if tally.reject_share <= self.max_reject_share:
            return
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in tally.rejected.most_common(3))
        raise BadData(
            f"{self.corpus.name}: {tally.num_rejected:,} of {tally.num_rows:,} rows cannot be used "
            f"({tally.reject_share:.1%}; at most {self.max_reject_share:.1%} may): {reasons}. Each is listed with "
            f"file, line and reason in {folder / REJECTS}. Mend the data, or allow more with max_reject_share."
        )


def content_key(inputs: dict[str, Any]) -> str:
    """The part of a folder's name that says what it was made from."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]


def partial_of(folder: Path) -> Path:
    """Where a folder grows until it is whole."""
    return folder.with_name(f"{folder.name}.partial")


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Call `make(folder)` unless it is there; of several processes one makes it, the others wait and find it."""
    with FolderLock(folder.with_name(f"{folder.name}.lock")) as lock:
        try:
            lock.acquire(wait=False)
        except TriviumError:
            print(f"{folder.name} is being made by another process; waiting for it", file=sys.stderr, flush=True)
            lock.acquire(wait=True)
        if not folder.exists():
            make(folder)
        shutil.rmtree(partial_of(folder), ignore_errors=True)
    return folder


def _verified_manifest(folder: Path) -> dict[str, Any]:
    """Read every byte of a store against its manifest: a disk that lost or bent some would train on noise, silently."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        expected_hashes = dict(manifest["sha256"])
    except (OSError, ValueError, KeyError) as error:
        raise BadData(
            f"{folder / 'manifest.json'}: cannot be read ({type(error).__name__}), so nothing vouches for the store. "
            f"Delete {folder} and run the same command again; look at the disk."
        ) from None
    for name, expected in expected_hashes.items():
        found = sha256_file(folder / name) if (folder / name).is_file() else "missing"
        if found != expected:
            raise BadData(
                f"{folder / name}: its SHA-256 is {found[:12]}, the manifest says {expected[:12]}: it is not what was "
                f"built. Delete {folder} and run the same command again; look at the disk."
            )
    return manifest


def _ready_store(prefix: Path, encoding: Encoding) -> BuiltStore:
    """A store made elsewhere, once its tokens are known to have a place in the vocabulary."""
    store = Store(prefix)
    largest = store.largest_token()
    if largest >= encoding.vocab_size:
        raise BadData(
            f"{prefix}: holds token {largest:,}, and the tokenizer has {encoding.vocab_size:,}. "
            "It was made with another tokenizer; name that one, or build the store again from its text."
        )
    return BuiltStore(str(prefix), prefix, {}, {})


def _disk_bytes(num_bytes: int, encoding: Encoding) -> int:
    """Disk that a build needs at most, usually: the tokens are there twice while the held-out documents are parted."""
    bytes_per_token = 1 if encoding.vocab_size < SMALL_VOCAB_SIZE else 3
    return 2 * num_bytes * token_dtype(encoding.vocab_size).itemsize // bytes_per_token


@contextmanager
def _disk_full_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise TriviumError(
            f"Disk full while writing {folder}. What is done is kept; free some space and run the same command again."
        ) from error


def train_tokenizer_from_sources(
    sources: Sequence[Source],
    *,
    kind: TokenizerKind,
    vocab_size: int,
    cache_dir: Path,
    max_document_mib: float,
    max_sample_bytes: int = SAMPLE_BYTES,
) -> Path:
    """Train a tokenizer on the sources' documents, unless the same one is in `cache_dir` already; give its folder.

    Of more than `max_sample_bytes` of raw rows it reads that many, in blocks spread evenly over all sources: always the
    same ones. Documents that will be held out are not left out, since a vocabulary tells nothing of one of them.

    Raises: ConfigError when a source has no text or `vocab_size` is too small, BadData when no row can be used.
    """
    for source in sources:
        if source.store is not None:
            raise ConfigError(
                f"{source.store}: a store holds tokens, not text, to train a tokenizer on. Name one by its path."
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
        partial = partial_of(folder)
        shutil.rmtree(partial, ignore_errors=True)
        train_tokenizer(sample_texts(corpora, max_sample_bytes), kind, vocab_size, partial)
        for corpus in corpora:
            corpus.require_unchanged()
        os.rename(partial, folder)
        fsync_directory(cache_dir)

    return made_once(cache_dir / f"tokenizer-{content_key(inputs)}", make)


def sample_texts(corpora: Sequence[Corpus], max_bytes: int) -> Iterator[str]:
    """Texts from blocks spread evenly over the corpora, about `max_bytes` of raw rows in all; a pure function of both.

    A corpus of unknown size gives its first blocks, as many as its equal part allows.
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
                for text in _texts(block, corpus.reading):
                    num_texts += 1
                    yield text
            num_read += num_raw_bytes
            if corpus.num_bytes is None and num_taken >= allowance * share:
                break
    if not num_texts:
        names = ", ".join(corpus.name for corpus in corpora)
        raise BadData(
            f"{names}: not one row holds text, so no tokenizer can be trained. See why with: trivium data inspect"
        )


def _texts(block: Block, reading: Reading) -> Iterator[str]:
    """The documents of a block, and all that is said in its conversations."""
    for piece in block.pieces:
        for row in parse_piece(piece, reading.field, reading.max_row_bytes):
            with suppress(RowError):
                content = content_of(row, piece.layout)
                yield from [content.text] if isinstance(content, Document) else (turn.content for turn in content.turns)
