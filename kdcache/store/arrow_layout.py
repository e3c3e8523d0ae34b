"""Arrow layout: where the columns of a record batch lie in an IPC file, read without trusting it.

Arrow's own reader allocates what a file asks for: a batch whose body says that it is compressed may unfold to any
size, a dictionary likewise. Our shards have neither, so this reads the few fields that say where the buffers are
(flatbuffers inside the Arrow columnar format, format version 1.0, sections "IPC File Format" and "RecordBatch message")
and refuses everything else. Nothing is allocated but what is read.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError
from kdcache.store.storage import Readable, Storage

_MAGIC = b"ARROW1"
_CONTINUATION = 0xFFFFFFFF
_RECORD_BATCH = 3
_MOST_METADATA = 1 << 16
_END = 1 << 16  # bytes: the footer of ten thousand rows
_BLOCK = np.dtype([("offset", "<i8"), ("metadata", "<i4"), ("", "<i4"), ("body", "<i8")])
_NODE = np.dtype([("length", "<i8"), ("nulls", "<i8")])
_BUFFER = np.dtype([("offset", "<i8"), ("length", "<i8")])


class _Table:
    """A flatbuffers table; every access is checked against the buffer."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        self._fields = at - self._number("<i", at)
        self._size = self._number("<H", self._fields)

    @classmethod
    def root(cls, data: bytes) -> _Table:
        return cls(data, int(struct.unpack_from("<I", data)[0]))

    def _number(self, form: str, at: int) -> int:
        if at < 0:
            raise CorruptCacheError("an offset leads out of the file")
        return int(struct.unpack_from(form, self._data, at)[0])

    def _place(self, field: int) -> int:
        slot = 4 + 2 * field
        offset = self._number("<H", self._fields + slot) if slot + 2 <= self._size else 0
        return self._at + offset if offset else 0

    def has(self, field: int) -> bool:
        return self._place(field) != 0

    def number(self, field: int, form: str) -> int:
        at = self._place(field)
        return self._number(form, at) if at else 0

    def table(self, field: int) -> _Table:
        at = self._place(field)
        if not at:
            raise CorruptCacheError("a part of its metadata is missing")
        return _Table(self._data, at + self._number("<I", at))

    def structs(self, field: int, dtype: np.dtype[np.void]) -> NDArray[np.void]:
        at = self._place(field)
        if not at:
            return np.zeros(0, dtype)
        start = at + self._number("<I", at)
        count = self._number("<I", start)
        if start + 4 + count * dtype.itemsize > len(self._data):
            raise CorruptCacheError("a list of its metadata leads out of the file")
        return np.frombuffer(self._data, dtype, count, start + 4)


@dataclass(frozen=True)
class Batch:
    """One record batch, read as it lies.

    Attributes:
        rows: in it.
        body: its bytes.
        buffers: `[B]` offset and length of each buffer in the body.
    """

    rows: int
    body: memoryview
    buffers: NDArray[np.void]

    def buffer(self, index: int) -> memoryview:
        """A buffer, checked to lie inside the body."""
        start, length = (int(x) for x in self.buffers[index])
        if not 0 <= start <= start + length <= len(self.body):
            raise CorruptCacheError("a buffer leads out of its batch")
        return self.body[start : start + length]


def read_blocks(storage: Storage, file: Readable, schema: pa.Schema) -> NDArray[np.void]:
    """Where the record batches of an IPC file lie: `[batches]` of offset, metadata and body lengths.

    Cost: the two ends of the file, at once; a third read where the footer is longer than 64 KiB.

    Raises:
        CorruptCacheError: not such a file, another schema, dictionaries, or a block outside of the file.
    """
    first, last = min(file.size, 16 + _MOST_METADATA), min(file.size, _END)
    head, tail = storage.read_ranges([(file, 0, first), (file, file.size - last, last)])
    length = int.from_bytes(tail[-10:-6], "little")
    if head[:6] != _MAGIC or tail[-6:] != _MAGIC or not 0 < length <= file.size - 18:
        raise CorruptCacheError("it is not an Arrow file")
    start = file.size - 10 - length
    footer = _Table.root(tail[-10 - length : -10] if length + 10 <= last else file.read(start, length))
    if len(footer.structs(2, _BLOCK)):
        raise CorruptCacheError("it has dictionaries, which a shard has not")
    _require_schema(head[8:], schema)
    blocks = footer.structs(3, _BLOCK)
    inside = (blocks["metadata"] >= 16) & (blocks["metadata"] <= _MOST_METADATA)
    for name in ("offset", "body"):
        inside &= (blocks[name] >= 0) & (blocks[name] <= file.size)  # so that their sum cannot overflow
    if not (inside & (blocks["offset"] + blocks["metadata"] + blocks["body"] <= file.size)).all():
        raise CorruptCacheError("a batch leads out of the file")
    return blocks


def is_compressed(metadata: bytes) -> bool:
    """Whether the body of a record batch is compressed, from the metadata of its block.

    Raises:
        CorruptCacheError: it is not the metadata of a record batch.
    """
    return _record_batch(metadata).has(3)


def _record_batch(metadata: bytes) -> _Table:
    """The header of a record batch, from the metadata of its block."""
    marker, length = struct.unpack_from("<Ii", metadata)
    if marker != _CONTINUATION or not 0 < length <= len(metadata) - 8:
        raise CorruptCacheError("its metadata is damaged")
    message = _Table.root(metadata[8 : 8 + length])
    if message.number(1, "<B") != _RECORD_BATCH:
        raise CorruptCacheError("it is not a record batch")
    return message.table(2)


def _require_schema(head: bytes, schema: pa.Schema) -> None:
    if int.from_bytes(head[:4], "little") != _CONTINUATION:
        raise CorruptCacheError("its schema is missing")
    length = int.from_bytes(head[4:8], "little")
    try:
        found = pa.ipc.read_schema(pa.py_buffer(head[: 8 + length]))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CorruptCacheError(f"its schema cannot be read: {error}") from None
    if not found.equals(schema, check_metadata=True):
        raise CorruptCacheError("its columns are not those of a shard of this cache")


def read_batch(data: bytes, metadata: int, columns: int, buffers: int) -> Batch:
    """A record batch from its block's bytes.

    Args:
        data: metadata and body.
        metadata: bytes of the metadata.
        columns: that it must have, none with nulls.
        buffers: that it must have.

    Raises:
        CorruptCacheError: not an uncompressed record batch of this shape.
    """
    header = _record_batch(data[:metadata])
    if header.has(3):
        raise CorruptCacheError("its batch is compressed, which a shard's is not")
    nodes, places = header.structs(1, _NODE), header.structs(2, _BUFFER)
    rows = header.number(0, "<q")
    if len(nodes) != columns or len(places) != buffers or (nodes["length"] != rows).any() or nodes["nulls"].any():
        raise CorruptCacheError("its batch does not have the columns of a shard")
    return Batch(rows, memoryview(data)[metadata:], places)
