"""Mutator: seeded, structure-blind changes of bytes, of the kinds that disks, networks and liars make."""

from __future__ import annotations

import numpy as np

_BOUNDARIES = [0, 1, 2, 7, 8, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32]
_BOUNDARIES += [1 << 40, (1 << 62), (1 << 63) - 1, 1 << 63, (1 << 64) - 2, (1 << 64) - 1]


class Mutator:
    """Changes bytes in one to three ways at a time; a pure function of its seed."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self._ways = [
            self._flip, self._flip, self._byte, self._splice, self._truncate, self._zeros, self._number, self._number,
            self._swap, self._delete, self._insert,
        ]  # fmt: skip

    def below(self, stop: int) -> int:
        """A number from 0 to `stop`, exclusive; 0 where there is none."""
        return int(self.random.integers(max(1, stop)))

    def __call__(self, data: bytes) -> bytes:
        """Other bytes; now and then the same."""
        changed = bytearray(data)
        for _ in range(1 + self.below(3)):
            if changed:
                self._ways[self.below(len(self._ways))](changed)
        return bytes(changed)

    def _span(self, data: bytearray, most: int = 64) -> tuple[int, int]:
        start = self.below(len(data))
        return start, min(len(data), start + 1 + self.below(most))

    def _flip(self, data: bytearray) -> None:
        data[self.below(len(data))] ^= 1 << self.below(8)

    def _byte(self, data: bytearray) -> None:
        data[self.below(len(data))] = self.below(256)

    def _splice(self, data: bytearray) -> None:
        start, end = self._span(data)
        at = self.below(len(data) - (end - start) + 1)
        data[at : at + end - start] = data[start:end]

    def _truncate(self, data: bytearray) -> None:
        del data[self.below(len(data)) :]

    def _zeros(self, data: bytearray) -> None:
        start, end = self._span(data)
        data[start:end] = bytes(end - start)

    def _number(self, data: bytearray) -> None:
        size = (4, 8)[self.below(2)]
        value = (*_BOUNDARIES, len(data), len(data) - 1)[self.below(len(_BOUNDARIES) + 2)] + (0, 0, -1)[self.below(3)]
        at = self.below(len(data)) & (~(size - 1) if self.below(4) else -1)  # headers align their numbers
        data[at : at + size] = (value % (1 << 8 * size)).to_bytes(size, "little")

    def _swap(self, data: bytearray) -> None:
        start, end = self._span(data)
        at = self.below(len(data) - (end - start) + 1)
        if at + end - start <= start or end <= at:
            data[at : at + end - start], data[start:end] = data[start:end], data[at : at + end - start]

    def _delete(self, data: bytearray) -> None:
        start, end = self._span(data)
        del data[start:end]

    def _insert(self, data: bytearray) -> None:
        start, end = self._span(data)
        at = self.below(len(data))
        data[at:at] = data[start:end]
