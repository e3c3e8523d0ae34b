"""Levels: log-probabilities in 4 to 16 bits, scaled so that the error at every stored temperature stays small.

Of a position's entries the largest has the top level c = 2^bits - 1. With x = log p less the largest (so x <= 0), an
entry has the level round(c (g(x) - g(cut)) / (g(0) - g(cut))), at least 0, where

    g(x) = tau exp(x / tau) + beta x        tau = 2 min(t, 4), beta = 0.1 / max(2, t), cut = -min(t log 4000K, 60)

and t is the hottest temperature that matters. exp(x / 2t) is the density of levels that spends bits best at one
temperature (an entry's part of the KL is p_t times the square of its error); the linear term keeps what is small
apart, which a hotter temperature raises; all K entries at the cut add 1/4000 at t. Nothing is stored as zero.

Bound: |g(x) - g(stored x)| <= (g(0) - g(cut)) / 2c for x >= cut; that is `step` / 2. A level is a place in tables, so
decoding takes no power and no logarithm of an entry. Sums run in fixed point: in integers the order of additions
changes nothing, and vectors of them are fast. docs/decisions/0008 has the measured KL.

Cost: decoding 1 ns an entry, for one temperature or two; encoding 3 ns.

Shapes: n positions, K entries, E entries in all, n_T temperatures that are summed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.id_deltas import Runs
from kdcache.codec.packing import OUTSIDE, level_keys
from kdcache.codec.streams import Floats, Ints, Keys
from kdcache.errors import CorruptCacheError, TargetError

BITS = range(4, 17)

_CELLS = 64.0  # a nat

_NARROW = 256
"""K up to which sums of two temperatures share a 64-bit number: 23 binary places are enough for each."""


@dataclass(frozen=True)
class Tables:
    """What decoding looks up, by level.

    Attributes:
        weights: `[c + 1]` exp(x / T) at the first temperature.
        logs: `[c + 1]` x.
        fixed: `[R, c + 1]` exp(x / T) in fixed point, `fields` temperatures side by side in a number, low bits first.
        fields: 1 or 2.
        unit: what the last binary place is worth.
    """

    weights: Floats
    logs: Floats
    fixed: Ints
    fields: int
    unit: float


@dataclass(frozen=True, kw_only=True)
class Levels:
    """A scale for the log-probabilities of one cache.

    Attributes:
        bits: of a level, 4 to 16.
        width: K.
        temperatures: T whose sums decoding gives; the first is that of the weights.
        hottest: t, the hottest that matters.
    """

    bits: int
    width: int
    temperatures: tuple[float, ...]
    hottest: float

    @property
    def top(self) -> int:
        """c, the level of a position's largest entry."""
        return (1 << self.bits) - 1

    @property
    def _curve(self) -> tuple[float, float, float]:
        t = max(1.0, self.hottest)
        return 2 * min(t, 4.0), 0.1 / max(2.0, t), -min(t * math.log(4000 * self.width), 60.0)

    @property
    def error_bound(self) -> dict[str, float]:
        """tau, beta and cut of g, and `step`: neighbouring levels are that far apart on g's axis."""
        tau, beta, cut = self._curve
        return {"tau": tau, "beta": beta, "cut": cut, "step": (self._g(0.0) - self._g(cut)) / self.top}

    def _g(self, x: float) -> float:
        tau, beta, _ = self._curve
        return tau * math.exp(x / tau) + beta * x

    def _inverse(self, levels: NDArray[Any]) -> NDArray[np.float64]:
        """x of levels that need not be whole: g has no closed inverse, but it rises, so bisection finds it."""
        tau, beta, cut = self._curve
        wanted = self._g(cut) + levels * self.error_bound["step"]
        left, right = np.full(len(levels), cut), np.zeros(len(levels))
        for _ in range(60):
            middle = (left + right) / 2
            above = tau * np.exp(middle / tau) + beta * middle > wanted
            left, right = np.where(above, left, middle), np.where(above, middle, right)
        return left

    @cached_property
    def logs(self) -> NDArray[np.float64]:
        """`[c + 1]` x of each level, from the cut to 0."""
        x = self._inverse(np.arange(self.top + 1.0))
        x[0], x[-1] = self._curve[2], 0.0
        return x

    @cached_property
    def _search(self) -> tuple[NDArray[np.float64], Ints]:
        """`[c + 1]` least x of each level but 0, then inf; and how many of them lie at or below each 64th of a nat.

        So the level of an x is found by two look-ups and, in few cells, a comparison; g would take an exponential.
        """
        edges = np.append(self._inverse(np.arange(self.top) + 0.5), np.inf)
        places = -np.arange(math.ceil(-self._curve[2] * _CELLS) + 2) / _CELLS
        guesses = np.searchsorted(edges, places, side="right").astype(np.int64)
        guesses[-1] = 0
        return edges, guesses

    @cached_property
    def tables(self) -> Tables:
        """What decoding looks up."""
        softened = np.exp(self.logs / np.array(self.temperatures)[:, None])  # [n_T, c + 1]
        fields = 2 if self.width <= _NARROW and len(self.temperatures) > 1 else 1
        point = 64 // fields - 1 - self.width.bit_length()  # binary places: K of the largest still fit
        fixed = np.rint(np.ldexp(softened, point)).astype(np.int64)
        rows = [
            fixed[k] | fixed[k + 1] << 32 if fields == 2 and k + 1 < len(fixed) else fixed[k]
            for k in range(0, len(fixed), fields)
        ]
        return Tables(
            weights=softened[0].astype(np.float32),
            logs=self.logs.astype(np.float32),
            fixed=np.stack(rows),
            fields=fields,
            unit=math.ldexp(1, -point),
        )

    def keys(self, runs: Runs, ids: NDArray[np.int64], logprobs: Floats, counts: Ints) -> tuple[Keys, Ints]:
        """Sorted keys of entries and their levels; entries without a value (NaN) are the lights, of level 0.

        Returns:
            `[n, K]` keys and `[n]` how many entries have a value.

        Raises:
            TargetError: an id outside the vocabulary, or values that are all zero.
        """
        keys = np.empty(ids.shape, runs.key_dtype)
        heavies = np.empty(len(counts), np.int64)
        problem = level_keys(
            ids, logprobs, counts, runs.order.ranks, runs.vocab_size, *self._search, _CELLS,
            runs.payload_bits, runs.light, keys, heavies,
        )  # fmt: skip
        if problem == OUTSIDE:
            raise TargetError("a target names an id outside the vocabulary")
        if problem:
            raise TargetError("a target has no probability above zero")
        keys.sort(axis=-1)
        return keys, heavies


def merge(octets: NDArray[np.uint8], planes: int) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Numbers of one plane of bytes, or of two, the high one first.

    Raises:
        CorruptCacheError: two planes of different lengths.
    """
    if planes == 1:
        return octets
    if len(octets) % 2:
        raise CorruptCacheError(f"{len(octets)} bytes are no two-byte values")
    high, low = octets.reshape(2, -1)
    numbers = high.astype(np.uint16) << np.uint16(8) | low
    numbers.flags.writeable = False
    return numbers


def split(numbers: NDArray[Any], planes: int) -> NDArray[np.uint8]:
    """Planes of bytes, high ones first, of numbers that fit into them: the inverse of `merge`."""
    if planes == 1:
        return numbers.astype(np.uint8)
    return np.concatenate([(numbers >> 8).astype(np.uint8), numbers.astype(np.uint8)])
