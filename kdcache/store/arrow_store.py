"""Arrow shards: one IPC file a shard, memory-mapped, any row in O(1).

A row is one record of binary columns: its tokens, the lengths and documents of its pieces,
which tokens may be labels (empty when all may), the number of its targets, and the codec's
streams. Record batches hold a fixed number of rows, so a row's batch is a division away.
Each row carries a crc32c of itself, its number and its shard's, checked on every read.
Bytes depend on nothing but the rows: the same shard is the same file.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa

from kdcache.codec import STREAMS, Codec
from kdcache.codec.streams import deflate, inflate
from kdcache.errors import CorruptCacheError
from kdcache.rows import IGNORE, PackedRow
from kdcache.store.durable import NewFile, sha256_file
from kdcache.targets import SparseTargets

FOLDER = "shards"
_ROWS_PER_BATCH = 16
_LAYOUT = ("tokens", "piece_lengths", "piece_documents", "supervised")
_BYTES = (*_LAYOUT, *STREAMS)
_SCHEMA = pa.schema([(name, pa.binary()) for name in _BYTES] + [("positions", pa.uint32()), ("crc32c", pa.uint32())])

_DAMAGE = (CorruptCacheError, pa.ArrowException, IndexError, OSError, ValueError, TypeError, struct.error)
"""What reading a damaged file can raise, in our code and in the libraries."""


def shard_name(shard: int) -> str:
    """The object that holds a shard, relative to the cache."""
    return f"{FOLDER}/{shard:05d}.arrow"


class ArrowShardWriter:
    """Writes one shard; nothing is visible before `publish`.

    Attributes:
        rows, positions, entries: written so far.
    """

    def __init__(self, cache: Path, shard: int, codec: Codec, seq_len: int) -> None:
        self.name = shard_name(shard)
        self._shard, self._seq_len = shard, seq_len
        self.rows = self.positions = self.entries = 0
        self._cache = cache
        self._codec = codec
        self._tokens = hashlib.sha256()
        self._pending: list[dict[str, Any]] = []
        self._file = NewFile(cache / self.name)
        self._writer = pa.ipc.new_file(pa.PythonFile(self._file, mode="w"), _SCHEMA)

    @property
    def tokens_sha256(self) -> str:
        """sha256 over each row's token and piece counts, tokens and piece lengths."""
        return self._tokens.hexdigest()

    def write(self, row: PackedRow, targets: SparseTargets) -> None:
        """Append a row and the targets of its labelled slots, in slot order."""
        record: dict[str, Any] = {
            "tokens": deflate(row.tokens.astype(self._codec.id_dtype)),
            "piece_lengths": row.piece_lengths.astype("<i4").tobytes(),
            "piece_documents": row.piece_documents.astype("<i8").tobytes(),
            "supervised": b"" if row.supervised is None else np.packbits(row.supervised).tobytes(),
            "positions": len(targets.count),
            **self._codec.encode(targets),
        }
        record["crc32c"] = row_crc(self._shard, self.rows, record["positions"], [record[name] for name in _BYTES])
        digest_row(self._tokens, row)
        self.rows += 1
        self.positions += len(targets.count)
        self.entries += int(targets.count.sum())
        self._pending.append(record)
        if len(self._pending) == _ROWS_PER_BATCH:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            self._writer.write_batch(pa.RecordBatch.from_pylist(self._pending, schema=_SCHEMA))
            self._pending.clear()

    def publish(self) -> tuple[dict[str, Any], bool]:
        """Finish the file and give it its name; returns the object that stands there, and whether it is this one.

        If a file of that name exists without a commit, some writer stopped between the two, or
        is about to commit. It appeared whole, so if it holds these tokens it is as good as this
        one and stays; if it is damaged it makes room.
        """
        self._flush()
        self._writer.close()
        path = self._cache / self.name
        if not self._file.publish() and not self._same_tokens(path):
            path.unlink(missing_ok=True)
            self._file.publish()
        sha256 = sha256_file(path)
        return {"name": self.name, "bytes": path.stat().st_size, "sha256": sha256}, sha256 == self._file.sha256

    def _same_tokens(self, path: Path) -> bool:
        if sha256_file(path) == self._file.sha256:
            return True
        digest = hashlib.sha256()
        try:
            for row, _ in ArrowShard(path, self._shard, self._codec, self._seq_len, self.rows):
                digest_row(digest, row)
        except CorruptCacheError:
            return False
        return digest.hexdigest() == self.tokens_sha256

    def __enter__(self) -> ArrowShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.__exit__(kind, error, at)


