"""Quantizer: log-probabilities in 4 to 16 bits, scaled so that the error at every stored temperature stays small.

Of a position's entries the largest has the top level c = 2^bits - 1. With x = log p less the largest (so x <= 0), an
entry has the level round(c (g(x) - g(cut)) / (g(0) - g(cut))), at least 0, where

    g(x) = tau exp(x / tau) + beta x        tau = 2 min(t, 4), beta = 0.1 / max(2, t), cut = -min(t log 4000K, 60)

and t is the hottest temperature that matters. exp(x / 2t) is the density of levels that spends bits best at one
temperature (an entry's part of the KL is p_t times the square of its error); the linear term keeps small values
distinct, which a hotter temperature raises; all K entries at the cut add 1/4000 at t. Nothing is stored as zero.

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
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.id_deltas import Runs
from kdcache.codec.streams import LEVELS, Doubles, Floats, Ids, Ints, Keys, Values
from kdcache.compiled import compiled
from kdcache.errors import CorruptCacheError, TargetError

BITS = range(4, 17)

_CELLS = 64.0  # a nat

_NARROW = 256
"""K up to which sums of two temperatures share a 64-bit number: 23 binary places are enough for each."""


_OUTSIDE, _NOTHING = 1, 2
"""Why keys cannot be made: an id outside the vocabulary; a position whose probabilities are all zero."""


class LevelTable(NamedTuple):
    """What decoding looks up, by level.

    Attributes:
        top: c, the level of a position's largest entry.
        level_weights: `[c + 1]` exp(x / T) at the first temperature.
        level_logs: `[c + 1]` x.
        fixed: `[R, c + 1]` exp(x / T) in fixed point, `fields` temperatures side by side in a number, low bits first.
        fields: 1 or 2.
        unit: what the last binary place is worth.
    """

    top: int
    level_weights: Floats
    level_logs: Floats
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
        """tau, beta and cut of g, and `step`: the distance of neighbouring levels on g's axis."""
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
    def table(self) -> LevelTable:
        """What decoding looks up."""
        softened = np.exp(self.logs / np.array(self.temperatures)[:, None])  # [n_T, c + 1]
        fields = 2 if self.width <= _NARROW and len(self.temperatures) > 1 else 1
        point = 64 // fields - 1 - self.width.bit_length()  # binary places: K of the largest still fit
        fixed = np.rint(np.ldexp(softened, point)).astype(np.int64)
        rows = [
            fixed[k] | fixed[k + 1] << 32 if fields == 2 and k + 1 < len(fixed) else fixed[k]
            for k in range(0, len(fixed), fields)
        ]
        return LevelTable(
            top=self.top,
            level_weights=softened[0].astype(np.float32),
            level_logs=self.logs.astype(np.float32),
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
        if problem == _OUTSIDE:
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


_0 = np.uint64(0)  # an unsigned index: numba takes a signed one to count from the end where it is negative
_HALF, _LOW = 32, (1 << 32) - 1  # of a number that holds two sums


# fmt: off
@compiled
def level_keys(
    ids: Ints, logprobs: Floats, counts: Ints, ranks: Ids, vocab_size: int,
    edges: Doubles, guesses: Ints, cells: float, payload_bits: int, light: int,
    keys: Keys, heavies: Ints,
) -> int:
    # fmt: on
    """Fill `[n, K]` keys of rank and level, and `[n]` how many entries have a value; see id_deltas.py."""
    last = len(guesses) - 2
    for i in range(len(counts)):
        largest, heavy = -np.inf, 0
        for j in range(counts[i]):
            if logprobs[i, j] > largest:
                largest = np.float64(logprobs[i, j])
        for j in range(counts[i]):
            token = ids[i, j]
            if token < 0 or token >= vocab_size:
                return _OUTSIDE
            rank = np.int64(ranks[token]) if token < len(ranks) else token
            x = np.float64(logprobs[i, j]) - largest
            if math.isnan(x):
                keys[i, j] = light | rank << payload_bits
                continue
            cell = np.int64(min(-x * cells, np.float64(last)))
            low, high = guesses[cell + 1], guesses[cell]
            while high - low > 1:  # in no cell of a scale of few bits
                middle = (low + high) >> 1
                if x >= edges[middle]:
                    low = middle + 1
                else:
                    high = middle
            keys[i, j] = rank << payload_bits | (low + (x >= edges[low]))
            heavy += 1
        if heavy and not largest > -np.inf:
            return _NOTHING
        for j in range(counts[i], ids.shape[1]):
            keys[i, j] = light << 1
        heavies[i] = heavy
    return 0


@compiled
def pack_levels(keys: Keys, starts: Ints, stops: Ints, mask: int, lift: bool, floors: Ints, values: Values) -> None:
    """Fill the payloads of some entries of each position, less the least of them if `lift`, and `[n]` those least."""
    at = 0
    for i in range(len(starts)):
        floor: Any = 0
        if lift:
            floor = mask
            for j in range(starts[i], stops[i]):
                floor = min(floor, np.int64(keys[i, j]) & mask)
        floors[i] = floor
        for j in range(starts[i], stops[i]):
            values[at] = (np.int64(keys[i, j]) & mask) - floor
            at += 1


@compiled
def _sum_levels(values: Values, counts: Ints, floors: Ints, levels: LevelTable, sums: Doubles) -> int:
    """`[n, n_T]` sums of the values of levels; see the module."""
    at, highest, fixed, unit = _0, np.uint64(levels.top), levels.fixed, levels.unit
    for i in range(len(counts)):
        count, floor = np.uint64(counts[i]), np.uint64(floors[i])
        if not count:
            sums[i] = 1
            continue
        largest = values[at]
        for j in range(count):
            largest = max(largest, values[at + j])
        if floor + np.uint64(largest) != highest:  # so every level lies in the tables, and every sum is at least 1
            return LEVELS
        for row in range(len(fixed)):
            total = np.int64(0)
            for j in range(count):
                total += fixed[row, floor + np.uint64(values[at + j])]
            if levels.fields == 1:
                sums[i, row] = total * unit
            else:
                sums[i, 2 * row] = (total & _LOW) * unit
                if 2 * row + 1 < sums.shape[1]:
                    sums[i, 2 * row + 1] = (total >> _HALF) * unit
        at += count
    return 0


@compiled
def _scale(sums: Doubles, log_mass: Doubles, exponents: Doubles, scales: Floats, log_scales: Doubles) -> None:
    """Factors that make entries sum to a given mass; turns sums into log sums of scaled entries at each temperature."""
    for i in range(len(log_mass)):
        log_scale = log_mass[i]
        for k in range(len(exponents)):
            log_sum = math.log(np.float32(sums[i, k]))
            if k == 0:
                log_scale -= log_sum
            sums[i, k] = log_sum + log_scale * exponents[k]
        scales[i], log_scales[i] = math.exp(log_scale), log_scale


# fmt: off
@compiled
def _write_weights(
    values: Values, counts: Ints, floors: Ints, levels: LevelTable,
    scales: Floats, log_scales: Doubles, temperature: float, weights: Floats, logs: Floats,
) -> None:
    # fmt: on
    """`[n K]` weights of levels, 0 past the count, and T log of them, -inf past it."""
    table, log_table = levels.level_weights, levels.level_logs
    at, base, width = _0, _0, np.uint64(len(weights) // max(1, len(counts)))
    for i in range(len(counts)):
        count, floor = np.uint64(counts[i]), np.uint64(floors[i])
        scale, shift = scales[i], np.float32(temperature * log_scales[i])
        for j in range(count):
            weights[base + j] = table[floor + np.uint64(values[at + j])]
        for j in range(count):
            logs[base + j] = log_table[floor + np.uint64(values[at + j])]
        for j in range(count):  # but for the look-ups, this is done eight at a time
            weights[base + j] *= scale
        for j in range(count):
            logs[base + j] += shift
        for j in range(count, width):
            weights[base + j] = 0
            logs[base + j] = -np.inf
        at += count
        base += width


# fmt: off
@compiled
def unpack_levels(
    values: Values, counts: Ints, floors: Ints, log_mass: Doubles, levels: LevelTable,
    temperature: float, exponents: Doubles, weights: Floats, logs: Floats, sums: Doubles,
) -> int:
    # fmt: on
    """Turn levels into weights that sum to a given mass, and log sum w^(T / T') at each temperature T'.

    In passes over the row: in one, each position would wait for its own logarithms.
    """
    problem = _sum_levels(values, counts, floors, levels, sums)
    if problem:
        return problem
    scales, log_scales = np.empty(len(counts), np.float32), np.empty(len(counts))
    _scale(sums, log_mass, exponents, scales, log_scales)
    _write_weights(values, counts, floors, levels, scales, log_scales, temperature, weights, logs)
    return 0
