"""Atomic files: files and folders that appear whole or not at all, and never replace one another.

A file is written under a temporary name in its own folder, flushed to the device, and then linked to its final name,
which fails if that exists. A folder of files is renamed instead, which fails if the target holds anything. A writer
holds a lock on its temporary file while it lives, so `sweep` recognises the files of writers that died.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from kdcache.errors import CacheError, ConfigError

_TEMPORARY = ".kdcache-tmp"
_SWEEP_AGE = 2.0  # seconds
_FULL = (errno.ENOSPC, errno.EDQUOT)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the device."""
    handle = os.open(folder, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(handle)
    except OSError:  # some network file systems cannot; their rename is durable or nothing is
        pass
    finally:
        os.close(handle)


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def storage_errors(path: Path | str) -> Iterator[None]:
    """Turn the operating system's refusals (no room, no permission) into one sentence."""
    try:
        yield
    except OSError as error:
        raise CacheError(f"{path} cannot be written: {error.strerror or error}") from error


def is_full(error: CacheError) -> bool:
    """Whether something could not be written because a disk, or this user's share of it, is full."""
    return isinstance(error.__cause__, OSError) and error.__cause__.errno in _FULL


class NewFile:
    """A file that appears at `publish`, or leaves nothing behind. It is a binary sink and a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.closed = False
        self._temporary = temporary_name(path)
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._temporary.open("xb")
        _try_lock(self._file.fileno())

    def reserve(self, size: int) -> None:
        """Take room for the whole file before anything is written; where that cannot be done, only set its size."""
        with storage_errors(self.path):
            try:
                os.posix_fallocate(self._file.fileno(), 0, max(1, size))
            except (AttributeError, OSError) as error:  # not every system has it, nor every file system
                if isinstance(error, OSError) and error.errno in _FULL:
                    raise
            self._file.truncate(size)

    def write(self, data: bytes | memoryview) -> int:
        """Append bytes."""
        with storage_errors(self.path):
            return self._file.write(data)

    def flush(self) -> None:
        """Hand buffered bytes to the operating system."""
        with storage_errors(self.path):
            self._file.flush()

    def publish(self) -> bool:
        """Give the file its name. False, and nothing changed, if that name is taken."""
        with storage_errors(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            try:
                os.link(self._temporary, self.path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                if self.path.exists():
                    return False
                self._temporary.rename(self.path)
            sync_folder(self.path.parent)
        return True

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):  # a full disk fails again when the buffer is flushed
            self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink()


def require_new(path: str) -> None:
    """Refuse a file that exists, before the work for it is done.

    Raises:
        ConfigError: it does.
    """
    if Path(path).exists():
        raise ConfigError(f"{path} exists already; choose another name")


def write_new(path: Path, data: bytes) -> bool:
    """Create a file with these bytes; False, and nothing changed, if it exists already."""
    with NewFile(path) as file:
        file.write(data)
        return file.publish()


def write_over(path: Path, data: bytes) -> None:
    """Give a file these bytes, whether or not it exists: it has the old or the new ones, whole. Nothing is flushed."""
    temporary = temporary_name(path)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


class NewFolder:
    """A folder of files that appears at `publish`, or leaves nothing behind. It is a context manager."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = temporary_name(path)
        self._files: list[BinaryIO] = []
        with storage_errors(path):
            self._temporary.mkdir(parents=True)
        self._handle = os.open(self._temporary, os.O_RDONLY)
        _try_lock(self._handle)

    @property
    def place(self) -> Path:
        """Where its files are until then, for a library that writes them itself."""
        return self._temporary

    def file(self, name: str) -> BinaryIO:
        """A new file in it, open for writing; parent folders are created."""
        with storage_errors(self.path):
            path = self._temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("xb")
        self._files.append(file)
        return file

    def sync(self, file: BinaryIO) -> None:
        """Flush a file of it to the device and close it, unless that is done."""
        if not file.closed:
            with storage_errors(self.path):
                file.flush()
                os.fsync(file.fileno())
                file.close()

    def publish(self) -> bool:
        """Give the folder its name. False, and nothing changed, if that name is taken."""
        with storage_errors(self.path):
            for file in self._files:
                self.sync(file)
            for inner in [p for p in self._temporary.rglob("*") if p.is_dir()] + [self._temporary]:
                sync_folder(inner)
            try:
                self._temporary.rename(self.path)
            except OSError:  # a folder that holds something is never replaced
                if self.path.exists():
                    return False
                raise
            sync_folder(self.path.parent)
        return True

    def __enter__(self) -> NewFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()
        os.close(self._handle)
        shutil.rmtree(self._temporary, ignore_errors=True)


def temporary_name(path: Path) -> Path:
    """A name in the folder of `path` that no reader looks at."""
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}{_TEMPORARY}")


def sweep(folder: Path) -> None:
    """Delete temporary files and folders in a folder, if it exists, whose writers have died.

    A writer takes its lock just after it created the file, so files younger than two seconds are not touched.
    """
    for path in folder.glob(f".*{_TEMPORARY}"):
        with contextlib.suppress(OSError):
            handle = os.open(path, os.O_RDONLY)
            try:
                if time.time() - path.stat().st_mtime > _SWEEP_AGE and _try_lock(handle):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            finally:
                os.close(handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder, where the system has such locks."""
    with storage_errors(folder):
        handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def taken(handle: int) -> bool:
    """Whether another process holds the lock on an open file or folder; if none does, this one takes it.

    Where the system has no such locks, the answer is always no.
    """
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):
        return False
    return False


def _try_lock(handle: int) -> bool:
    try:
        import fcntl
    except ImportError:  # a system without POSIX locks never sweeps
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
