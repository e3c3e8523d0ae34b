"""Context index: where each context of a cache is, found by its content.

A context is what a teacher sees together: a piece, or a whole row where rows are not isolated. Its key is the sha256,
cut to 16 bytes, of its tokens, of which of them are labelled, and of what the teacher reads in front of them. The index
of a cache is one sorted Arrow file in the user's cache folder (`kdcache/reuse`), mapped into memory, named by what it
was made from, and built when it is first asked for; other processes of the machine wait meanwhile. It may be deleted at
any time.

Guarantee: what is found is a place to look at, not yet known to hold what is sought: who reads it compares the tokens.
Cost: building reads every row of the cache once, without decoding targets; 28 bytes a context on disk; in memory a
256th of that, and a few megabytes. A look-up is one binary search.

Shapes: C contexts.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.cache import Cache
from kdcache.file_hashes import user_cache_folder
from kdcache.rows import PackedRow, RowSpec, labelled_tokens

Keys = NDArray[np.uint64]
"""`[C, 2]` the content of contexts."""

Place = tuple[int, int, int]
"""Shard, row, and number inside the row."""

_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("shard", "<u4"), ("row", "<u4"), ("context", "<u4")])
_SCHEMA = pa.schema([pa.field(name, pa.from_numpy_dtype(_ENTRY[name]), nullable=False) for name in _ENTRY.names or ()])
_PARTS = 256
"""Parts of an index, by the first byte of a key; each is sorted by itself."""
_MOST_WAITING = 1 << 20
"""Entries that are held in memory before they are written to the files of their parts."""
_DAMAGE = (OSError, ValueError, pa.ArrowException)


def content_keys(row: PackedRow, labelled: NDArray[np.bool_], spec: RowSpec) -> Keys:
    """The keys of a row's contexts.

    Args:
        row: its tokens and pieces.
        labelled: `[n]` which of its slots are labelled.
        spec: of the row.
    """
    tokens = row.tokens.astype("<i4", copy=False)
    digests = []
    for number, context in enumerate(spec.contexts(row)):
        content = hashlib.sha256(tokens[context].tobytes())
        content.update(np.packbits(labelled[context]).tobytes())
        if row.prefixes is not None:  # then each context is a piece
            content.update(row.prefixes[number].content)
        digests.append(content.digest()[:16])
    return np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)


class ContextIndex:
    """The index of one cache.

    Attributes:
        path: its file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with pa.memory_map(str(path)) as source:
            file = pa.ipc.open_file(source)
            if file.schema != _SCHEMA or file.num_record_batches != _PARTS:
                raise ValueError(f"{path} is not an index")
            batches = [file.get_batch(part) for part in range(_PARTS)]
        self._parts = [{name: batch.column(name).to_numpy() for name in _SCHEMA.names} for batch in batches]

    def find(self, keys: Keys) -> NDArray[np.int64]:
        """`[C, 3]` shard, row and number inside the row of a context of each key; -1 where there is none.

        Of several it is the next behind the context that was found before: where nothing moved, each finds itself.
        """
        found, previous = np.full((len(keys), 3), -1, np.int64), (-1, -1, -1)
        parts, ranges = _part(keys[:, 0]), np.zeros((len(keys), 2), np.int64)
        for part in np.unique(parts):
            wanted = np.flatnonzero(parts == part)
            high = self._parts[int(part)]["high"]
            ranges[wanted, 0] = np.searchsorted(high, keys[wanted, 0], "left")
            ranges[wanted, 1] = np.searchsorted(high, keys[wanted, 0], "right")
        for key in np.flatnonzero(ranges[:, 0] < ranges[:, 1]):
            entries, (first, last) = self._parts[int(parts[key])], ranges[key].tolist()
            place = _next(entries, first, last, keys[key, 1], previous)
            if place is not None:
                found[key] = previous = place
        return found


