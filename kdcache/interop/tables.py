"""Tables: Parquet, Arrow and JSON lines with one record a row of a cache (`row_table`).

Guarantee: a file appears whole or not at all. Cost: one pass over the cache; in memory a few rows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from kdcache.cache import Cache
from kdcache.errors import CacheError
from kdcache.interop.row_table import record_batch, row_tables, schema_of
from kdcache.store.atomic_files import NewFile, NewFolder

OnRow = Callable[[int], None]

_GROUP_BYTES = 8 << 20
"""Bytes of a row group of a Parquet file or a batch of an Arrow file, before compression."""


def write_parquet(cache: Cache, out: Path, on_row: OnRow) -> None:
    """Write a Parquet file, zstd-compressed."""
    import pyarrow.parquet as parquet

    schema = schema_of(cache.manifest)
    _write(cache, out, on_row, lambda sink: parquet.ParquetWriter(sink, schema, compression="zstd"), schema)


def write_arrow(cache: Cache, out: Path, on_row: OnRow) -> None:
    """Write an Arrow IPC file, zstd-compressed."""
    schema = schema_of(cache.manifest)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    _write(cache, out, on_row, lambda sink: pa.ipc.new_file(sink, schema, options=options), schema)


def write_jsonl(cache: Cache, out: Path, on_row: OnRow) -> None:
    """Write JSON lines."""
    with NewFile(out) as file:
        for number, record in enumerate(row_tables(cache), 1):
            file.write(orjson.dumps(record.lists(), option=orjson.OPT_APPEND_NEWLINE))
            on_row(number)
        publish(file, out)


def publish(new: NewFile | NewFolder, out: Path) -> None:
    """Give a new file or folder its name.

    Raises:
        CacheError: somebody has taken it meanwhile.
    """
    if not new.publish():
        raise CacheError(f"{out} has appeared while it was written; nothing was replaced")


class RowGroups:
    """Writes batches of rows as groups of some size: row groups of Parquet, record batches of Arrow.

    Args:
        writer: of a Parquet or Arrow file; whoever opened it closes it, after `flush`.
        schema: of the batches.
    """

    def __init__(self, writer: Any, schema: pa.Schema) -> None:
        self._writer, self._schema = writer, schema
        self._waiting: list[pa.RecordBatch] = []
        self._size = 0

    def add(self, batch: pa.RecordBatch) -> None:
        """Write a batch, together with others."""
        self._waiting.append(batch)
        self._size += batch.nbytes
        if self._size >= _GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self._waiting:
            table = pa.Table.from_batches(self._waiting, self._schema).combine_chunks()
            self._writer.write_table(table, len(table))
            self._waiting, self._size = [], 0


def _write(cache: Cache, out: Path, on_row: OnRow, open_writer: Callable[[Any], Any], schema: pa.Schema) -> None:
    with NewFile(out) as file:
        with open_writer(pa.PythonFile(file, mode="w")) as writer:
            groups = RowGroups(writer, schema)
            for number, record in enumerate(row_tables(cache), 1):
                groups.add(record_batch(record, schema))
                on_row(number)
            groups.flush()
        publish(file, out)
