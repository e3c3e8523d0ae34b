"""Arrow shards: one IPC file a shard, any row in O(1).

Each stream of a row is a binary column, a zstd frame or nothing; beside them stand the number of positions and the
row's seal: crc32c over its shard, its number and all its bytes, checked on every read. A few rows make a record
batch, uncompressed, so any Arrow reader can map the file.
Bytes depend on nothing but the rows: the same shard is the same file.
Cost of a row: one read of its batch, and the codec.
"""

from __future__ import annotations

import struct
from functools import cached_property
from typing import Any

import pyarrow as pa

from kdcache.codec.streams import deflate
from kdcache.errors import CorruptCacheError
from kdcache.store.arrow_layout import Batch, read_batch, read_blocks
from kdcache.store.row_format import Record, RowFormat, read_stream, row_seal
from kdcache.store.shards import Shard, ShardWriter
from kdcache.store.storage import Storage

_ROWS = 4
_MOST_BATCH = 1 << 30


def rows_per_batch(form: RowFormat) -> int:
    """Rows of a record batch: 4, or fewer where their columns might outgrow the 32 bits of Arrow's offsets."""
    return max(1, min(_ROWS, _MOST_BATCH // form.most_bytes))


def shard_schema(form: RowFormat) -> pa.Schema:
    """Columns of a shard: the streams, then `positions` and `crc32c`."""
    streams = [(name, pa.binary()) for name in form.shapes(0)]
    return pa.schema([*streams, ("positions", pa.uint32()), ("crc32c", pa.uint32())])


class ArrowShardWriter(ShardWriter):
    """Writes one IPC file."""

    suffix = ".arrow"
    folder = False

    def __init__(self, storage: Storage, shard: int, form: RowFormat) -> None:
        super().__init__(storage, shard, form)
        self._sink, self._batch_rows = self.data.part(""), rows_per_batch(form)
        self._schema = shard_schema(form)
        self._writer = pa.ipc.new_file(pa.PythonFile(self._sink, mode="w"), self._schema)
        self._pending: list[dict[str, Any]] = []

    def _append(self, record: Record) -> None:
        streams = {name: deflate(stream) for name, stream in record.streams.items()}
        seal = row_seal(self.shard, self.tally.rows, record.positions, streams.values())
        self._pending.append({**streams, "positions": record.positions, "crc32c": seal})
        if len(self._pending) == self._batch_rows:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._pending, schema=self._schema))
            self._pending.clear()

    def _finish(self) -> list[dict[str, Any]]:
        self._flush()
        self._writer.close()
        return [self._sink.record()]

    @classmethod
    def reader(cls) -> type[Shard]:
        return ArrowShard


class ArrowShard(Shard):
    """Reads one IPC file."""

    def _open(self, objects: list[dict[str, Any]]) -> str:
        if len(objects) != 1:
            raise CorruptCacheError(f"shard {self.shard} is committed as {len(objects)} objects, but it is one file")
        name: str = objects[0]["name"]
        self._file = self._require(objects, name)
        self._names, self._batch_rows = list(self.form.shapes(0)), rows_per_batch(self.form)
        try:
            self._blocks = read_blocks(self.storage, self._file, shard_schema(self.form))
        except (CorruptCacheError, struct.error, ValueError) as error:
            raise CorruptCacheError(f"{self._file.name} cannot be read as a shard: {error}") from None
        if len(self._blocks) != -(-self.rows // self._batch_rows):
            raise CorruptCacheError(f"{self._file.name} is not a shard of {self.rows} rows")
        return name

    @cached_property
    def _buffers(self) -> int:
        return 3 * len(self._names) + 4  # a binary column has validity, offsets and data; a number no offsets

    def _load(self, index: int) -> Batch:
        start, metadata, _, body = (int(x) for x in self._blocks[index])

        def make() -> Batch:
            data = self._file.read(start, metadata + body)
            return read_batch(data, metadata, len(self._names) + 2, self._buffers)

        found: Batch = self.storage.recent.get((self._file, index), make)
        return found

    def _record(self, row: int) -> Record:
        index, at = divmod(row, self._batch_rows)
        batch = self._load(index)
        if batch.rows != min(self._batch_rows, self.rows - index * self._batch_rows):
            raise CorruptCacheError("its batch has another number of rows")
        stored = [self._stream(batch, column, at) for column in range(len(self._names))]
        numbers = 3 * len(self._names)
        positions, seal = (struct.unpack_from("<I", batch.buffer(numbers + i), 4 * at)[0] for i in (1, 3))
        if seal != row_seal(self.shard, row, positions, stored):
            raise CorruptCacheError("its crc32c does not match")
        shapes = self.form.shapes(positions)
        streams = {n: read_stream(data, *shapes[n]) for n, data in zip(self._names, stored, strict=True)}
        return Record(positions=positions, streams=streams)

    @staticmethod
    def _stream(batch: Batch, column: int, at: int) -> memoryview:
        offsets, data = batch.buffer(3 * column + 1), batch.buffer(3 * column + 2)
        start, end = struct.unpack_from("<ii", offsets, 4 * at)
        if not 0 <= start <= end <= len(data):
            raise CorruptCacheError("a value leads out of its column")
        return data[start:end]
