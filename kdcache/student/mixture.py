"""Mixture: one flat sequence of rows out of several caches, each with its share.

Any slot of the sequence is found without those before it: which cache it takes its row from, and the index of that row
within the cache. A tree of two-way forks decides this. A fork with a of n parts on its light side sends slot t there
when floor((t a + phase) / n) steps up between t and t + 1 (a Sturmian word: any two windows of one length hold numbers
of light slots that differ by 1 at most), so behind d forks any window holds a cache's share to within d rows. The
lightest are joined first, so that a heavy cache is behind few. The same formula counts the steps before t. All is exact
in integers: after n slots each cache has had its parts exactly, and its next period begins.

Each cache then goes through its own epochs, every one a permutation of its rows (see `permutation`), of which any place
can be computed by itself too. So an order over 10^9 rows takes no memory. Cost: some ten array operations a fork, and
the permutation, for a block of slots.

Shapes: S slots asked for at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.student.permutation import Permutation

Ints = NDArray[np.int64]

_PARTS = 1 << 30
_PHASES = 1 << 32
"""Takes the place of the epoch in the seed of the phases: no epoch has this number."""


class Mixture:
    """The rows of a run, slot by slot; a pure function of (sizes, seed, weights).

    Rows are numbered through all caches: those of the second follow those of the first.

    Args:
        sizes: training rows of each cache, below 2^31 together.
        seed: of the permutations, and of where each cache's turn comes.
        weights: share of each cache, in any unit; in proportion to the sizes unless given.
    """

    def __init__(self, sizes: Sequence[int], seed: int, weights: Sequence[float] | None = None) -> None:
        self.sizes, self.seed = tuple(sizes), seed
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)]).tolist()
        parts = self.sizes
        if weights is not None:
            parts = tuple(max(1, round(_PARTS * weight / sum(weights))) for weight in weights)
        self._tree = _grow(parts, np.random.default_rng((seed, _PHASES)))

    def __len__(self) -> int:
        """Rows of all caches together: the slots of one epoch."""
        return int(self._starts[-1])

    def rows(self, start: int, stop: int) -> Ints:
        """`[S]` the rows of slots start to stop."""
        out = np.empty(stop - start, np.int64)
        for cache, slots, nth in _walk(self._tree, np.arange(stop - start), np.arange(start, stop)):
            out[slots] = self._of(cache, nth)
        return out

    def _of(self, cache: int, nth: Ints) -> Ints:
        """`[S]` the rows that a cache gives for its nth slots, which ascend."""
        epochs, places = np.divmod(nth, self.sizes[cache])
        cuts = np.flatnonzero(np.diff(epochs)) + 1
        parts = zip(np.split(epochs, cuts), np.split(places, cuts), strict=True)
        taken = [self._order(cache, int(epoch[0]))(place) for epoch, place in parts if len(epoch)]
        start: int = self._starts[cache]
        return np.concatenate([np.empty(0, np.int64), *taken]) + start

    def _order(self, cache: int, epoch: int) -> Permutation:
        return Permutation(self.sizes[cache], (self.seed, epoch, cache))


@dataclass(frozen=True)
class _Fork:
    """`light_parts` of every `parts` slots go to the light side; a side is a fork or the number of a cache."""

    light: _Fork | int
    heavy: _Fork | int
    light_parts: int
    parts: int
    phase: int

    def lights_before(self, slots: Ints) -> Ints:
        """How many of the slots before each of these went to the light side."""
        periods, rest = np.divmod(slots, self.parts)
        before: Ints = periods * self.light_parts + (rest * self.light_parts + self.phase) // self.parts
        return before


def _grow(parts: Sequence[int], random: np.random.Generator) -> _Fork | int:
    """A Huffman tree over the caches."""
    heap: list[tuple[int, int, _Fork | int]] = [(part, cache, cache) for cache, part in enumerate(parts)]
    heapq.heapify(heap)
    for number in range(len(parts), 2 * len(parts) - 1):
        (light, _, one), (heavy, _, other) = heapq.heappop(heap), heapq.heappop(heap)
        both = light + heavy
        heapq.heappush(heap, (both, number, _Fork(one, other, light, both, int(random.integers(both)))))
    return heap[0][2]


def _walk(node: _Fork | int, slots: Ints, nth: Ints) -> Iterator[tuple[int, Ints, Ints]]:
    """`(cache, its slots, the index of each within that cache)` of the slots that reach a node as its nth."""
    if isinstance(node, int):
        yield node, slots, nth
        return
    before = node.lights_before(nth)
    light = node.lights_before(nth + 1) > before
    yield from _walk(node.light, slots[light], before[light])
    yield from _walk(node.heavy, slots[~light], (nth - before)[~light])