class ArrowShard:
    """Reads one shard; every length and id is checked before use.

    Raises:
        CorruptCacheError: the file is not the shard that its commit promises.
    """

    def __init__(self, path: Path, shard: int, codec: Codec, seq_len: int, rows: int) -> None:
        self._path, self._shard, self._codec, self._seq_len = path, shard, codec, seq_len
        try:
            self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        except (OSError, pa.ArrowException) as error:
            raise CorruptCacheError(f"{path} cannot be read as a shard: {error}") from None
        batches = -(-rows // _ROWS_PER_BATCH)
        if not self._file.schema.equals(_SCHEMA) or self._file.num_record_batches != batches:
            raise CorruptCacheError(f"{path} is not a shard of {rows} rows")
        self.rows = rows

    def read(self, row: int) -> tuple[PackedRow, SparseTargets]:
        """A row and the targets of its labelled slots."""
        try:
            batch = self._file.get_batch(row // _ROWS_PER_BATCH)
            batch.validate(full=True)
            place = row % _ROWS_PER_BATCH
            record = {name: batch.column(name)[place].as_buffer() for name in _BYTES}
            promised, crc32c = (batch.column(name)[place].as_py() for name in ("positions", "crc32c"))
            if crc32c != row_crc(self._shard, row, promised, list(record.values())):
                raise CorruptCacheError("its crc32c does not match")
            packed = self._layout(record)
            positions = int((packed.labels(self._seq_len) != IGNORE).sum())
            if promised != positions:
                raise CorruptCacheError(f"it has {promised} targets for {positions} labels")
            return packed, self._codec.decode(record, positions)
        except _DAMAGE as error:
            raise CorruptCacheError(f"{self._path}, row {row}: {error}") from None

    def _layout(self, columns: dict[str, Any]) -> PackedRow:
        lengths = np.frombuffer(columns["piece_lengths"], "<i4")
        documents = np.frombuffer(columns["piece_documents"], "<i8")
        count = int(lengths.sum(dtype=np.int64))
        if len(lengths) != len(documents) or lengths.min(initial=1) < 1 or not 1 <= count <= self._seq_len:
            raise CorruptCacheError(f"its pieces do not add up to a row of 1 to {self._seq_len} tokens")
        dtype = self._codec.id_dtype
        tokens = inflate(columns, "tokens", count * dtype.itemsize).view(dtype).astype(np.int32)
        if tokens.min() < 0 or tokens.max() >= self._codec.vocab_size:
            raise CorruptCacheError("it has a token outside the vocabulary")
        mask = columns["supervised"]
        if len(mask) not in (0, -(-len(tokens) // 8)):
            raise CorruptCacheError("its mask is not as long as its tokens")
        supervised = np.unpackbits(np.frombuffer(mask, np.uint8), count=len(tokens)).astype(bool) if len(mask) else None
        return PackedRow(tokens=tokens, piece_lengths=lengths, piece_documents=documents, supervised=supervised)

    def __iter__(self) -> Iterator[tuple[PackedRow, SparseTargets]]:
        return (self.read(row) for row in range(self.rows))


def row_crc(shard: int, row: int, positions: int, columns: Sequence[bytes | memoryview]) -> int:
    """crc32c of a row: its shard, number and target count (uint32 each), then each column's length and bytes."""
    crc = google_crc32c.value(struct.pack("<III", shard, row, positions))
    for column in columns:
        crc = google_crc32c.extend(google_crc32c.extend(crc, struct.pack("<I", len(column))), column)
    return int(crc)


def digest_row(digest: Any, row: PackedRow) -> None:
    """Add a row's tokens and pieces to a running sha256."""
    digest.update(np.array([len(row.tokens), len(row.piece_lengths)], "<i8").tobytes())
    digest.update(row.tokens.astype("<i4").tobytes())
    digest.update(row.piece_lengths.astype("<i4").tobytes())
