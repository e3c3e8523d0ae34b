"""Arrow layout: where the columns of a record batch lie in an IPC file, read without trusting it.

Arrow's own reader allocates what a file asks for: a buffer whose head claims that it unfolds to a terabyte, or a
dictionary. This reads the few fields that say where the buffers are (flatbuffers inside the Arrow columnar format,
format version 1.0, sections "IPC File Format" and "RecordBatch message") and refuses everything else.

Guarantee: nothing is allocated but what is read, and what a caller allows a buffer to unfold to.
"""

from __future__ import annotations

import struct

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codec.streams import inflate
from kdcache.errors import CorruptCacheError
from kdcache.store.storage import Readable, Storage

_MAGIC = b"ARROW1"
_CONTINUATION = 0xFFFFFFFF
_RECORD_BATCH = 3
_ZSTD = 1  # of CompressionType; and 0 is the one method, by buffer
_PLAIN = -1  # the claimed length of a buffer that is not compressed after all
_PADDING = 64  # bytes at most behind the last number of a buffer
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


class RecordBatch:
    """One record batch, read without a copy; buffers that were unpacked are kept.

    Args:
        rows: in it.
        body: its bytes.
        buffers: `[B]` offset and length of each buffer in the body.
        compressed: whether each is a zstd frame behind its length.
    """

    def __init__(self, rows: int, body: memoryview, buffers: NDArray[np.void], compressed: bool) -> None:
        self.rows, self.buffers = rows, buffers
        self._body, self._compressed = body, compressed
        self._unpacked: dict[int, memoryview] = {}

    def buffer(self, index: int, most: int = 0) -> memoryview:
        """A buffer, checked to lie inside the body, and unpacked where it is compressed.

        Args:
            index: of the buffer.
            most: bytes that it may hold once it is unpacked, its padding left out.

        Raises:
            CorruptCacheError: it leads out of the body, is damaged, or claims more than `most`.
        """
        start, length = (int(x) for x in self.buffers[index])
        if not 0 <= start <= start + length <= len(self._body):
            raise CorruptCacheError("a buffer leads out of its batch")
        found = self._body[start : start + length]
        if not self._compressed:
            return found
        if index not in self._unpacked:
            self._unpacked[index] = _unpack(found, most + _PADDING)
        return self._unpacked[index]


def _unpack(buffer: memoryview, most: int) -> memoryview:
    """What a compressed buffer holds: 8 bytes of its length, then a frame, or plain bytes where that is -1."""
    if not len(buffer):
        return buffer
    claimed, data = struct.unpack_from("<q", buffer)[0], buffer[8:]
    if claimed == _PLAIN:
        if len(data) > most:
            raise CorruptCacheError(f"a buffer has {len(data)} bytes, but at most {most} are due")
        return data
    found = inflate(data, most)
    if len(found) != claimed:
        raise CorruptCacheError(f"a buffer claims {claimed} bytes and holds {len(found)}")
    return memoryview(found)  # type: ignore[arg-type]


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


def read_batch(data: bytes, metadata: int, nodes: int, buffers: int, compressed: bool) -> RecordBatch:
    """A record batch from its block's bytes.

    Args:
        data: metadata and body.
        metadata: bytes of the metadata.
        nodes: columns that it must have, the inner ones of lists counted; none has nulls.
        buffers: that it must have.
        compressed: whether its buffers must be compressed by zstd, or must not be compressed.

    Raises:
        CorruptCacheError: not a record batch of this shape.
    """
    header = _record_batch(data[:metadata])
    if header.has(3) != compressed:
        raise CorruptCacheError("its batch is compressed, or is not, where a shard's is otherwise")
    if compressed and (header.table(3).number(0, "<b"), header.table(3).number(1, "<b")) != (_ZSTD, 0):
        raise CorruptCacheError("its batch is compressed by another codec than zstd")
    found, places = header.structs(1, _NODE), header.structs(2, _BUFFER)
    rows = header.number(0, "<q")
    if len(found) != nodes or len(places) != buffers or found["nulls"].any():
        raise CorruptCacheError("its batch does not have the columns of a shard")
    outer = found["length"][np.r_[0 : nodes - 2 : 2 if compressed else 1, nodes - 2, nodes - 1]]
    if (outer != rows).any():
        raise CorruptCacheError("its columns have other numbers of rows")
    return RecordBatch(rows, memoryview(data)[metadata:], places, compressed)
