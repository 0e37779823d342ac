"""Corpora: the files or Hub dataset of a source, its identity for caching, and its blocks of records.

The identity of a corpus contains the SHA-256 of each file, or the revision of a Hub dataset.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from trivium.config.inputs import Source
from trivium.data.chat.layout import RecordLayout, detect, from_dataset_info
from trivium.data.source.blocks import (
    BLOCK_BYTES,
    START,
    Position,
    SourceBlock,
    SourceFile,
    file_kind,
    first_records,
    json_pieces,
    list_files,
    read_blocks,
    require_inside,
)
from trivium.data.source.records import Reading
from trivium.errors import BadData, ConfigError, TriviumError
from trivium.files import atomic_write, sha256_file

COMPRESSED_SUFFIXES = (".gz", ".zst", ".parquet")
USUAL_COMPRESSION = 4
FRESH_NANOSECONDS = 2_000_000_000
Result = TypeVar("Result")
LOOKED_AT_RECORDS = 20


def open_corpus(source: Source, max_document_mib: float, cache_dir: Path) -> "Corpus":
    """Find and hash the corpus of a source.

    Raises: ConfigError or BadData when it does not exist or cannot be read.
    """
    hashes = FileHashes(cache_dir)
    corpus = find_corpus(source, max_document_mib, hashes)
    hashes.save()
    return corpus


def find_corpus(source: Source, max_document_mib: float, hashes: "FileHashes") -> "Corpus":
    """Find the corpus of a source; pass `NoHashes` to read it without building a store.

    Raises: ConfigError or BadData when it does not exist or cannot be read.
    """
    reading = Reading(source.field, source.documents, int(max_document_mib * 2**20))
    layout = None
    if source.dataset is not None:
        source, layout = from_dataset_info(source)
    if source.path is not None:
        return FileCorpus.open(Path(source.path).expanduser(), source, layout, reading, hashes)
    return HubCorpus.open(source, layout, reading, hashes)


def find_layout(source: Source, records: list[dict[str, Any]], where: str) -> RecordLayout | None:
    """The layout given by the source or detected from its first records; None for plain text.

    Raises: BadData when it cannot be detected.
    """
    if source.format == "text" or not records:
        return None
    layout = RecordLayout(source.format, dict(source.fields), dict(source.roles), source.field)
    if source.format == "auto":
        layout = detect(records, layout, where)
    return None if layout.format == "text" else layout


class FileHashes:
    """SHA-256 of files, cached by path, size, inode and modification time.

    A file modified in the last two seconds is not cached, since another change could leave its time the same.
    """

    def __init__(self, cache_dir: Path) -> None:
        self.cache_dir = cache_dir.resolve()
        self._path = self.cache_dir / "file-hashes.json"
        self._known: dict[str, list[Any]] = {}
        if self._path.exists():
            try:
                self._known = json.loads(self._path.read_text())
            except ValueError:
                self._path.unlink()
        self._changed = False

    def sha256(self, path: Path) -> str:
        """Raises: BadData when the file cannot be read."""
        return self.remembered(path, "", lambda: sha256_file(path))

    def remembered(self, path: Path, what: str, compute: Callable[[], Result]) -> Result:
        """Cache a JSON value that `compute` reads from a file, until the file changes.

        Raises: BadData when the file cannot be read.
        """
        key = f"{path.resolve()} {what}".rstrip()
        before = stamp(path)
        known = self._known.get(key)
        if known is not None and known[0] == before:
            return known[1]
        try:
            found = compute()
        except OSError as error:
            raise BadData(
                f"{path} cannot be read ({error.strerror}). Grant read permission, or remove the file."
            ) from error
        if time.time_ns() - path.stat().st_mtime_ns > FRESH_NANOSECONDS:
            self._known[key] = [before, found]
            self._changed = True
        return found

    def save(self) -> None:
        """Write the cache to disk."""
        if self._changed:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self._path, json.dumps(self._known, indent=0, sort_keys=True))


class NoHashes(FileHashes):
    """Computes no hashes, for reading without building."""

    def __init__(self, cache_dir: Path = Path(os.devnull)) -> None:
        super().__init__(cache_dir)

    def sha256(self, path: Path) -> str:
        return ""


def stamp(path: Path) -> str:
    """Size, inode and modification time, to detect changes of a file."""
    status = path.stat()
    return f"{status.st_size} {status.st_ino} {status.st_mtime_ns}"


@dataclass(frozen=True)
class FileCorpus:
    """A file or a folder of files."""

    name: str
    reading: Reading
    files: list[SourceFile]
    hashes: list[str]
    stamps: list[str]

    @classmethod
    def open(
        cls, root: Path, source: Source, layout: RecordLayout | None, reading: Reading, hashes: FileHashes
    ) -> "FileCorpus":
        """List and hash the files below `root`, except a cache folder, and find their layouts."""
        files = list_files(root)
        if root.resolve() in hashes.cache_dir.parents:
            files = [file for file in files if not file.path.resolve().is_relative_to(hashes.cache_dir)]
        if source.format != "text":
            files = [_with_layout(file, source, layout, reading) for file in files]
        stamps = [stamp(file.path) for file in files]
        return cls(str(root), reading, files, [hashes.sha256(file.path) for file in files], stamps)

    @property
    def num_bytes(self) -> int:
        """Estimated uncompressed bytes; compressed files count four times their size."""
        return sum(
            file.path.stat().st_size * (USUAL_COMPRESSION if file.path.suffix in COMPRESSED_SUFFIXES else 1)
            for file in self.files
        )

    @property
    def has_conversations(self) -> bool:
        """Whether any file contains conversations."""
        return any(file.layout is not None for file in self.files)

    def identity(self) -> dict[str, Any]:
        """Everything the content depends on: names, hashes and layouts in reading order, and how they are read."""
        named = [
            [file.name, digest, *([] if file.layout is None else [asdict(file.layout)])]
            for file, digest in zip(self.files, self.hashes, strict=True)
        ]
        return {"files": named, "reading": asdict(self.reading)}

    def blocks(self, start: Position = START, block_bytes: int = BLOCK_BYTES) -> Iterator[SourceBlock]:
        """Yield the records from `start` on."""
        return read_blocks(self.files, self.reading, start, block_bytes)

    def require_unchanged(self) -> None:
        """Raises: BadData when a file changed since it was hashed."""
        for file, before in zip(self.files, self.stamps, strict=True):
            if not file.path.exists() or stamp(file.path) != before:
                raise BadData(
                    f"{file.path} changed while it was being read, so no store was built. Run the same command again "
                    "when no other program is writing to the file."
                )


def _with_layout(file: SourceFile, source: Source, layout: RecordLayout | None, reading: Reading) -> SourceFile:
    if file_kind(file.path) == "text":
        return file
    known = layout or find_layout(source, first_records(file, reading, LOOKED_AT_RECORDS), str(file.path))
    return file._replace(layout=known)


@dataclass(frozen=True)
class HubCorpus:
    """A streamed Hub dataset; `identifier` is its id, or a folder that `datasets` can load."""

    identifier: str
    subset: str | None
    split: str
    revision: str
    """Commit of the data set, or the hashes of the folder's files."""
    reading: Reading
    layout: RecordLayout | None = None

    @classmethod
    def open(cls, source: Source, layout: RecordLayout | None, reading: Reading, hashes: FileHashes) -> "HubCorpus":
        """Look up the revision, and the layout from the first records."""
        assert source.hub is not None
        if Path(source.hub).is_dir():
            files = sorted(path for path in Path(source.hub).rglob("*") if path.is_file())
            for path in files:
                require_inside(path, Path(source.hub))
            revision = json.dumps([[path.relative_to(source.hub).as_posix(), hashes.sha256(path)] for path in files])
        else:
            revision = _hub_commit(source.hub, source.revision)
        corpus = cls(source.hub, source.subset, source.split, revision, reading)
        if layout is None and source.format != "text":
            with corpus._errors_explained():
                records = list(islice(corpus._records(), LOOKED_AT_RECORDS))
            layout = find_layout(source, records, corpus.name)
        return replace(corpus, layout=layout)

    @property
    def name(self) -> str:
        """Id, subset and split."""
        return " ".join(filter(None, (self.identifier, self.subset, self.split)))

    @property
    def num_bytes(self) -> None:
        """Unknown."""
        return None

    def identity(self) -> dict[str, Any]:
        """Everything the content depends on: the data set, its revision, and how it is read."""
        return {
            "hub": None if Path(self.identifier).is_dir() else self.identifier,
            "subset": self.subset,
            "split": self.split,
            "revision": self.revision,
            "reading": asdict(self.reading),
            "layout": None if self.layout is None else asdict(self.layout),
        }

    @property
    def has_conversations(self) -> bool:
        """Whether the records are conversations."""
        return self.layout is not None

    def blocks(self, start: Position = START, block_bytes: int = BLOCK_BYTES) -> Iterator[SourceBlock]:
        """Yield the records from `start` on; line numbers are record numbers."""
        field = self.reading.field if self.layout is None else None
        with self._errors_explained():
            records = iter(self._records().skip(start.offset))
            for piece, after in json_pieces(records, self.name, self.layout, field, start, block_bytes):
                yield SourceBlock((piece,), after)

    def _records(self) -> Any:
        import datasets

        return datasets.load_dataset(
            self.identifier,
            name=self.subset,
            split=self.split,
            revision=None if Path(self.identifier).is_dir() else self.revision,
            streaming=True,
        )

    @contextmanager
    def _errors_explained(self) -> Iterator[None]:
        try:
            yield
        except (GeneratorExit, TriviumError):
            raise
        except Exception as error:  # `datasets` passes on any error of its readers and of the network
            message = " ".join(str(error).split())[:300]
            raise BadData(
                f"{self.name}: `datasets` cannot read it ({type(error).__name__}: {message}). Check its id, `subset` "
                "and `split`."
            ) from error

    def require_unchanged(self) -> None:
        """Does nothing: a revision never changes."""


Corpus = FileCorpus | HubCorpus


def _hub_commit(identifier: str, revision: str | None) -> str:
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    try:
        commit = HfApi().dataset_info(identifier, revision=revision).sha
    except (HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, OSError) as error:
        raise ConfigError(
            f"Hub dataset {identifier}: the revision cannot be looked up ({type(error).__name__}). Check the id and "
            "the network, or set `revision` to the 40 hex digits of a commit."
        ) from error
    assert commit is not None
    return commit
