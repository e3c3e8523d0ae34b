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

_GROUP_BYTES = 32 << 20
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


def _write(cache: Cache, out: Path, on_row: OnRow, open_writer: Callable[[Any], Any], schema: pa.Schema) -> None:
    with NewFile(out) as file:
        with open_writer(pa.PythonFile(file, mode="w")) as writer:
            waiting: list[pa.RecordBatch] = []
            size = 0
            for number, record in enumerate(row_tables(cache), 1):
                waiting.append(record_batch(record, schema))
                size += waiting[-1].nbytes
                if size >= _GROUP_BYTES:
                    _flush(writer, waiting, schema)
                    waiting, size = [], 0
                on_row(number)
            _flush(writer, waiting, schema)
        publish(file, out)


def _flush(writer: Any, waiting: list[pa.RecordBatch], schema: pa.Schema) -> None:
    """Write the rows that wait as one group."""
    if waiting:
        table = pa.Table.from_batches(waiting, schema).combine_chunks()
        writer.write_table(table, len(table))
