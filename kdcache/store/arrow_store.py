"""Arrow shards: one IPC file a shard, any row in O(1).

Its columns are the streams of a row (arrow_columns.py), the number of positions, and the row's seal: crc32c over the
shard, the row's number and all its streams, checked on every read. A few rows make a record batch.
pyarrow writes the file; arrow_layout.py reads it without trusting it.

Guarantee: bytes depend on nothing but the rows and the version of pyarrow: the same shard is the same file.
Cost of a row: one read of its batch, whose buffers are unpacked once while it is among the last that were read, and the
codec. Writing holds one batch.
"""

from __future__ import annotations

import struct
from typing import Any

import pyarrow as pa

from kdcache.errors import CorruptCacheError
from kdcache.store.arrow_columns import Stored, columns_of, record_batch, tally_of
from kdcache.store.arrow_layout import RecordBatch, read_batch, read_blocks
from kdcache.store.row_format import Record, RowFormat, row_seal
from kdcache.store.shards import Shard, ShardWriter
from kdcache.store.storage import Storage

_LEVEL = 3  # of Arrow's zstd: at 1 float16 values that are stored as float32 take an eighth more


class ArrowShardWriter(ShardWriter):
    """Writes one IPC file."""

    suffix = ".arrow"
    folder = False

    def __init__(self, storage: Storage, shard: int, form: RowFormat) -> None:
        super().__init__(storage, shard, form)
        self._sink, self._columns = self.data.part(""), columns_of(form)
        codec = pa.Codec("zstd", compression_level=_LEVEL) if self._columns.compressed else None
        self._writer = pa.ipc.new_file(
            pa.PythonFile(self._sink, mode="w"), self._columns.schema, options=pa.ipc.IpcWriteOptions(compression=codec)
        )
        self._pending: list[tuple[list[Stored], int, int]] = []

    def append(self, record: Record) -> None:
        stored = self._columns.store(record.streams)
        seal = row_seal(self.shard, self.tally.rows, record.positions, stored)
        self._pending.append((stored, record.positions, seal))
        if len(self._pending) == self._columns.batch_rows:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_batch(record_batch(self._columns, self._pending))
            self._pending.clear()

    def finish(self) -> list[dict[str, Any]]:
        self._flush()
        self._writer.close()
        return [self._sink.record()]


class ArrowShard(Shard):
    """Reads one IPC file."""

    def open(self, objects: list[dict[str, Any]]) -> str:
        if len(objects) != 1:
            raise CorruptCacheError(f"shard {self.shard} is committed as {len(objects)} objects, but it is one file")
        name: str = objects[0]["name"]
        self._file, self._columns = self.require(objects, name), columns_of(self.form)
        try:
            self._blocks = read_blocks(self.storage, self._file, self._columns.schema)
        except (CorruptCacheError, struct.error, ValueError) as error:
            raise CorruptCacheError(f"{self._file.name} cannot be read as a shard: {error}") from None
        if len(self._blocks) != -(-self.rows // self._columns.batch_rows):
            raise CorruptCacheError(f"{self._file.name} is not a shard of {self.rows} rows")
        return name

    def _batch(self, index: int) -> RecordBatch:
        start, metadata, _, body = (int(x) for x in self._blocks[index])

        def make() -> RecordBatch:
            data, columns = self._file.read(start, metadata + body), self._columns
            return read_batch(data, metadata, columns.nodes, columns.buffers, columns.compressed)

        found: RecordBatch = self.storage.batches.get((self._file, index), make)
        if found.rows != min(self._columns.batch_rows, self.rows - index * self._columns.batch_rows):
            raise CorruptCacheError("its batch has another number of rows")
        return found

    def record(self, row: int) -> Record:
        index, at = divmod(row, self._columns.batch_rows)
        batch = self._batch(index)
        stored, (positions, seal) = self._columns.find(batch, at), tally_of(self._columns, batch, at)
        if seal != row_seal(self.shard, row, positions, stored):
            raise CorruptCacheError("its crc32c does not match")
        return Record(positions=positions, streams=self._columns.unpack(stored, self.form.shapes(positions)))