def _next(entries: dict[str, NDArray[Any]], first: int, last: int, low: np.uint64, previous: Place) -> Place | None:
    """The place behind another one, or the first of all, among those of a key whose first half is found already."""

    def place(at: int) -> Place:
        return int(entries["shard"][at]), int(entries["row"][at]), int(entries["context"][at])

    lows = entries["low"][first:last]
    same = range(first + int(np.searchsorted(lows, low, "left")), first + int(np.searchsorted(lows, low, "right")))
    if not same:
        return None
    at = bisect.bisect_right(same, previous, key=place) if len(same) > 1 else 0
    return place(same[at % len(same)])


def _part(high: NDArray[np.uint64]) -> NDArray[np.uint64]:
    return high >> np.uint64(56)


def open_index(cache: Cache) -> ContextIndex:
    """The index of the shards that a cache has now, built unless it is there.

    Raises:
        CorruptCacheError: a row of the cache is damaged.
        OSError: the index cannot be written.
    """
    home = user_cache_folder()
    if home is None:
        raise OSError("there is no home folder")
    folder = home / "reuse"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_name(cache)}.arrow"
    with _locked(path.with_suffix(".lock")):
        try:
            return ContextIndex(path)
        except _DAMAGE:  # it is missing, or is none
            _build(cache, path)
    return ContextIndex(path)


def _name(cache: Cache) -> str:
    """What an index is made from: the manifest, and the content of each shard."""
    content = hashlib.sha256(cache.manifest.sha256.encode())
    content.update(np.ascontiguousarray(cache.commits.shards).tobytes())
    for digests in cache.commits.table["content_sha256"].chunks:
        content.update(b"".join(digests.to_pylist()))
    return content.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(cache: Cache, path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        parts = _Parts(Path(scratch))
        for entries in _entries(cache):
            parts.add(entries)
        made = Path(scratch) / "index"
        with pa.OSFile(str(made), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            for entries in parts:
                ordered = entries[np.lexsort((entries["low"], entries["high"]))]
                columns = [np.ascontiguousarray(ordered[name]) for name in _SCHEMA.names]
                writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=_SCHEMA))
        made.replace(path)


def _entries(cache: Cache) -> Iterator[NDArray[np.void]]:
    """The entries of row after row."""
    spec = cache.manifest.row_spec
    for shard in cache.commits:
        reader = cache.shard(shard)
        for number, row in enumerate(cache.storage.map(reader.read_tokens, range(reader.rows))):
            keys = content_keys(row, labelled_tokens(row), spec)
            entries = np.zeros(len(keys), _ENTRY)
            entries["high"], entries["low"] = keys.T
            entries["shard"], entries["row"], entries["context"] = shard, number, np.arange(len(keys))
            yield entries


class _Parts:
    """Entries by the first byte of their keys, in files where they are many."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._waiting, self._count = folder, [np.zeros(0, _ENTRY)], 0

    def add(self, entries: NDArray[np.void]) -> None:
        self._waiting.append(entries)
        self._count += len(entries)
        if self._count >= _MOST_WAITING:
            for part, some in enumerate(self._split()):
                with self._file(part).open("ab") as file:
                    file.write(some.tobytes())

    def __iter__(self) -> Iterator[NDArray[np.void]]:
        """All entries of part after part, in the order in which they were added."""
        for part, some in enumerate(self._split()):
            file = self._file(part)
            yield np.concatenate([np.fromfile(file, _ENTRY), some]) if file.exists() else some

    def _file(self, part: int) -> Path:
        return self._folder / f"{part}"

    def _split(self) -> list[NDArray[np.void]]:
        entries = np.concatenate(self._waiting)
        self._waiting, self._count = [np.zeros(0, _ENTRY)], 0
        parts = _part(entries["high"]).astype(np.int64)
        ends = np.cumsum(np.bincount(parts, minlength=_PARTS))
        return np.split(entries[np.argsort(parts, kind="stable")], ends[:-1])
