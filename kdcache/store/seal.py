"""Seal: `seal.arrow`, one object that holds all commits of a finished cache.

So a cache of a hundred thousand shards is opened by reading two objects, the manifest and the seal, and not by a
request a shard. It is written once, create-only, by whoever finds the cache complete. A cache without it is as good,
and is opened from its commits.

The file is an Arrow IPC file, uncompressed and without dictionaries, that any Arrow reader can map: a row a shard, the
columns of `commits.commit_schema`. Its schema's metadata says `format`, `manifest_sha256` and `checksum`: `sha256:` and
64 digits, over the whole file as it is with 64 zeros in their place (they are there twice, at the beginning and in
the footer). What it says is checked as commits are: types, counts, sums, every planned shard once. Whether the commits
say the same, and whether the objects are there, is what `verify` checks. A missing object is an error when it is read.

Cost of opening: one read of the file, sha256 over it, and a few passes over its numbers.
"""

from __future__ import annotations

import hashlib
import re
import struct

import numpy as np
import pyarrow as pa

from kdcache.errors import CorruptCacheError
from kdcache.store.arrow_layout import is_compressed, read_blocks
from kdcache.store.bad_records import LISTING
from kdcache.store.commits import Commits, commit_schema, committed, read_commits, require_sound
from kdcache.store.manifest import FORMAT, NAME, Manifest
from kdcache.store.storage import Storage

SEAL = "seal.arrow"

_CHECKSUM = re.compile(rb"sha256:[0-9a-f]{64}")
_UNKNOWN = b"sha256:" + b"0" * 64
_MOST_BYTES, _MOST_PER_SHARD = 1 << 20, 1 << 22
"""A seal may have so many bytes, and so many more for each shard."""

_DAMAGE = (pa.ArrowException, OSError, ValueError, TypeError, IndexError, OverflowError, MemoryError, struct.error)
"""What reading a damaged file can raise, in our code and in Arrow."""


def seal_cache(storage: Storage) -> bool:
    """Seal a cache if it is complete and has no seal yet.

    Returns:
        Whether it is sealed now.

    Raises:
        CacheError: no cache there, or the seal cannot be written.
        CorruptCacheError: the manifest or a commit is damaged.
    """
    manifest = Manifest.read(storage)
    if storage.size(SEAL) is not None:
        return True
    if len(committed(storage, manifest)) < manifest.shards:
        return False
    storage.create(SEAL, to_bytes(read_commits(storage, manifest)))
    return True


def unseal(storage: Storage) -> None:
    """Take the seal off, if there is one, and the list beside it: a shard that was made again is about to appear."""
    if storage.size(SEAL) is not None:
        storage.delete(SEAL)
        storage.delete(LISTING)


def open_commits(storage: Storage, manifest: Manifest) -> Commits:
    """The commits of a cache: from its seal if it has one, else all that are there.

    Raises:
        CorruptCacheError: the seal or a commit is damaged, or is that of another cache; or all shards together do not
            hold the documents that the manifest plans.
    """
    sealed = read_seal(storage, manifest)
    commits = read_commits(storage, manifest) if sealed is None else sealed
    if manifest.plan and len(commits) == manifest.shards and commits.total("documents") != manifest.documents:
        raise CorruptCacheError(
            f"{storage.path_of(NAME)} plans {manifest.documents:,} documents, but its shards hold "
            f"{commits.total('documents'):,}"
        )
    return commits


def to_bytes(commits: Commits) -> bytes:
    """The file that seals these commits; equal commits make equal bytes."""
    histograms = commits.table["entropy_histogram"]
    most = max((int(chunk.flatten().to_numpy().max(initial=0)) for chunk in histograms.chunks), default=0)
    schema = commit_schema(pa.from_numpy_dtype(np.min_scalar_type(most)))
    named = {"format": str(FORMAT), "manifest_sha256": commits.manifest_sha256, "checksum": _UNKNOWN.decode()}
    table = commits.table.cast(schema).replace_schema_metadata(named)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data.replace(_UNKNOWN, _checksum(data))


