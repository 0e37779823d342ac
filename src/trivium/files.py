"""Crash-safe files: atomic writes, hashes, locks, free-space checks, streamed safetensors. Never imports torch."""

import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from trivium.errors import ConfigError, DoesNotFit, TriviumError

MIB, GIB = 1 << 20, 1 << 30
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fsync_directory(folder: Path) -> None:
    """Make renames and new files in `folder` durable; fsync of a file does not cover its directory entry."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: Path, content: bytes | str) -> None:
    """Replace `path` with `content`; readers see the old file or the new one, even after a crash."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with errors_named(path), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in constant memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_regular(*paths: Path) -> None:
    """Raise ConfigError for a named pipe, a device or a socket, or a link to one: reading it may never end."""
    for path in paths:
        try:
            mode = path.stat().st_mode
        except OSError:
            continue  # missing, or a broken link
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            kind = "named pipe" if stat.S_ISFIFO(mode) else "socket" if stat.S_ISSOCK(mode) else "device"
            raise ConfigError(
                f"{path} is a {kind}; expected a regular file, since reading this may never end. Put the file itself "
                "there."
            )


def with_reserve(num_bytes: int) -> int:
    """What must be free before `num_bytes` are written: a sixteenth more, 1 to 64 MiB, for small files next to them."""
    return num_bytes + min(max(num_bytes // 16, MIB), 64 * MIB)


def require_free_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raise DoesNotFit if the disk of `folder` has less free than `num_bytes` with their reserve."""
    needed_bytes, free_bytes = with_reserve(num_bytes), shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DoesNotFit(
            f"Not enough disk space in {folder} for {what}: {needed_bytes / MIB:,.1f} MiB needed, "
            f"{free_bytes / MIB:,.1f} MiB free. Nothing was written or removed. Free some space and run the same "
            "command again."
        )


@contextmanager
def errors_named(path: Path) -> Iterator[None]:
    """Add the path to an error of a write: the system names a file only when it is opened."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def full_disk_explained(
    folder: Path | None, kept: str, needed_bytes: Callable[[], int] | None = None
) -> Iterator[None]:
    """Raise DoesNotFit for a write that fails in the block because the disk, a quota or a size limit is full.

    Args:
        folder: where the block writes, for errors that name no file; None if unknown.
        kept: a sentence on what of the work is kept.
        needed_bytes: what the whole work still needs, if that is known.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        found = error.filename if isinstance(error.filename, str) else folder
        place = existing_parent(Path(found or "."))
        needed = f" {needed_bytes() / MIB:,.1f} MiB are needed to finish." if needed_bytes else ""
        raise DoesNotFit(
            f"The disk is full: {found or 'a file'} could not be written ({error.strerror}), and "
            f"{shutil.disk_usage(place).free / MIB:,.1f} MiB are free in {place}.{needed} {kept} Free some space and "
            "run the same command again."
        ) from error


def existing_parent(path: Path) -> Path:
    """The path itself, or the nearest parent that exists."""
    there = path.absolute()
    return next(path for path in (there, *there.parents) if path.exists())


class FolderLock:
    """An exclusive lock on a folder's `lock` file; the kernel frees it when the process dies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: BinaryIO | None = None

    def acquire(self, wait: bool) -> None:
        """Take the lock; with `wait` block until it is free.

        Raises: TriviumError naming the process and host that hold the lock if it is taken and `wait` is false.
        """
        file = self.path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            file.seek(0)
            holder = file.read().decode(errors="replace").strip() or "another process"
            file.close()
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            raise TriviumError(
                f"{self.path.parent} is in use by {holder}. Two runs cannot share a folder: wait for that one, stop "
                "it, or add name=NEW to start another run."
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        file.flush()
        self._file = file

    def release(self) -> None:
        """Free the lock. The file stays: after deleting it, two processes could each hold a lock."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@dataclass(frozen=True)
class TensorSource:
    """One tensor to write: name, safetensors dtype (`F32`, `BF16`, `U8`, ...), shape, and a function that reads it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    read: Callable[[], Iterator[bytes | memoryview]]


def write_safetensors(path: Path, tensors: Iterable[TensorSource], metadata: dict[str, str]) -> str:
    """Write a safetensors file one tensor at a time, fsync it, and return its SHA-256.

    The hash covers the bytes before they are written, so later verification detects what the disk lost or corrupted.

    Source: https://github.com/huggingface/safetensors#format
    """
    ordered = list(tensors)
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for tensor in ordered:
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    with errors_named(path), path.open("wb") as file:
        for chunk in (len(encoded).to_bytes(8, "little"), encoded):
            digest.update(chunk)
            file.write(chunk)
        for tensor in ordered:
            for piece in tensor.read():
                digest.update(piece)
                file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()
