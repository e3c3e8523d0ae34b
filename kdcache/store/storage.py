"""Storage: one interface to a local folder and to a prefix of an object store.

Names are relative to the cache, with `/` between their parts. Small objects (records, the seal, tokenizer files) are
read whole and created only if absent. The data of a shard is one file or one folder of files, which appears whole or
not at all, and is read by ranges.

Two helpers are here because every storage uses them: `map_ahead` computes results in threads before they are asked
for, in order; `LastUsed` keeps the values that were used last; each is made once, however many threads ask for it.
"""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Generic, Protocol, Self, TypeVar

from kdcache.errors import CorruptCacheError
from kdcache.store.atomic_files import storage_errors

V = TypeVar("V")


class LastUsed(Generic[V]):
    """A thread-safe cache of at most `most` values; the least recently used one leaves first."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._kept: OrderedDict[Hashable, _Once[V]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value under this key; made, outside of the lock, if there is none. An error is not kept."""
        with self._lock:
            once = self._kept.setdefault(key, _Once())
            self._kept.move_to_end(key)
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return once.get(make)


class _Once(Generic[V]):
    """A value that the first caller makes; the others wait for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: tuple[V] | None = None

    def get(self, make: Callable[[], V]) -> V:
        with self._lock:
            if self._made is None:
                self._made = (make(),)
            return self._made[0]


T = TypeVar("T")
R = TypeVar("R")


def map_ahead(function: Callable[[T], R], items: Iterable[T], at_once: int) -> Iterator[R]:
    """`map` with up to `at_once` calls running in threads; results come in the order of the items.

    An error is raised in its turn; calls that have not started are then dropped.
    """
    coming: deque[Future[R]] = deque()
    with ThreadPoolExecutor(at_once, thread_name_prefix="kdcache-ahead") as pool:
        try:
            for item in items:
                coming.append(pool.submit(function, item))
                if len(coming) == at_once:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for waiting in coming:
                waiting.cancel()


_MOST_NAME = 200


class Readable(Protocol):
    """An object that is read by ranges. It may be sent to another process."""

    name: str
    size: int

    def read(self, start: int, length: int) -> bytes:
        """Exactly these bytes; a CorruptCacheError if the object does not have them."""


class NewData(ABC):
    """The data of one shard while it is written: its parts appear together at `publish`, or not at all.

    Use it as a context manager; what is not published leaves nothing behind.

    Attributes:
        name: of the file, or of the folder that holds the parts.
    """

    name: str

    @abstractmethod
    def part(self, name: str) -> Sink:
        """A new part; the empty name is the file itself."""

    @abstractmethod
    def publish(self) -> bool:
        """Make the data appear, durably. False, and nothing changed, if its name is taken."""

    @abstractmethod
    def close(self) -> None:
        """Drop whatever was not published."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Storage(ABC):
    """A folder or a prefix of an object store. It may be sent to another process.

    Attributes:
        url: the path or URL that the user gave.
        remote: whether a read crosses a network.
        open_shards: how many shards a reader may hold open.
        open_files: how many objects `files` may hold open.
        damage_note: what a message about damaged rows adds.
    """

    url: str
    remote: bool = False
    open_shards: int = 32
    open_files: int = 256
    damage_note: str = ""

    def __str__(self) -> str:
        return self.url

    @cached_property
    def batches(self) -> LastUsed[Any]:
        """The blocks that were read last: neighbouring rows are in one block."""
        return LastUsed(8)

    @cached_property
    def files(self) -> LastUsed[Any]:
        """Objects that were opened last and may be read again."""
        return LastUsed(self.open_files)

    def path_of(self, name: str) -> str:
        """The full path or URL of an object, for messages."""
        return f"{self.url.rstrip('/')}/{name}"

    @abstractmethod
    def read(self, name: str, most: int) -> bytes:
        """A small object, whole.

        Raises:
            FileNotFoundError: there is none.
            CorruptCacheError: it is larger than `most` bytes.
            CacheError: it cannot be read.
        """

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Bytes of an object, None if there is none."""

    @abstractmethod
    def open(self, name: str, promised: dict[str, Any] | None = None) -> Readable:
        """An object for reading by ranges.

        Args:
            name: of the object.
            promised: what a commit says of it. Where asking for the size costs a request, that size is trusted; an
                object that is missing or short is an error when it is read.

        Raises:
            CorruptCacheError: there is none.
        """

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Names of all objects under a folder, sorted; files that are still being written are left out."""

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Bytes of all objects under a folder, by name."""
        return {name: size for name in self.names(folder) if (size := self.size(name)) is not None}

    @abstractmethod
    def modified(self, folder: str) -> dict[str, float]:
        """When each object of a folder was last written, by name: seconds since 1970 by the clock of the storage.

        Raises:
            CacheError: it cannot be read, or the storage does not say.
        """

    @abstractmethod
    def clock(self) -> float:
        """What the clock that `modified` goes by shows now; this machine's own clock where that cannot be asked."""

    def exclusive(self, folder: str) -> AbstractContextManager[None]:  # noqa: ARG002  for storages where names collide
        """A lock on a folder between writers that replace data in it."""
        return nullcontext()

    def require_fit(self) -> None:  # noqa: B027  most storages are fit
        """Refuse a storage where no cache should be created.

        Raises:
            CacheError: saying why.
        """

    @abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Create a small object. False, and nothing changed, if there is one of that name."""

    @abstractmethod
    def replace(self, name: str, data: bytes) -> None:
        """Write a small object, over what has its name. It appears whole, but need not survive a loss of power."""

    @abstractmethod
    def new_data(self, stem: str, suffix: str, folder: bool) -> NewData:
        """A writer of a shard's data; the name starts with `stem` and ends with `suffix`."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete a file or a folder of files, if it exists."""

    @abstractmethod
    def delete_object(self, name: str) -> None:
        """Delete one object, if it exists, by one request."""

    @abstractmethod
    def sweep(self, committed: dict[str, set[str]]) -> None:
        """Delete what writers that died have left behind.

        Args:
            committed: for the stem of each committed shard, the names of its objects.
        """

    def read_ranges(self, requests: list[tuple[Readable, int, int]]) -> list[bytes]:
        """Several ranges (object, start, length) at once, as `Readable.read` gives each."""
        return [source.read(start, length) for source, start, length in requests]

    def map(self, function: Callable[[T], R], items: Iterable[T], at_once: int = 16) -> Iterator[R]:  # noqa: ARG002
        """`map` for functions that read here; over a network up to `at_once` calls run ahead of the iteration."""
        return map(function, items)

    def chunks(self, name: str, step: int = 1 << 22) -> Iterator[bytes]:
        """The bytes of an object, `step` at a time."""
        source = self.open(name)

        def read(start: int) -> bytes:
            return source.read(start, min(step, source.size - start))

        return self.map(read, range(0, source.size, step), at_once=4)

    def digest(self, name: str) -> tuple[int, str]:
        """Bytes of an object, and their sha256 in hexadecimal."""
        size, digest = 0, hashlib.sha256()
        for piece in self.chunks(name):
            size += len(piece)
            digest.update(piece)
        return size, digest.hexdigest()