def _checksum(data: bytes, stated: bytes = _UNKNOWN) -> bytes:
    """The checksum of a file, with zeros wherever it states its own; the file is not copied."""
    digest, start, view = hashlib.sha256(), 0, memoryview(data)
    while (found := data.find(stated, start)) >= 0:
        digest.update(view[start:found])
        digest.update(_UNKNOWN)
        start = found + len(stated)
    digest.update(view[start:])
    return b"sha256:" + digest.hexdigest().encode()


def read_seal(storage: Storage, manifest: Manifest) -> Commits | None:
    """The commits that the seal of a cache holds; None if it has no seal.

    Raises:
        CorruptCacheError: the seal is damaged, is of another cache, or says what commits cannot say.
    """
    path = storage.path_of(SEAL)
    try:
        data = storage.read(SEAL, _MOST_BYTES + manifest.shards * _MOST_PER_SHARD)
    except FileNotFoundError:
        return None
    found = _CHECKSUM.search(data[: 1 << 16])
    if found is None or _checksum(data, found[0]) != found[0]:
        raise CorruptCacheError(f"{path} is damaged: its checksum does not match")
    try:
        table = _table(storage, data)
        if table.schema.metadata.get(b"format") != str(FORMAT).encode():
            raise ValueError("it is of another format")
        if table.schema.metadata.get(b"manifest_sha256") != manifest.sha256.encode():
            raise ValueError("it is the seal of another cache")
        if not np.array_equal(table["shard"].to_numpy(), np.arange(manifest.shards)):
            raise ValueError(f"it does not name each of the {manifest.shards:,} shards once, in order")
        require_sound(table, len(manifest.temperatures))
    except (CorruptCacheError, *_DAMAGE) as error:
        what = " ".join(str(error).split())[:200]
        raise CorruptCacheError(f"{path} does not describe the shards of this cache: {what}") from None
    return Commits(table, manifest.sha256, sealed=True)


def _table(storage: Storage, data: bytes) -> pa.Table:
    """The table in a file whose batches are neither compressed nor have dictionaries: it takes no more than it is."""
    source = _InMemory(data)
    schema = pa.ipc.open_file(pa.py_buffer(data)).schema
    bins = schema.field("entropy_histogram").type.value_type
    if not pa.types.is_unsigned_integer(bins) or not schema.equals(commit_schema(bins)):
        raise ValueError("its columns are not those of commits")
    for block in read_blocks(storage, source, schema):
        start = int(block["offset"])
        if is_compressed(data[start : start + int(block["metadata"])]):
            raise ValueError("a batch is compressed")
    table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
    table.validate(full=True)
    for name in table.schema.names:
        _require_no_nulls(table.schema.field(name), table[name])
    return table


def _require_no_nulls(field: pa.Field, column: pa.ChunkedArray) -> None:
    """Refuse nulls where the schema has none; Arrow's own validation does not look at it."""
    if not field.nullable and column.null_count:
        raise ValueError(f"{field.name} is missing for a shard")
    for chunk in column.chunks:
        if pa.types.is_list(field.type):
            _require_no_nulls(field.type.value_field, pa.chunked_array([chunk.flatten()], field.type.value_type))
        elif pa.types.is_struct(field.type):
            for number in range(field.type.num_fields):
                inner = field.type.field(number)
                _require_no_nulls(inner, pa.chunked_array([chunk.field(number)], inner.type))


class _InMemory:
    """A file that is in memory, read by ranges."""

    def __init__(self, data: bytes) -> None:
        self.name, self.size, self._data = SEAL, len(data), data

    def read(self, start: int, length: int) -> bytes:
        """Exactly these bytes."""
        if not 0 <= start <= start + length <= self.size:
            raise CorruptCacheError(f"{self.name} ends before byte {start + length}")
        return self._data[start : start + length]
