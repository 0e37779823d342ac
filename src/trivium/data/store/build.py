"""Build token stores from sources: in parallel, resumable, and cached.

A store's folder is named by the hash of everything its content depends on (files, how they are read, tokenizer,
held-out share), so the same inputs are never tokenized twice. Each source has its own store, so changing the mixture
needs no tokenization. Messages go to the caller's `Listener`.
"""

import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trivium.config.inputs import Data, Source
from trivium.data.chat.samples import ConversationSettings
from trivium.data.chat.template import describe_template
from trivium.data.columns import LOSS_WEIGHTS, REASONING, Column
from trivium.data.source.blocks import BLOCK_BYTES
from trivium.data.source.corpus import Corpus, FileHashes, open_corpus
from trivium.data.store.encode import ChatReading, encode_blocks
from trivium.data.store.megatron import Store, read_columns
from trivium.data.store.partial import REJECTS, Partial
from trivium.data.store.publish import publish
from trivium.data.store.tally import Tally
from trivium.data.tokenizer import Encoding, document_encoding, token_dtype
from trivium.errors import BadData, TriviumError, count_of
from trivium.files import FolderLock, full_disk_explained, require_free_space, sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

FORMAT = 3
KEY_DIGITS = 20
BLOCKS_WORTH_A_WORKER = 4
PROGRESS_EVERY_SECONDS = 10.0
EARLY_STOP_RECORDS = 10_000
EARLY_STOP_SHARE = 0.5
SMALL_VOCAB_SIZE = 1024
DEFAULTS = {name: info.default for name, info in Data.model_fields.items()}
DEFAULT_CONVERSATIONS = ConversationSettings(DEFAULTS["seq_len"])
CHAT_COLUMNS = (LOSS_WEIGHTS, REASONING)


class BuildProgress(NamedTuple):
    """Progress of the build of one source."""

    name: str
    num_bytes: int
    """Bytes read."""
    total_bytes: int | None
    """Estimated size of the source; None if unknown."""
    num_tokens: int
    num_rejected: int

    @property
    def figures(self) -> str:
        """The counts, formatted for users."""
        return f"{count_of(self.num_tokens, 'token')}, {count_of(self.num_rejected, 'record')} rejected"

    def __str__(self) -> str:
        share = f" of about {self.total_bytes / 2**20:,.0f}" if self.total_bytes else ""
        return f"{self.name}: {self.num_bytes / 2**20:,.0f}{share} MiB, {self.figures}"


class Listener:
    """Passes a build's messages to `note`, and its progress at most every ten seconds."""

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note
        self._last_progress = time.monotonic()

    def advance(self, progress: BuildProgress) -> None:
        """Called after every block."""
        if time.monotonic() - self._last_progress > PROGRESS_EVERY_SECONDS:
            self._last_progress = time.monotonic()
            self.note(str(progress))


SILENT = Listener(lambda _: None)


@dataclass(frozen=True)
class BuildSettings:
    """How stores are built.

    Attributes:
        cache_dir: folder of the stores.
        conversations: how conversations become samples.
        held_out: share of each source's documents kept out of training; 0 for none, None to choose it by their number.
        max_reject_share: largest allowed share of rejects among a source's records.
        max_document_mib: longer records are rejected.
        workers: processes that tokenize; None for one per core.
        block_bytes: raw bytes per unit of work; does not change the store.
    """

    cache_dir: Path
    conversations: ConversationSettings = DEFAULT_CONVERSATIONS
    held_out: float | None = None
    max_reject_share: float = DEFAULTS["max_reject_share"]
    max_document_mib: float = DEFAULTS["max_document_mib"]
    workers: int | None = None
    block_bytes: int = BLOCK_BYTES


@dataclass(frozen=True)
class BuiltStore:
    """A store on disk: built here, or an external Megatron store named in the run file."""

    name: str
    """The source, as the user named it."""
    path: Path
    """The store's folder, or the prefix of an external store."""
    manifest: dict[str, Any]
    """Content of manifest.json; empty for an external store."""
    report: dict[str, Any]
    """Content of report.json; empty for an external store."""

    def open(self) -> Store:
        """Open the training documents."""
        return Store(self.path)

    @property
    def has_conversations(self) -> bool:
        """Whether each sample must stay whole within one packed sequence."""
        return bool(self.report.get("conversations")) or LOSS_WEIGHTS in read_columns(self.path)

    def reasoning(self) -> np.ndarray | None:
        """Which training samples have reasoning in an answer, bool [documents]; None if not recorded."""
        store = self.open()
        return store.values(REASONING.name).astype(bool) if REASONING in store.columns else None

    def open_held_out(self) -> Store | None:
        """Open the held-out documents; None if there are none."""
        return Store(self.path / "held_out") if self.manifest.get("held_out_documents") else None

    def find_control_tokens(self, ids: Collection[int]) -> set[int]:
        """Which of the ids occur in the training documents; reads all tokens of an external store."""
        recorded = self.manifest.get("control_tokens")
        return set(self.open().found_among(list(ids)) if recorded is None else recorded) & set(ids)

    def verify(self) -> None:
        """Check every byte of a built store against its manifest; does nothing for an external store.

        Raises: BadData naming the first file that differs.
        """
        _check_hashes(self.path, self.manifest.get("sha256", {}), sha256_file)


