"""Frequency: the order of ids that compresses best, from the first positions that a cache will hold."""

from __future__ import annotations

import numpy as np

from kdcache.codec.order import MOST_ORDERED
from kdcache.targets import SparseTargets

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
