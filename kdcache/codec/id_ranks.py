"""Id ranks: the order of ids that compresses best, from the first positions that a cache will hold.

The rank of an id is its place in a list of the ids that the teacher proposes most often. Ids that are not in the list
follow in increasing order. So above the largest id of the list rank and id are equal, and the tables end there. Cost:
two tables of 4 bytes an id.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError
from kdcache.targets import SparseTargets

MOST_ORDERED = 1 << 20
"""Ids in a list lie below this: what a manifest may make a reader allocate is bounded, whatever its vocabulary."""


class IdOrder:
    """A permutation of the ids below `vocab_size`.

    Attributes:
        ids: `[H]` the id of each rank below H; beyond, they are equal.
        ranks: `[H]` the rank of each id below H.

    Raises:
        CorruptCacheError: a list that repeats an id or names one outside the vocabulary.
    """

    def __init__(self, order: Sequence[int], vocab_size: int) -> None:
        known, limit = len(set(order)) == len(order), min(vocab_size, MOST_ORDERED)
        if not known or any(type(i) is not int or not 0 <= i < limit for i in order):
            raise CorruptCacheError("the id order repeats an id or names one outside the vocabulary")
        size = max(order, default=-1) + 1
        rest = np.ones(size, bool)
        rest[list(order)] = False
        self.ids: NDArray[np.int32] = np.concatenate([np.array(order, np.int32), np.flatnonzero(rest).astype(np.int32)])
        self.ranks: NDArray[np.int32] = np.empty(size, np.int32)
        self.ranks[self.ids] = np.arange(size, dtype=np.int32)


_POSITIONS = 1 << 14


class FrequencyOrder:
    """Counts how often ids are proposed, over about 16 thousand positions."""

    def __init__(self, vocab_size: int) -> None:
        self._counts, self._positions = np.zeros(min(vocab_size, MOST_ORDERED), np.int64), 0

    def add(self, targets: SparseTargets) -> bool:
        """Count the entries of some positions; whether more would be of use."""
        ids = targets.ids[targets.valid].numpy()
        self._counts += np.bincount(ids[ids < len(self._counts)], minlength=len(self._counts))
        self._positions += len(targets.count)
        return self._positions < _POSITIONS

    def ids(self) -> tuple[int, ...]:
        """Ids that were proposed, most often first; of equals the smaller first."""
        order = np.argsort(-self._counts, kind="stable")
        return tuple(order[: np.count_nonzero(self._counts)].tolist())