def build_sources(
    sources: Sequence[Source],
    tokenizer: "PreTrainedTokenizerFast",
    settings: BuildSettings,
    listener: Listener = SILENT,
) -> list[BuiltStore]:
    """Return one store per source, building those that are not in `settings.cache_dir` yet.

    Raises: BadData when a source cannot be read or has too many rejects, ConfigError when it does not exist.
    """
    encoding = document_encoding(tokenizer)
    settings.cache_dir.mkdir(parents=True, exist_ok=True)
    built = []
    for source in sources:
        if source.store is not None:
            built.append(_external_store(Path(source.store).expanduser(), encoding, settings.cache_dir))
        else:
            corpus = open_corpus(source, settings.max_document_mib, settings.cache_dir)
            chat = chat_reading(corpus, tokenizer, settings.conversations)
            built.append(StoreJob(corpus, encoding, chat, settings, listener).run())
    return built


def chat_reading(
    corpus: Corpus, tokenizer: "PreTrainedTokenizerFast", conversations: ConversationSettings
) -> ChatReading | None:
    """How the conversations of a corpus become samples; None if it has no conversations.

    Raises: ConfigError or BadData when the tokenizer's chat template is not usable for training.
    """
    if not corpus.has_conversations:
        return None
    return ChatReading(tokenizer.name_or_path, describe_template(tokenizer).sha256, conversations)


