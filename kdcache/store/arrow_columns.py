"""Arrow columns: the two layouts of the streams of rows in a record batch.

Numbers (`float32` and `float16` caches): each stream is a list column of plain numbers, and Arrow's own zstd
compresses the buffers of a batch. pyarrow, polars and duckdb read them. A float16 stream is stored as float32, which
holds it exactly, because duckdb reads no float16; zstd removes nearly all of the difference (docs/decisions/0015).

Frames (4 to 16 bits): each stream is a binary column, a zstd frame a row. Only kdcache can decode them.

Either way `positions` and `crc32c` are columns next to the streams, one uint32 a row each.
Nothing is allocated that is larger than the manifest allows, whatever a buffer claims.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.codec.streams import deflate
from kdcache.errors import CorruptCacheError
from kdcache.store.arrow_layout import RecordBatch
from kdcache.store.row_format import RowFormat, Shapes, read_stream

Stored = memoryview | bytes | NDArray[Any]

_TALLY = (("positions", pa.uint32()), ("crc32c", pa.uint32()))
_ROWS = 4
_MOST_FRAMES = 1 << 30  # bytes of a batch; the offsets of a column are of 32 bits
_MOST_NUMBERS = 1 << 20  # bytes of a batch: whoever reads a row unpacks its whole batch
_HALF, _SINGLE = np.dtype("<f2"), np.dtype("<f4")


class Columns(Protocol):
    """The layout of the streams of rows in a record batch.

    Attributes:
        schema: the columns: the streams, then `positions` and `crc32c`.
        batch_rows: rows of a record batch, but for the last.
        nodes, buffers: that a record batch must have.
        compressed: whether Arrow compresses its buffers.
    """

    schema: pa.Schema
    batch_rows: int
    nodes: int
    buffers: int
    compressed: bool

    def store(self, streams: dict[str, NDArray[Any]]) -> list[Stored]:
        """The streams of a row as its seal covers them."""

    def columns(self, rows: Sequence[list[Stored]]) -> list[pa.Array]:
        """The columns of the streams of several rows."""

    def find(self, batch: RecordBatch, at: int) -> list[Stored]:
        """The streams of the row `at` of a batch as its seal covers them.

        Raises:
            CorruptCacheError: a buffer that is damaged, too large, or led out of.
        """

    def unpack(self, stored: Sequence[Stored], shapes: Shapes) -> dict[str, NDArray[Any]]:
        """The streams, none larger than its shape.

        Raises:
            CorruptCacheError: one that is.
        """


def columns_of(form: RowFormat) -> Columns:
    """The columns of the rows of a cache."""
    return TypedColumns(form) if form.typed else Frames(form)


def tally_of(columns: Columns, batch: RecordBatch, at: int) -> tuple[int, int]:
    """`positions` and `crc32c` of the row `at` of a batch."""
    positions, seal = (
        struct.unpack_from("<I", batch.buffer(columns.buffers - back, 4 * batch.rows), 4 * at)[0] for back in (3, 1)
    )
    return positions, seal


def record_batch(columns: Columns, rows: Sequence[tuple[list[Stored], int, int]]) -> pa.RecordBatch:
    """A record batch of rows: the stored streams, positions and seal of each."""
    made = columns.columns([stored for stored, _, _ in rows])
    made += [pa.array([row[i] for row in rows], pa.uint32()) for i in (1, 2)]
    return pa.RecordBatch.from_arrays(made, schema=columns.schema)


class Frames:
    """Each stream a binary column, a zstd frame or nothing a row; the seal covers the frames."""

    compressed = False

    def __init__(self, form: RowFormat) -> None:
        names = list(form.shapes(0))
        self.schema = pa.schema([*((name, pa.binary()) for name in names), *_TALLY])
        self.batch_rows = max(1, min(_ROWS, _MOST_FRAMES // form.most_bytes))
        self.nodes, self.buffers = len(names) + 2, 3 * len(names) + 4  # a number has no offsets

    def store(self, streams: dict[str, NDArray[Any]]) -> list[Stored]:
        return [deflate(stream) for stream in streams.values()]

    def columns(self, rows: Sequence[list[Stored]]) -> list[pa.Array]:
        return [pa.array(column, pa.binary()) for column in zip(*rows, strict=True)]

    def find(self, batch: RecordBatch, at: int) -> list[Stored]:
        return [self._frame(batch, 3 * column, at) for column in range(self.nodes - 2)]

    @staticmethod
    def _frame(batch: RecordBatch, first: int, at: int) -> memoryview:
        offsets, data = batch.buffer(first + 1), batch.buffer(first + 2)
        start, end = struct.unpack_from("<ii", offsets, 4 * at)
        if not 0 <= start <= end <= len(data):
            raise CorruptCacheError("a value leads out of its column")
        return data[start:end]

    def unpack(self, stored: Sequence[Stored], shapes: Shapes) -> dict[str, NDArray[Any]]:
        return {n: read_stream(s, *shapes[n]) for n, s in zip(shapes, stored, strict=True)}  # type: ignore[arg-type]


class TypedColumns:
    """Each stream a list column of its numbers; the seal covers the plain numbers, as in zarr."""

    compressed = True

    def __init__(self, form: RowFormat) -> None:
        self._shapes = form.shapes(form.seq_len)
        types = ((name, pa.list_(pa.from_numpy_dtype(_wide(dtype)))) for name, (dtype, _) in self._shapes.items())
        self.schema = pa.schema([*types, *_TALLY])
        self.batch_rows = max(1, min(_ROWS, _MOST_NUMBERS // form.most_bytes))
        streams = len(self._shapes)
        self.nodes, self.buffers = 2 * streams + 2, 4 * streams + 4  # a list has a node and two buffers of its own

    def store(self, streams: dict[str, NDArray[Any]]) -> list[Stored]:
        return list(streams.values())

    def columns(self, rows: Sequence[list[Stored]]) -> list[pa.Array]:
        made = []
        for column in zip(*rows, strict=True):
            ends = np.cumsum([0, *(len(stream) for stream in column)], dtype=np.int32)
            numbers = np.concatenate(column)
            made.append(pa.ListArray.from_arrays(pa.array(ends), pa.array(numbers.astype(_wide(numbers.dtype)))))
        return made

    def find(self, batch: RecordBatch, at: int) -> list[Stored]:
        return [
            self._numbers(batch, 4 * column, at, dtype, math.prod(shape))
            for column, (dtype, shape) in enumerate(self._shapes.values())
        ]

    @staticmethod
    def _numbers(batch: RecordBatch, first: int, at: int, dtype: np.dtype[Any], most: int) -> NDArray[Any]:
        wide = _wide(dtype)
        offsets = batch.buffer(first + 1, 4 * (batch.rows + 1))
        data = batch.buffer(first + 3, most * batch.rows * wide.itemsize)
        start, end = struct.unpack_from("<ii", offsets, 4 * at)
        if not 0 <= start <= end <= len(data) // wide.itemsize:
            raise CorruptCacheError("a value leads out of its column")
        if end - start > most:
            raise CorruptCacheError(f"a value has {end - start} numbers, above {most}")
        found = np.frombuffer(data, wide, end - start, start * wide.itemsize)
        if wide == dtype:
            return found
        with np.errstate(over="ignore"):
            narrow = found.astype(dtype)
        if narrow.astype(wide).tobytes() != found.tobytes():
            raise CorruptCacheError("a number of a float16 stream is no float16")
        return narrow

    def unpack(self, stored: Sequence[Stored], shapes: Shapes) -> dict[str, NDArray[Any]]:
        return dict(zip(shapes, stored, strict=True))  # type: ignore[arg-type]


def _wide(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The type of a number in a column."""
    return _SINGLE if dtype == _HALF else dtype
