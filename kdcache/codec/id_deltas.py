"""Runs: the ids of a position as one or two runs of rising ranks, in about a byte an entry.

A rank is stored as its distance to the one before it in its run, less one (the first of a run: as it is), in one byte;
255 stands for 255 or more, and by how much it is exceeded follows after the bytes of all entries, in planes of two,
three or four bytes, high ones first. A position has one run, or one of heavies and one of lights.

Sorting costs no bits: an order would take log2(K!) of them. Whatever belongs to an entry is carried through the sort in
the low bits of its key.

Cost: 0.5 ns an entry to unpack; packing is a sort of 32-bit keys, or 64-bit ones where rank and payload need them.

Shapes: n positions, K entries, E entries in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.id_ranks import IdOrder
from kdcache.codec.packing import pack_runs
from kdcache.codec.streams import FAR, Ints, Keys
from kdcache.errors import TargetError

_LARGE = 1 << 22  # ranks in a table


@dataclass(frozen=True)
class Runs:
    """How ids and what belongs to them become sorted keys, and keys bytes.

    Attributes:
        order: of the ids.
        vocab_size: ids lie below it.
        width: K.
        payload_bits: of each entry, carried through the sort.
    """

    order: IdOrder
    vocab_size: int
    width: int
    payload_bits: int

    @cached_property
    def lookup(self) -> NDArray[np.int32]:
        """`[H]` the id of each rank below H; beyond, they are equal.

        Complete and padded by what K near distances can reach, where that is little: then unpacking need not compare.
        """
        size = self.vocab_size + FAR * self.width + 1
        if size > _LARGE:
            return self.order.ids
        beyond = np.arange(len(self.order.ids), size, dtype=np.int32)
        return np.concatenate([self.order.ids, beyond])

    @property
    def light(self) -> int:
        """The bit of a key that puts an entry into the second run; what lies above it pads."""
        return 1 << (self.payload_bits + (self.vocab_size - 1).bit_length())

    @property
    def key_dtype(self) -> type[np.signedinteger]:
        """Of a key: 32 bits sort twice as fast as 64."""
        return np.int32 if self.light < 1 << 30 else np.int64

    @property
    def planes(self) -> int:
        """Bytes of a far distance."""
        return 2 if self.vocab_size <= 1 << 16 else 3 if self.vocab_size <= 1 << 24 else 4

    def most(self, entries: int) -> int:
        """Bytes that this many entries can need."""
        return entries * (1 + self.planes)

    def keys(self, ids: NDArray[Any], counts: Ints, light: NDArray[np.bool_], payload: Ints) -> tuple[Keys, Ints]:
        """Sorted keys of `[n, K]` ids and payloads, and `[n]` how many entries are heavy.

        Raises:
            TargetError: an id outside the vocabulary.
        """
        valid = np.arange(ids.shape[1]) < counts[:, None]
        if ((ids < 0) | (ids >= self.vocab_size))[valid].any():
            raise TargetError("a target names an id outside the vocabulary")
        ranks = np.where(valid, ids, 0).astype(np.int64)
        listed = ranks < len(self.order.ranks)
        ranks[listed] = self.order.ranks[ranks[listed]]
        keys = np.where(valid, np.where(light, self.light, 0) | ranks << self.payload_bits | payload, self.light << 1)
        keys = keys.astype(self.key_dtype)
        keys.sort(axis=-1)
        return keys, counts - (light & valid).sum(-1)

    def pack(self, keys: Keys, counts: Ints, heavies: Ints) -> NDArray[np.uint8]:
        """Bytes of sorted keys.

        Args:
            keys: `[n, K]`, rising along each position.
            counts: `[n]` entries.
            heavies: `[n]` those of the first run.

        Raises:
            TargetError: a position names an id twice.
        """
        entries = int(counts.sum())
        near = np.empty(entries, np.uint8)
        far = np.empty(entries, np.uint32)
        beyond = pack_runs(keys, counts, heavies, self.payload_bits, self.light - 1, near, far)
        if beyond < 0:
            raise TargetError("a target names an id twice")
        octets = far[:beyond].astype(">u4").view(np.uint8).reshape(-1, 4)[:, 4 - self.planes :]
        return np.concatenate([near, octets.T.reshape(-1)])
