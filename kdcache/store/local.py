"""Local storage: a cache in a folder.

Objects are read by `pread`, not through a memory map: a file that shrinks or fails while it is read is then an error
that names it, where a map would end the process with a bus error (decision 7).

Links are followed, so a cache may be spread over disks; they must lead to plain files. A device or a pipe is refused
before a byte is read from it: it might never end.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import time
import weakref
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO, cast

from kdcache.errors import CacheError, CorruptCacheError
from kdcache.store.atomic_files import NewFile, NewFolder, locked, storage_errors, sweep, write_new, write_over
from kdcache.store.storage import NewData, Sink, Storage

_HEARTBEATS = "running"
_CHECKPOINT = ("shards", "commits", "tokenizer", _HEARTBEATS, "")


class LocalStorage(Storage):
    """A cache in a folder of this machine's file systems.

    Raises:
        CacheError: the folder is a file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.folder = Path(path)
        if self.folder.exists() and not self.folder.is_dir():
            raise CacheError(f"{path} is a file, not a folder")
        self.url = str(self.folder)

    def __reduce__(self) -> tuple[type[LocalStorage], tuple[Path]]:
        return LocalStorage, (self.folder,)

    def read(self, name: str, most: int) -> bytes:
        path = self.folder / name
        try:
            with open(_open_plain(path), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size > most:
                    raise CorruptCacheError(f"{path} is larger than the {most:,} bytes that it can have")
                return file.read(size)
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(path) from None
        except OSError as error:
            damaged = error.errno in (errno.EINVAL, errno.ELOOP)
            kind = CorruptCacheError if damaged else CacheError
            raise kind(f"{path} cannot be read: {error.strerror or error}") from error

    def size(self, name: str) -> int | None:
        try:
            found = (self.folder / name).stat()
        except OSError:
            return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def open(self, name: str, promised: dict[str, Any] | None = None) -> LocalFile:  # noqa: ARG002  asking for the size is free
        return LocalFile(self.folder / name)

    def names(self, folder: str = "") -> list[str]:
        found = []
        for parent, folders, files in os.walk(self.folder / folder):
            folders[:] = [f for f in folders if not f.startswith(".")]
            found += [(Path(parent) / f).relative_to(self.folder).as_posix() for f in files if not f.startswith(".")]
        return sorted(found)

    def modified(self, folder: str) -> dict[str, float]:
        found = {}
        try:
            with os.scandir(self.folder / folder) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        with contextlib.suppress(FileNotFoundError):  # deleted just now
                            found[f"{folder}/{entry.name}"] = entry.stat().st_mtime
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise CacheError(f"{self.folder / folder} cannot be read: {error.strerror or error}") from error
        return found

    def clock(self) -> float:
        try:  # on a network file system, its server's clock
            with tempfile.TemporaryFile(dir=self.folder, prefix=".", buffering=0) as file:
                file.write(b".")
                return os.fstat(file.fileno()).st_mtime
        except OSError:  # this user may only read
            return time.time()

    def create(self, name: str, data: bytes) -> bool:
        return write_new(self.folder / name, data)

    def replace(self, name: str, data: bytes) -> None:
        write_over(self.folder / name, data)

    def new_data(self, stem: str, suffix: str, folder: bool) -> NewData:
        return (_FolderData if folder else _FileData)(self.folder, f"{stem}{suffix}")

    def exclusive(self, folder: str) -> AbstractContextManager[None]:
        return locked(self.folder / folder)

    def delete(self, name: str) -> None:
        path = self.folder / name
        with storage_errors(path):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def delete_object(self, name: str) -> None:
        with storage_errors(self.folder / name):
            (self.folder / name).unlink(missing_ok=True)

    def sweep(self, committed: dict[str, set[str]]) -> None:  # noqa: ARG002  names are taken atomically here
        for name in _CHECKPOINT:
            sweep(self.folder / name)
        with contextlib.suppress(OSError):  # there is none, or somebody makes a shard
            (self.folder / _HEARTBEATS).rmdir()


class LocalFile:
    """A file that is read by ranges. Sent to another process, it is opened again there."""

    def __init__(self, path: Path) -> None:
        self.name, self._path = str(path), path
        try:
            self._handle = _open_plain(path)
        except OSError as error:
            raise CorruptCacheError(f"{path} cannot be read: {error.strerror or error}") from None
        weakref.finalize(self, os.close, self._handle)
        self.size = os.fstat(self._handle).st_size

    def read(self, start: int, length: int) -> bytes:
        """Exactly these bytes."""
        if not 0 <= start <= start + length <= self.size:
            raise CorruptCacheError(f"{self.name} ends before byte {start + length}")
        try:
            data = os.pread(self._handle, length, start)
        except OSError as error:
            raise CorruptCacheError(f"{self.name} cannot be read: {error.strerror or error}") from None
        if len(data) != length:  # the file shrank, or the read is beyond what one call gives (2 GiB)
            raise CorruptCacheError(f"{self.name} ends before byte {start + length}")
        return data

    def __reduce__(self) -> tuple[type[LocalFile], tuple[Path]]:
        return LocalFile, (self._path,)


def _open_plain(path: Path) -> int:
    """A descriptor of a plain file, opened without blocking: a pipe would wait for its writer.

    Raises:
        OSError: there is none, or it is something else.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "it is not a plain file", str(path))
    return handle


class _FileData(NewData):
    """A shard that is one file."""

    def __init__(self, root: Path, name: str) -> None:
        self.name = name
        self._file = NewFile(root / name)

    def part(self, name: str) -> Sink:
        if name:
            raise ValueError(f"{self.name} is one file and has no part {name}")
        return Sink(self.name, cast(BinaryIO, self._file))

    def publish(self) -> bool:
        return self._file.publish()

    def close(self) -> None:
        self._file.__exit__(None, None, None)


class _FolderData(NewData):
    """A shard that is a folder of files."""

    def __init__(self, root: Path, name: str) -> None:
        self.name, self._root = name, root
        self._folder = NewFolder(root / name)

    def part(self, name: str) -> Sink:
        file = self._folder.file(name)
        return Sink(f"{self.name}/{name}", file, lambda: self._folder.sync(file))

    def publish(self) -> bool:
        return self._folder.publish()

    def close(self) -> None:
        self._folder.__exit__(None, None, None)