class Sink:
    """A binary sink that counts and hashes what passes through it."""

    def __init__(self, name: str, file: BinaryIO, sync: Callable[[], None] | None = None) -> None:
        self.name, self.bytes, self.closed = name, 0, False
        self._file, self._digest, self._sync = file, hashlib.sha256(), sync

    def write(self, data: Any) -> int:
        """Append bytes."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        self.bytes += len(view)
        with storage_errors(Path(self.name)):
            return self._file.write(view)

    def flush(self) -> None:
        """Hand buffered bytes on."""
        with storage_errors(Path(self.name)):
            self._file.flush()

    def sync(self) -> None:
        """Make the bytes durable and close the file: nothing more is written. Optional; it saves open files."""
        if self._sync is not None:
            self._sync()

    def record(self) -> dict[str, Any]:
        """What a commit says of this object."""
        return {"name": self.name, "bytes": self.bytes, "sha256": self._digest.hexdigest()}


def inside(name: object) -> str:
    """A name that a record gives, refused if it leads out of the cache.

    Raises:
        CorruptCacheError: it is not a plain relative name.
    """
    if not isinstance(name, str) or not name.isprintable() or not name.isascii() or not set(name).isdisjoint("\\:"):
        raise CorruptCacheError(f"a record names an object {ascii(name)[:60]}, which is not a plain name")
    if len(name) > _MOST_NAME or any(part in ("", ".", "..") for part in name.split("/")):
        raise CorruptCacheError(f"a record names an object {name[:60]!r} outside of the cache")
    return name
