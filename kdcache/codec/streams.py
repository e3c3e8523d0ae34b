"""Streams: the named arrays that a codec makes of a row, their compression, and how they are read back safely.

The types of compiled loops are here too, and the problems that they return. Such a loop reads nothing before its index
is known to be inside its array. Each loop is in the file of its stream, encoding next to decoding.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]
Ids = NDArray[np.int32]
Keys = NDArray[np.int32] | NDArray[np.int64]
Values = NDArray[np.uint8] | NDArray[np.uint16]

FAR = 255
"""A distance in one byte that stands for itself or more."""

PROBLEMS = {
    1: "an id lies outside the vocabulary",
    2: "ids and their far distances do not agree",
    3: "a position has no value at the top level, or one above it",
    4: "the draws of a position do not add up",
    5: "a position has no entries, or more than it can have",
    6: "there are more or fewer values than entries that have one",
    7: "an entropy or a label's log-probability is not a number",
}
"""Why a row cannot be decoded, by the number that a compiled loop returns; 0 is for a sound row."""

VOCABULARY, FAR_ENDS, LEVELS, DRAWS, COUNT, VALUES, MEASURE = PROBLEMS

LEVEL = 1
"""The zstd level of every stream. Level 3 makes them no smaller and takes half as long again; docs/decisions/0005."""

Buffer = bytes | memoryview
Streams = dict[str, NDArray[Any]]
Shapes = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
Columns = dict[str, NDArray[Any]]
"""What a codec stores of each position, `[n, ...]` by name: its numbers as they are stored, and ids as such."""

_ZSTD = pa.Codec("zstd", compression_level=LEVEL)
_MAGIC = b"\x28\xb5\x2f\xfd"


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """The least unsigned type that holds every id of a vocabulary: two bytes or four."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def take(streams: Mapping[str, NDArray[Any]], name: str, dtype: np.dtype[Any], size: int) -> NDArray[Any]:
    """A stream of exactly this type and length, `[size]`, aligned and not to be written to.

    Raises:
        CorruptCacheError: it has another type or length.
    """
    return whole(streams, name, dtype, size, size)


def whole(streams: Mapping[str, NDArray[Any]], name: str, dtype: np.dtype[Any], least: int, most: int) -> NDArray[Any]:
    """A stream of this type and of any length between two bounds, aligned and not to be written to.

    Raises:
        CorruptCacheError: it is missing, or has another type or length.
    """
    stream = streams.get(name)
    if stream is None or stream.dtype != dtype or stream.ndim != 1:
        raise CorruptCacheError(f"stream {name!r} is not an array of {dtype.name}")
    if not least <= len(stream) <= most:
        limits = f"{least}" if least == most else f"{least} to {most}"
        raise CorruptCacheError(f"stream {name!r} has {len(stream)} numbers, but its row has {limits}")
    # One type whatever the caller's: compiled loops know nothing of byte order, and are compiled once for each type.
    if not (stream.flags.c_contiguous and stream.flags.aligned and dtype.isnative):
        stream = np.array(stream, dtype.newbyteorder("="))
    if stream.flags.writeable:
        stream = stream.view()
        stream.flags.writeable = False
    return stream


def deflate(data: NDArray[Any]) -> bytes:
    """Compress an array's bytes into one zstd frame; nothing becomes nothing."""
    return (
        bytes(_ZSTD.compress(np.ascontiguousarray(data).reshape(-1).view(np.uint8), asbytes=True)) if data.size else b""
    )


def inflate(data: Buffer, most: int, dtype: np.dtype[Any] | type = np.uint8) -> NDArray[Any]:
    """Decompress one zstd frame into a read-only array.

    The size that the frame declares is read first, so a bomb allocates nothing.

    Args:
        data: a frame, or nothing for nothing.
        most: bytes that it may hold.
        dtype: of the result.

    Raises:
        CorruptCacheError: no frame, more than `most` bytes, not a whole number of items, or damaged.
    """
    if not len(data):
        return np.zeros(0, dtype)
    start, size = _declared_size(bytes(data[:18]))
    if not 0 <= size <= most or size % np.dtype(dtype).itemsize:
        raise CorruptCacheError(f"a frame declares {size} bytes, but at most {most} are due")
    if _is_raw(data, start, size):
        return np.frombuffer(bytes(data[start + 3 :]), dtype)
    try:
        return np.frombuffer(_ZSTD.decompress(data, size, asbytes=True), dtype)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptCacheError(f"a frame is damaged: {error}") from None


def _declared_size(frame: bytes) -> tuple[int, int]:
    """Where the first block starts and the content size of a zstd frame (RFC 8878, section 3.1.1.1), -1 if unknown."""
    if len(frame) < 6 or frame[:4] != _MAGIC:
        return 0, -1
    descriptor = frame[4]
    single, flag, dictionary = descriptor >> 5 & 1, descriptor >> 6, (0, 1, 2, 4)[descriptor & 3]
    width = (1 if single else 0, 2, 4, 8)[flag]
    start = 5 + (not single) + dictionary
    if not width or len(frame) < start + width:
        return 0, -1
    return start + width, int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)


def _is_raw(data: Buffer, start: int, size: int) -> bool:
    """Whether all that a frame has is one last block of bytes as they are; the library takes 5 us to find out.

    Bytes that do not compress are stored so: a block header of three bytes, then they (RFC 8878, section 3.1.1.2).
    """
    plain = not data[4] & 0b00001111  # neither reserved bit, checksum nor dictionary
    return plain and len(data) == start + 3 + size and data[start : start + 3] == (size << 3 | 1).to_bytes(3, "little")
