"""Row sets: which rows of a cache are meant, as one bit a row.

A list of 10^9 row numbers takes 8 GB; this takes 141 MB, and any row of it is found in the time that one binary search
takes. It reads as an ascending sequence of row numbers. Built and walked in blocks, so nothing of the size of the cache
is ever held but the bits.

Shapes: S numbers asked for at once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bits = NDArray[np.uint8]

_BLOCK = 64  # bytes of bits that share one count: 512 rows
_STEP = 1 << 22  # rows that are unfolded at once


class RowSet:
    """Rows of a cache, in ascending order. It may be sent to another process.

    Args:
        total: rows of the cache.
        bits: `[ceil(total / 8)]` uint8, bit i % 8 of byte i // 8 for row i, least significant first; none is set beyond
            `total`.
    """

    def __init__(self, total: int, bits: Bits) -> None:
        padded = bits
        if len(bits) % _BLOCK:
            padded = np.zeros(-(-len(bits) // _BLOCK) * _BLOCK, np.uint8)
            padded[: len(bits)] = bits
        self.total, self.bits = total, padded[: len(bits)]  # a view: the bits are held once
        self._blocks = padded.reshape(-1, _BLOCK)
        self._ends = np.cumsum(np.bitwise_count(self._blocks.view(np.uint64)).sum(axis=1, dtype=np.int64))

    def __reduce__(self) -> tuple[Any, ...]:
        return RowSet, (self.total, self.bits)

    @staticmethod
    def where(total: int, holds: Callable[[int, int], NDArray[np.bool_]]) -> RowSet:
        """The rows for which a condition holds.

        Args:
            total: rows of the cache.
            holds: gives `[stop - start]` for the rows from start to stop.
        """
        bits = np.zeros(-(-total // 8), np.uint8)
        for start in range(0, total, _STEP):
            stop = min(start + _STEP, total)
            bits[start // 8 : -(-stop // 8)] = np.packbits(holds(start, stop), bitorder="little")
        return RowSet(total, bits)

    @staticmethod
    def of_ranges(total: int, ranges: tuple[slice, ...]) -> RowSet:
        """The rows in any of these ranges, which may count from the end as Python's do."""
        spans = [part.indices(total)[:2] for part in ranges]

        def holds(start: int, stop: int) -> NDArray[np.bool_]:
            inside = np.zeros(stop - start, np.bool_)
            for first, last in spans:
                inside[max(0, first - start) : max(0, last - start)] = True
            return inside

        return RowSet.where(total, holds)

    def __and__(self, other: RowSet) -> RowSet:
        return RowSet(self.total, self.bits & other.bits)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self.total, _STEP):
            yield from self._between(start, start + _STEP).tolist()

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice | Ints) -> Ints: ...
    def __getitem__(self, index: int | slice | Ints) -> int | Ints:
        """The rows at these places of the sequence.

        Args:
            index: a number, a slice, or `[S]` numbers; those below 0 count from the end.

        Raises:
            IndexError: beyond the last.
        """
        if isinstance(index, slice):
            return self._at(np.arange(*index.indices(len(self))))
        places = np.asarray(index, np.int64)
        found = self._at(np.where(places < 0, places + len(self), places).reshape(-1))
        return found if places.ndim else int(found[0])

    def _at(self, places: Ints) -> Ints:
        if len(places) and not 0 <= places.min() <= places.max() < len(self):
            raise IndexError(f"place {places.max()} of {len(self)} rows")
        found = np.empty(len(places), np.int64)
        for start in range(0, len(places), _BLOCK * 64):  # each unfolds 512 bits
            some = places[start : start + _BLOCK * 64]
            block = np.searchsorted(self._ends, some, side="right")
            before = np.where(block > 0, self._ends[block - 1], 0)
            ones = np.unpackbits(self._blocks[block], axis=1, bitorder="little").cumsum(axis=1, dtype=np.uint16)
            found[start : start + len(some)] = block * 8 * _BLOCK + (ones <= (some - before)[:, None]).sum(axis=1)
        return found

    def _between(self, start: int, stop: int) -> Ints:
        """Those of the set from row `start`, a multiple of 8, to row `stop`."""
        bits = np.unpackbits(self.bits[start // 8 : -(-stop // 8)], bitorder="little")
        return np.flatnonzero(bits[: stop - start]) + start

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """All of them: 8 bytes a row."""
        return np.array(self.tolist(), dtype or np.int64)

    def tolist(self) -> list[int]:
        """All of them."""
        return list(self)

    def digest(self) -> bytes:
        """sha256 over the number of rows of the cache (little-endian int64) and the bits."""
        digest = hashlib.sha256(self.total.to_bytes(8, "little"))
        digest.update(self.bits.data)
        return digest.digest()


def set_bits(bits: Bits, rows: Ints) -> None:
    """Set the bits of these rows."""
    np.bitwise_or.at(bits, rows >> 3, (1 << (rows & 7)).astype(np.uint8))
