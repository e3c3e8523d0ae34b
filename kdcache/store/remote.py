"""Remote storage: a cache under a URL that fsspec knows (s3://, gs://, az://, memory://, ...).

Records are put only if absent (`pipe_file(mode="create")`: a conditional put on S3, GCS and others); a store that
accepts a second put is refused. Each writer puts the data of a shard under a name of its own, so writers never touch
each other's objects; the commit names the one that counts, and the others are swept. Object stores promise that an
object appears whole or not at all.
Cost: one request for a record or the seal, one for a range of an object; the requests of one call run together.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

from kdcache.errors import CacheError, ConfigError, CorruptCacheError
from kdcache.file_systems import connect
from kdcache.store.atomic_files import storage_errors
from kdcache.store.storage import NewData, Readable, Sink, Storage, map_ahead

T = TypeVar("T")
R = TypeVar("R")

_PAUSES = (0.1, 0.5, 2.0)  # seconds between tries of a put that came at the same time as another

_WRITTEN = ("LastModified", "last_modified", "updated", "mtime", "modified", "created")
"""Where libraries of stores say when an object was last written: S3, Azure, Google, others, memory."""


class RemoteStorage(Storage):
    """A cache in an object store.

    Raises:
        ConfigError: a protocol that fsspec does not know, or whose package is not installed.
    """

    remote = True
    open_shards = 1024  # they hold no open files, only the offsets of their rows
    open_files = 1 << 16

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        if "://" not in self.url:
            raise ConfigError(f"{url} names no bucket")
        self._connected: tuple[int, Any] | None = None
        self._refuses_second_puts = False
        self._root = self._connect()[1]

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteStorage, (self.url,)

    def _connect(self) -> tuple[Any, str]:
        fs, root = connect(self.url)
        self._connected = os.getpid(), fs
        return fs, root.rstrip("/")

    @property
    def _fs(self) -> Any:
        """The file system; a forked process makes its own, since connections do not survive a fork."""
        if self._connected is None or self._connected[0] != os.getpid():
            return self._connect()[0]
        return self._connected[1]

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def read(self, name: str, most: int) -> bytes:
        with _network(self.path_of(name), "read"):
            try:
                data = bytes(self._fs.cat_file(self._path(name), start=0, end=most + 1))
            except FileNotFoundError:
                raise
            except OSError:  # a range of an empty object is an error to some stores
                if self.size(name) != 0:
                    raise
                return b""
        if len(data) > most:
            raise CorruptCacheError(f"{self.path_of(name)} is larger than the {most:,} bytes that it can have")
        return data

    def size(self, name: str) -> int | None:
        with _network(self.path_of(name), "read"):
            try:
                found = self._fs.info(self._path(name))
            except FileNotFoundError as error:
                _require_bucket(error, self.url)
                return None
            return int(found["size"]) if found["type"] == "file" else None

    def open(self, name: str, promised: dict[str, Any] | None = None) -> Readable:
        size = self.size(name) if promised is None else int(promised["bytes"])
        if size is None:
            raise CorruptCacheError(f"{self.path_of(name)} cannot be read: there is no such object")
        return RemoteFile(self, name, size)

    def read_ranges(self, requests: list[tuple[Readable, int, int]]) -> list[bytes]:
        ours = [(s, a, n) for s, a, n in requests if isinstance(s, RemoteFile) and n]
        for source, start, length in ours:
            source.require(start, length)
        paths, starts = [self._path(s.object) for s, _, _ in ours], [a for _, a, _ in ours]
        with _network(self.url, "read"):
            found = self._fs.cat_ranges(paths, starts, [a + n for _, a, n in ours], on_error="return") if ours else []
        data = iter(found)
        return [
            source.checked(next(data), start, length)
            if isinstance(source, RemoteFile) and length
            else source.read(start, length)
            for source, start, length in requests
        ]

    def map(self, function: Callable[[T], R], items: Iterable[T], at_once: int = 16) -> Iterator[R]:
        return map_ahead(function, items, at_once)

    def names(self, folder: str = "") -> list[str]:
        return list(self.sizes(folder))

    def sizes(self, folder: str = "") -> dict[str, int]:
        return {name: int(info["size"]) for name, info in self._listing(folder).items()}

    def modified(self, folder: str) -> dict[str, float]:
        return {name: self._written(name, info) for name, info in self._listing(folder).items()}

    def _written(self, name: str, info: dict[str, Any]) -> float:
        """When an object was last written, as the library of its store says it."""
        for key in _WRITTEN:
            value = info.get(key)
            with contextlib.suppress(ValueError):
                value = datetime.fromisoformat(value) if isinstance(value, str) else value
            if isinstance(value, datetime):
                return value.timestamp()
            if isinstance(value, int | float):
                return float(value)
        raise CacheError(f"{self.path_of(name)} cannot be dated: its store does not say when it was written")

    def clock(self) -> float:
        if hasattr(self._fs, "call_s3"):
            with contextlib.suppress(Exception):  # a bucket that this user may not ask for itself
                answer = self._fs.call_s3("head_bucket", Bucket=self._root.partition("/")[0])
                return parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"]).timestamp()
        return time.time()

    def _listing(self, folder: str) -> dict[str, dict[str, Any]]:
        """What the store says of each object under a folder, by name."""
        with _network(self.path_of(folder), "read"):
            try:
                found = self._fs.find(self._path(folder), detail=True)
            except FileNotFoundError as error:
                _require_bucket(error, self.url)
                return {}
        names = {path[len(self._root) + 1 :]: info for path, info in sorted(found.items())}
        # Consoles put objects for folders; and s3fs lists a folder as one whose first object comes while it looks.
        return {n: info for n, info in names.items() if n and not n.endswith("/") and info["type"] == "file"}

    def create(self, name: str, data: bytes) -> bool:
        made = self._put_new(name, data)
        if made and not self._refuses_second_puts and self._put_new(name, data):
            raise CacheError(
                f"{self.url} lets a second put replace an object, so two workers could commit one shard; "
                "dump into a folder, or into a store that honours If-None-Match"
            )
        self._refuses_second_puts = True
        return made

    def require_fit(self) -> None:
        versioned = False
        if hasattr(self._fs, "is_bucket_versioned"):
            with contextlib.suppress(Exception):  # not every user may ask, and not every store answers
                versioned = self._fs.is_bucket_versioned(self._root.partition("/")[0])
        if versioned:
            raise CacheError(
                f"{self.url} cannot hold a new cache: its bucket keeps versions, so what is deleted or replaced there "
                "stays and is paid for; suspend versioning, or choose another bucket"
            )

    def _put_new(self, name: str, data: bytes) -> bool:
        with _network(self.path_of(name), "written"):
            for pause in (*_PAUSES, None):
                try:
                    self._fs.pipe_file(self._path(name), data, mode="create")
                except FileExistsError:
                    return False
                except OSError as error:  # stores word "it exists" and "two puts at once" in many ways
                    _require_bucket(error, self.url)
                    if self.size(name) is not None:
                        return False
                    if pause is None or isinstance(error, PermissionError):
                        raise
                    time.sleep(pause)
                else:
                    return True
        return False

    def replace(self, name: str, data: bytes) -> None:
        with _network(self.path_of(name), "written"):
            self._fs.pipe_file(self._path(name), data)

    def new_data(self, stem: str, suffix: str, folder: bool) -> NewData:  # noqa: ARG002  a prefix needs no making
        return _RemoteData(self, f"{stem}-{secrets.token_hex(6)}{suffix}")

    def put(self, source: Path, name: str) -> None:
        """Upload a local file under a name that only this writer uses."""
        with _network(self.path_of(name), "written"):
            self._fs.put_file(str(source), self._path(name))

    def delete(self, name: str) -> None:
        with _network(self.path_of(name), "deleted"), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._path(name), recursive=True)

    def delete_object(self, name: str) -> None:
        with _network(self.path_of(name), "deleted"), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._path(name))

    def sweep(self, committed: dict[str, set[str]]) -> None:
        for name in self.names("shards"):
            stem = name.split("-", 1)[0]
            if stem in committed and name not in committed[stem]:
                self.delete(name)


class RemoteFile:
    """An object that is read by ranges, each a request."""

    def __init__(self, storage: RemoteStorage, name: str, size: int) -> None:
        self._place, self.object, self.size = storage, name, size
        self.name = storage.path_of(name)

    def read(self, start: int, length: int) -> bytes:
        """Exactly these bytes."""
        self.require(start, length)
        return self._place.read_ranges([(self, start, length)])[0] if length else b""

    def require(self, start: int, length: int) -> None:
        """Refuse a range that ends beyond the object."""
        if not 0 <= start <= start + length <= self.size:
            raise CorruptCacheError(f"{self.name} ends before byte {start + length}")

    def checked(self, found: bytes | Exception, start: int, length: int) -> bytes:
        """The answer to a request for a range, if it is that range."""
        if isinstance(found, FileNotFoundError):
            raise CorruptCacheError(f"{self.name} cannot be read: there is no such object") from None
        if isinstance(found, Exception):
            size = self._place.size(self.object)
            if size is None or size < start + length:
                raise CorruptCacheError(f"{self.name} ends before byte {start + length}") from None
            raise CacheError(f"{self.name} cannot be read: {_sentence(found)}") from found
        if len(found) != length:
            raise CorruptCacheError(f"{self.name} ends before byte {start + length}")
        return bytes(found)


class _RemoteData(NewData):
    """Parts gathered in local temporary files and put at `publish`."""

    def __init__(self, storage: RemoteStorage, name: str) -> None:
        self.name, self._place = name, storage
        self._scratch = Path(tempfile.mkdtemp(prefix="kdcache-"))
        self._parts: list[tuple[str, _ScratchFile]] = []

    def part(self, name: str) -> Sink:
        full = f"{self.name}/{name}" if name else self.name
        file = _ScratchFile(self._scratch / str(len(self._parts)))
        self._parts.append((full, file))
        return Sink(full, cast(BinaryIO, file), file.close)

    def publish(self) -> bool:
        def put(part: tuple[str, _ScratchFile]) -> None:
            part[1].close()
            self._place.put(part[1].path, part[0])

        for _ in self._place.map(put, self._parts, at_once=4):  # s3fs holds up to 100 MB of each in memory
            pass
        return True

    def close(self) -> None:
        for _, file in self._parts:
            with contextlib.suppress(CacheError):
                file.close()
        shutil.rmtree(self._scratch, ignore_errors=True)


class _ScratchFile:
    """A local file whose failures are one sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with storage_errors(path):
            self._file = path.open("xb")

    def write(self, data: memoryview) -> int:
        with storage_errors(self.path):
            return self._file.write(data)

    def flush(self) -> None:
        with storage_errors(self.path):
            self._file.flush()

    def close(self) -> None:
        with storage_errors(self.path):
            self._file.close()


@contextlib.contextmanager
def _network(where: str, verb: str) -> Iterator[None]:
    """Turn what the store's library raises into one sentence; FileNotFoundError and FileExistsError pass."""
    try:
        yield
    except CacheError:
        raise
    except (FileNotFoundError, FileExistsError) as error:
        _require_bucket(error, where)
        if verb == "written":
            raise CacheError(f"{where} cannot be written: {_sentence(error)}") from error
        raise
    except Exception as error:
        raise CacheError(f"{where} cannot be {verb}: {_sentence(error)}") from error


def _require_bucket(error: OSError, where: str) -> None:
    """An object that is absent is an answer; a bucket that is absent is an error."""
    if re.search(r"(bucket|container) does not exist", str(error)):
        raise CacheError(f"{where} cannot be used: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
