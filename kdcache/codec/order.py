"""Order: the rank of an id is its place in a list of the ids that the teacher proposes most often.

Ids that are not in the list follow in increasing order. So above the largest id of the list rank and id are equal, and
the tables end there. Cost: two tables of 4 bytes an id.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CorruptCacheError

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
