"""Streams: the named byte strings that a codec makes of a row, and how they are read back safely."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numcodecs import Zstd

from kdcache.errors import CorruptCacheError

STREAMS = ("ids", "ids_far", "values", "scalars")
"""What a store keeps for each row, whatever the codec; a codec may leave some empty."""

Buffer = bytes | memoryview

_ZSTD = Zstd(level=3)
_MAGIC = b"\x28\xb5\x2f\xfd"


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """The least unsigned type that holds every id of a vocabulary: two bytes or four."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def whole(streams: Mapping[str, Buffer], name: str, dtype: np.dtype[Any], shape: tuple[int, int]) -> np.ndarray:
    """A stream as an array of exactly this shape.

    Raises:
        CorruptCacheError: it has another length.
    """
    wanted = shape[0] * shape[1] * dtype.itemsize
    if len(streams[name]) != wanted:
        raise CorruptCacheError(
            f"stream {name!r} has {len(streams[name])} bytes, but {shape[0]} x {shape[1]} {dtype.name} are {wanted}"
        )
    return np.frombuffer(streams[name], dtype).reshape(shape)


def deflate(data: np.ndarray) -> bytes:
    """Compress an array's bytes; nothing becomes nothing."""
    return bytes(_ZSTD.encode(np.ascontiguousarray(data))) if data.size else b""


def inflate(streams: Mapping[str, Buffer], name: str, size: int) -> np.ndarray:
    """Decompress a stream to exactly `size` bytes, `[size]` uint8.

    The size that the frame declares is read first, so a bomb allocates nothing.

    Raises:
        CorruptCacheError: not a frame of that size, or damaged.
    """
    data = bytes(streams[name])
    if not size and not data:
        return np.zeros(0, np.uint8)
    if _declared_size(data) != size:
        raise CorruptCacheError(f"stream {name!r} does not hold the {size} bytes that its row needs")
    out = np.empty(size, np.uint8)
    try:
        _ZSTD.decode(data, out=out)
    except (RuntimeError, ValueError) as error:
        raise CorruptCacheError(f"stream {name!r} is damaged: {error}") from None
    return out


def _declared_size(frame: bytes) -> int | None:
    """The content size in a zstd frame header (RFC 8878, section 3.1.1.1), None if it has none."""
    if len(frame) < 6 or frame[:4] != _MAGIC:
        return None
    descriptor = frame[4]
    single, flag, dictionary = descriptor >> 5 & 1, descriptor >> 6, (0, 1, 2, 4)[descriptor & 3]
    width = (1 if single else 0, 2, 4, 8)[flag]
    start = 5 + (not single) + dictionary
    if not width or len(frame) < start + width:
        return None
    return int.from_bytes(frame[start : start + width], "little") + (256 if width == 2 else 0)
