"""Scalars: the numbers that a position has one of, in one or two bytes each.

Counts are stored as they are. Measures are stored as 16-bit words:

    log-odds     32768 + round(64 x) within 1 to 65535; 0 for -inf
    nats         round(128 x) within 0 to 65534; 65535 is none

Two streams, planes of one byte a position: `scalars` has the counts and the high bytes of the words, which compress,
and `scalars_low` the low bytes, which do not. As two streams each gets its own code: 5.4 bytes a position instead of
5.8.

Bounds: log-odds within 1/128 up to 511, nats within 1/256 up to 511.

Shapes: n positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.streams import MEASURE, Bytes, Doubles, Floats, Ints, Shapes, Streams, take
from kdcache.compiled import compiled

ERROR_BOUND = {"log_odds": 1 / 128, "nats": 1 / 256}

_ODDS, _NATS = 64.0, 128.0  # steps a nat
_MIDDLE, _LAST = 32768, 65535

_BYTE = np.dtype("u1")


@dataclass(frozen=True)
class ScalarLayout:
    """Which numbers a position has, in their order.

    Attributes:
        counts: names of whole numbers, each with the largest that it may be.
        words: names of measures.
    """

    counts: Mapping[str, int]
    words: tuple[str, ...]

    @cached_property
    def sizes(self) -> list[int]:
        """Planes of each count."""
        return [max(1, (most.bit_length() + 7) // 8) for most in self.counts.values()]

    def shapes(self, positions: int) -> Shapes:
        """The two streams and their sizes."""
        high = sum(self.sizes) + len(self.words)
        return {"scalars": (_BYTE, (high, positions)), "scalars_low": (_BYTE, (len(self.words), positions))}

    def pack(self, counts: Mapping[str, NDArray[Any]], words: NDArray[np.uint16]) -> Streams:
        """Streams of `[n]` counts and `[W, n]` words."""
        planes = []
        for name, size in zip(self.counts, self.sizes, strict=True):
            octets = counts[name].astype(">i8").view(np.uint8).reshape(-1, 8)
            planes.append(octets[:, 8 - size :].T)
        planes.append((words >> 8).astype(np.uint8))
        return {"scalars": np.concatenate(planes).reshape(-1), "scalars_low": words.astype(np.uint8).reshape(-1)}

    def take(self, streams: Mapping[str, NDArray[Any]], positions: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The two streams, as planes: `[planes, n]`.

        Raises:
            CorruptCacheError: streams of another length.
        """
        lows = len(self.words)
        highs = sum(self.sizes) + lows
        high = take(streams, "scalars", _BYTE, highs * positions)
        low = take(streams, "scalars_low", _BYTE, lows * positions)
        return high.reshape(highs, positions), low.reshape(lows, positions)

    def unpack(self, high: NDArray[np.uint8], low: NDArray[np.uint8]) -> tuple[dict[str, Ints], NDArray[np.uint16]]:
        """`[n]` counts by name and `[W, n]` words of planes: the inverse of `pack`."""
        counts, plane = {}, 0
        for name, size in zip(self.counts, self.sizes, strict=True):
            counts[name] = np.empty(high.shape[1], np.int64)
            read_count(high, plane, size, counts[name])
            plane += size
        return counts, high[plane:].astype(np.uint16) << np.uint16(8) | low


def odds_to_words(odds: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Words of log-odds; -inf has a word of its own."""
    clipped = np.clip(np.rint(np.maximum(odds, -1e9) * _ODDS), 1 - _MIDDLE, _MIDDLE - 1) + _MIDDLE
    return np.where(np.isneginf(odds), 0, clipped).astype(np.uint16)


def renyi_entropy(log_partition: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """`[n]` Rényi entropy of order 1/T: log sum p^(1/T) over 1 - 1/T; from 0 to log V at every T but 1."""
    return np.asarray(log_partition.astype(np.float64) / (1 - 1 / temperature), np.float64)


def nats_to_words(nats: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Words of measures that are never negative."""
    return np.clip(np.rint(nats * _NATS), 0, _LAST - 1).astype(np.uint16)


def _log_sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return -np.logaddexp(0.0, -x)


_VALUES = (np.arange(_LAST + 1) - _MIDDLE) / _ODDS
_VALUES[0] = -np.inf

LOG_MASS: NDArray[np.float64] = _log_sigmoid(_VALUES)
"""By word of log-odds: log of the mass that has them."""

LOG_REST: NDArray[np.float64] = _log_sigmoid(-_VALUES)
"""By word of log-odds: log of one minus that mass."""

NATS: NDArray[np.float32] = (np.arange(_LAST + 1) / _NATS).astype(np.float32)
"""By word: the measure."""
NATS[_LAST] = np.nan


class MeasureTables(NamedTuple):
    """The values of words of measures.

    Attributes:
        log_mass, log_rest, nats: `[65536]`.
    """

    log_mass: Doubles
    log_rest: Doubles
    nats: Floats


MEASURES = MeasureTables(LOG_MASS, LOG_REST, NATS)

_8 = np.uint64(8)  # an unsigned index: numba takes a signed one to count from the end where it is negative


@compiled
def read_count(high: Bytes, plane: int, size: int, out: Ints) -> None:
    """`[n]` whole numbers of `size` planes, high bytes first; 0 where there is none."""
    out[:] = 0
    for byte in range(size):
        for i in range(len(out)):
            out[i] = out[i] << 8 | np.int64(high[plane + byte, i])


@compiled
def read_word(high: Bytes, low: Bytes, plane: int, word: int, table: Floats | Doubles, out: Floats | Doubles) -> bool:
    """`[n]` values of measures, and whether all are numbers; high bytes follow the counts, low bytes are a stream."""
    known = True
    for i in range(high.shape[1]):
        out[i] = table[np.uint64(high[plane + word, i]) << _8 | np.uint64(low[word, i])]
        known &= out[i] == out[i]
    return known


# fmt: off
@compiled
def read_measures(
    high: Bytes, low: Bytes, plane: int, word: int, nats: Floats, has_entropy: bool, has_label: bool,
    entropy: Floats, label: Floats,
) -> int:
    # fmt: on
    """`[n]` entropies and log-probabilities of labels, where they are stored: 0, or a problem."""
    if has_entropy and not read_word(high, low, plane, word, nats, entropy):
        return MEASURE
    if has_label:
        if not read_word(high, low, plane, word + has_entropy, nats, label):
            return MEASURE
        for i in range(len(label)):
            label[i] = -label[i]
    return 0