@dataclass(frozen=True)
class StoreJob:
    """The build of one store; see `build_sources`."""

    corpus: Corpus
    encoding: Encoding
    chat: ChatReading | None
    settings: BuildSettings
    listener: Listener = SILENT

    def run(self) -> BuiltStore:
        """Find or build the store, and check it."""
        inputs = {
            "format": FORMAT,
            "source": self.corpus.identity(),
            "tokenizer_sha256": self.encoding.fingerprint,
            "vocab_size": self.encoding.vocab_size,
            "end_id": self.encoding.end_id,
            "held_out": self.settings.held_out,
        }
        if self.chat is not None:
            chat = asdict(self.chat)  # the tokenizer's content is in the key; its folder does not matter
            inputs["conversations"] = {key: value for key, value in chat.items() if key != "tokenizer_folder"}
        cache_dir = self.settings.cache_dir
        folder = made_once(
            cache_dir / f"store-{content_key(inputs)}", lambda folder: self._build(folder, inputs), self.listener.note
        )
        manifest = _checked_manifest(folder, cache_dir)
        report = json.loads((folder / "report.json").read_text())
        tally = Tally(
            num_samples=report["kept"] + report["split"], rejected_by_reason=Counter(report["rejected_by_reason"])
        )
        self._require_few_rejects(tally, folder)
        return BuiltStore(self.corpus.name, folder, manifest, report)

    def _build(self, folder: Path, inputs: dict[str, Any]) -> None:
        """Tokenize the records that are not in the partial store yet, then publish it as `folder`."""
        partial_folder = partial_of(folder)
        columns: tuple[Column, ...] = () if self.chat is None else CHAT_COLUMNS
        with (
            full_disk_explained(partial_folder, "Finished work is kept."),
            Partial(partial_folder, token_dtype(self.encoding.vocab_size), columns) as partial,
        ):
            self._encode_into(partial)
            try:
                self.corpus.require_unchanged()
            except BadData:
                shutil.rmtree(partial_folder)
                raise
            self._require_few_rejects(partial.tally, partial_folder)
            if not partial.tally.num_samples:
                raise BadData(
                    f"{self.corpus.name} has no documents. Expected at least one record with text; check that it is "
                    "the right file."
                )
            publish(partial, folder, self.settings.held_out, self.encoding.added_ids, inputs)

    def _encode_into(self, partial: Partial) -> None:
        settings, num_bytes = self.settings, self.corpus.num_bytes
        workers = settings.workers or os.cpu_count() or 1
        if num_bytes is not None:
            workers = max(1, min(workers, num_bytes // (BLOCKS_WORTH_A_WORKER * settings.block_bytes)))
            needed_bytes = _disk_bytes(num_bytes, self.encoding) - partial.num_bytes
            require_free_space(settings.cache_dir, needed_bytes, f"the token store of {self.corpus.name}")
        blocks = self.corpus.blocks(partial.position, settings.block_bytes)
        tally, hopeless_share = partial.tally, max(EARLY_STOP_SHARE, settings.max_reject_share)
        num_read = 0
        for block in encode_blocks(blocks, self.encoding, self.corpus.reading, self.chat, workers):
            partial.append(block)
            num_read += block.num_raw_bytes
            progress = BuildProgress(self.corpus.name, num_read, num_bytes, tally.num_tokens, tally.rejected)
            self.listener.advance(progress)
            if tally.records >= EARLY_STOP_RECORDS and tally.reject_share > hopeless_share:
                break
        partial.commit()

    def _require_few_rejects(self, tally: Tally, folder: Path) -> None:
        """Raises: BadData with the most common reasons and the file that lists every reject."""
        most = self.settings.max_reject_share
        if tally.reject_share <= most:
            return
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in tally.rejected_by_reason.most_common(3))
        raise BadData(
            f"{self.corpus.name}: {tally.rejected:,} of {count_of(tally.records, 'record')} cannot be used "
            f"({tally.reject_share:.1%}, expected at most {most:.1%}): {reasons}. {folder / REJECTS} lists each with "
            "file, line and reason. Correct the data, or raise data.max_reject_share."
        )


def content_key(inputs: dict[str, Any]) -> str:
    """Hash of the inputs that identifies a folder in the cache."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:KEY_DIGITS]


def partial_of(folder: Path) -> Path:
    """The folder with the unfinished content of `folder`."""
    return folder.with_name(f"{folder.name}.partial")


def made_once(folder: Path, make: Callable[[Path], None], note: Callable[[str], None]) -> Path:
    """Call `make(folder)` unless the folder exists, under a lock: other processes wait and reuse the result."""
    with FolderLock(folder.with_name(f"{folder.name}.lock")) as lock:
        try:
            lock.acquire(wait=False)
        except TriviumError:
            note(f"another process is building {folder.name}; waiting for it")
            lock.acquire(wait=True)
        if not folder.exists():
            make(folder)
        shutil.rmtree(partial_of(folder), ignore_errors=True)
    return folder


def _checked_manifest(folder: Path, cache_dir: Path) -> dict[str, Any]:
    """Read the manifest and check the store's files against it, hashing only files changed since the last check."""
    try:
        manifest = json.loads((folder / "manifest.json").read_bytes())
        expected = dict(manifest["sha256"])
    except (OSError, ValueError, KeyError) as error:
        raise BadData(
            f"{folder / 'manifest.json'} cannot be read ({type(error).__name__}). Expected the manifest of the build. "
            f"Delete {folder} and run the same command again; check the disk."
        ) from None
    hashes = FileHashes(cache_dir)
    _check_hashes(folder, expected, hashes.sha256)
    hashes.save()
    return manifest


def _check_hashes(folder: Path, expected_hashes: dict[str, str], sha256: Callable[[Path], str]) -> None:
    """Raises: BadData when a file is missing or damaged."""
    for name, expected in expected_hashes.items():
        found = sha256(folder / name) if (folder / name).is_file() else "missing"
        if found != expected:
            raise BadData(
                f"{folder / name}: its SHA-256 is {found[:12]}, but the manifest says {expected[:12]}, so it changed "
                f"after it was built. Delete {folder} and run the same command again; check the disk."
            )


def _external_store(prefix: Path, encoding: Encoding, cache_dir: Path) -> BuiltStore:
    """Open an external store and check that its tokens are in the vocabulary."""
    store = Store(prefix)
    hashes = FileHashes(cache_dir)
    largest = hashes.remembered(store.bin_path, "largest token", store.largest_token)
    hashes.save()
    if largest >= encoding.vocab_size:
        raise BadData(
            f"{prefix} contains token {largest:,}, but the tokenizer has only {encoding.vocab_size:,} tokens. Expected "
            "a store built with this tokenizer; set tokenizer to the store's, or rebuild the store from its text."
        )
    return BuiltStore(str(prefix), prefix, {}, {})


def _disk_bytes(num_bytes: int, encoding: Encoding) -> int:
    """Upper estimate of the disk space of a build, which stores tokens twice while it separates held-out documents."""
    bytes_per_token = 1 if encoding.vocab_size < SMALL_VOCAB_SIZE else 3
    return 2 * num_bytes * token_dtype(encoding.vocab_size).itemsize // bytes_per_token
