"""Mirror: a remote storage with a bounded local copy.

An object is copied when it is first opened, while the folder stays within its limit. When it is full, copies of other
caches are deleted first, least recently used first; then objects are read over the network as without a mirror. So a
cache larger than the limit never thrashes: every pass reads the same share of it locally. A disk that is full before
the limit is reached is the same: room for a copy is taken before anything is fetched, and without it the object is read
over the network.

A copy is named by the sha256 in the commit, and gets that name only when its bytes have that hash: copies of an older
cache or of a killed process are never mistaken for it. Processes count and reserve space under one lock, and a process
that needs an object which another is copying waits for that copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kdcache.errors import CacheError, CorruptCacheError
from kdcache.store.atomic_files import NewFile, is_full, storage_errors, sweep
from kdcache.store.remote import RemoteStorage
from kdcache.store.storage import Readable

_STEP = 1 << 23


class MirroredStorage(RemoteStorage):
    """A remote storage, read through local copies.

    Args:
        url: the cache's.
        cache: the checksum of its manifest.
        folder: of the copies, of this cache and others.
        limit: bytes that they hold together at most.

    Raises:
        CacheError: the folder cannot be made.
    """

    def __init__(self, url: str, cache: str, folder: str | os.PathLike[str], limit: int) -> None:
        super().__init__(url)
        self._cache, self._folder, self._limit = cache, Path(folder), limit
        self._mine = self._folder / cache[:16]
        self.damage_note = f"; if verify finds the cache sound, delete its local copy {self._mine}"
        with storage_errors(self._folder):
            self._mine.mkdir(parents=True, exist_ok=True)

    def __reduce__(self) -> tuple[Any, ...]:
        return MirroredStorage, (self.url, self._cache, self._folder, self._limit)

    def open(self, name: str, promised: dict[str, Any] | None = None) -> Readable:
        source = super().open(name, promised)
        if promised is None or source.size > self._limit:
            return source
        path = self._mine / str(promised["sha256"])
        try:
            with _locked(self._mine / f".{path.name[:2]}.lock"):
                if self._stands(path, source.size) or self._copy(source, path):
                    return CopiedFile(path, source)
        except CacheError as error:
            if not is_full(error):
                raise
        return source

    def _stands(self, path: Path, size: int) -> bool:
        try:
            if path.stat().st_size == size:
                os.utime(path)
                return True
            path.unlink()
        except FileNotFoundError:
            pass
        return False

    def _copy(self, source: Readable, path: Path) -> bool:
        """Copy an object, unless it does not fit."""
        with contextlib.ExitStack() as stack:
            with _locked(self._folder / ".lock"):
                if not self._make_room(source.size):
                    return False
                file = stack.enter_context(NewFile(path))
                file.reserve(source.size)
            digest = hashlib.sha256()
            for piece in self._pieces(source):
                digest.update(piece)
                file.write(piece)
            if digest.hexdigest() != path.name:
                raise CorruptCacheError(f"{source.name} does not have the sha256 that was committed")
            file.publish()
        return True

    def _pieces(self, source: Readable) -> Iterator[bytes]:
        def read(start: int) -> bytes:
            return source.read(start, min(_STEP, source.size - start))

        return self.map(read, range(0, source.size, _STEP), at_once=4)

    def _make_room(self, size: int) -> bool:
        """Delete copies of other caches until an object of this size fits; whether it does."""
        for cache in self._folder.iterdir():
            if cache.is_dir():
                sweep(cache)
        copies = []
        for path in self._folder.glob("*/*"):
            with contextlib.suppress(FileNotFoundError):  # its writer has just named it, or given up
                copies.append((path.stat().st_mtime, path, path.stat().st_size))
        held = sum(size for _, _, size in copies)
        for _, path, freed in sorted(copies):
            if held + size <= self._limit:
                break
            if path.parent != self._mine and not path.name.startswith("."):
                path.unlink(missing_ok=True)
                held -= freed
        return held + size <= self._limit


class CopiedFile:
    """The copy of an object, or the object itself once the copy is deleted. It holds no open file."""

    def __init__(self, path: Path, source: Readable) -> None:
        self.name, self.size = source.name, source.size
        self._path, self._source = path, source

    def read(self, start: int, length: int) -> bytes:
        """Exactly these bytes."""
        try:
            with self._path.open("rb", buffering=0) as file:
                data = os.pread(file.fileno(), length, start)
        except FileNotFoundError:
            return self._source.read(start, length)
        except OSError as error:
            raise CorruptCacheError(f"{self._path} cannot be read: {error.strerror or error}") from None
        if len(data) != length or start + length > self.size:
            raise CorruptCacheError(f"{self._path} ends before byte {start + length}")
        return data


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process, and one thread of it, at a time."""
    try:
        import fcntl
    except ImportError:
        raise CacheError("a local copy of a remote cache needs a system with POSIX locks") from None
    with storage_errors(path):
        file = path.open("w")
    with file:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX)
        yield
