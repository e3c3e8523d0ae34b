"""Id deltas: the ids of a position as one or two runs of rising ranks, in about a byte an entry.

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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.id_ranks import IdOrder
from kdcache.codec.streams import FAR, FAR_ENDS, VOCABULARY, Bytes, Ids, Ints, Keys
from kdcache.compiled import compiled
from kdcache.errors import TargetError

_LARGE = 1 << 22  # ranks in a table


class IdTable(NamedTuple):
    """What unpacking needs besides a row's streams.

    Attributes:
        width: K.
        planes: bytes of a far distance.
        lookup: `[H]` the id of each rank below H; beyond, they are equal.
        vocab_size: ids lie below it.
    """

    width: int
    planes: int
    lookup: Ids
    vocab_size: int


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
    def table(self) -> IdTable:
        """What unpacking needs."""
        return IdTable(self.width, self.planes, self.lookup, self.vocab_size)

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
        beyond = pack_ids(keys, counts, heavies, self.payload_bits, self.light - 1, near, far)
        if beyond < 0:
            raise TargetError("a target names an id twice")
        octets = far[:beyond].astype(">u4").view(np.uint8).reshape(-1, 4)[:, 4 - self.planes :]
        return np.concatenate([near, octets.T.reshape(-1)])


# Unsigned numbers as indices: numba takes a signed one to count from the end where it is negative.
_0, _1, _8, _FAR, _NONE = (np.uint64(x) for x in (0, 1, 8, FAR, 2**64 - 1))


@compiled
def pack_ids(
    keys: Keys, counts: Ints, heavies: Ints, payload_bits: int, mask: int, near: Bytes, far: NDArray[np.uint32]
) -> int:
    """Fill `[E]` near distances and the far ends; returns how many of these there are, -1 if an id comes twice."""
    at, beyond = 0, 0
    for i in range(len(counts)):
        previous: Any = -1
        for j in range(counts[i]):
            if j == heavies[i]:
                previous = -1
            rank: Any = (np.int64(keys[i, j]) & mask) >> payload_bits
            distance = rank - previous - 1
            if distance < 0:
                return -1
            previous = rank
            if distance >= FAR:
                far[beyond] = distance - FAR
                beyond += 1
                distance = FAR
            near[at] = distance
            at += 1
    return beyond


@compiled
def unpack_ids(stream: Bytes, entries: int, counts: Ints, heavies: Ints, table: IdTable, ids: Ids) -> int:
    """`[n K]` ids of a stream of distances and far ends; see the module."""
    planes, lookup = np.uint64(table.planes), table.lookup
    last, start, known = np.uint64(table.vocab_size - 1), np.uint64(entries), np.uint64(len(lookup))
    if len(stream) < entries or (len(stream) - entries) % table.planes:
        return FAR_ENDS
    at, base, beyond, ends = _0, _0, _0, np.uint64((len(stream) - entries) // table.planes)
    width = np.uint64(table.width)
    padded = known > last + _FAR * width  # then near distances alone cannot leave the table
    for i in range(len(counts)):
        j = _0
        for stop in (np.uint64(heavies[i]), np.uint64(counts[i])):
            if j == stop:
                continue
            rank = _NONE
            for k in range(j, stop):
                distance = np.uint64(stream[at + k])
                rank += distance + _1
                if distance == _FAR:
                    if beyond >= ends:
                        return FAR_ENDS
                    more = _0
                    for plane in range(planes):
                        more = more << _8 | np.uint64(stream[start + beyond + plane * ends])
                    rank += more
                    beyond += _1
                    if rank > last:
                        return VOCABULARY
                place = rank if padded else min(rank, last)
                ids[base + k] = lookup[place] if padded or place < known else np.int32(place)
            if rank > last:  # ranks rise, so the last of a run is its largest
                return VOCABULARY
            j = stop
        for k in range(j, width):
            ids[base + k] = 0
        at += j
        base += width
    return 0 if beyond == ends else FAR_ENDS
