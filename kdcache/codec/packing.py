"""Packing: the loops over entries that make keys of them, and streams of sorted keys.

Each writes into arrays that the caller has made.

Shapes: n positions, K entries, E entries in all.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.streams import FAR, Bytes, Doubles, Floats, Ids, Ints, Keys, Values
from kdcache.compiled import compiled

OUTSIDE, NOTHING = 1, 2
"""Why keys cannot be made: an id outside the vocabulary; a position whose probabilities are all zero."""


# fmt: off
@compiled
def level_keys(
    ids: Ints, logprobs: Floats, counts: Ints, ranks: Ids, vocab_size: int,
    edges: Doubles, guesses: Ints, cells: float, payload_bits: int, light: int,
    keys: Keys, heavies: Ints,
) -> int:
    # fmt: on
    """Fill `[n, K]` keys of rank and level, and `[n]` how many entries have a value; see levels.py and runs.py."""
    last = len(guesses) - 2
    for i in range(len(counts)):
        largest, heavy = -np.inf, 0
        for j in range(counts[i]):
            if logprobs[i, j] > largest:
                largest = np.float64(logprobs[i, j])
        for j in range(counts[i]):
            token = ids[i, j]
            if token < 0 or token >= vocab_size:
                return OUTSIDE
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
            return NOTHING
        for j in range(counts[i], ids.shape[1]):
            keys[i, j] = light << 1
        heavies[i] = heavy
    return 0


@compiled
def pack_runs(
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
def pack_values(keys: Keys, starts: Ints, stops: Ints, mask: int, lift: bool, floors: Ints, values: Values) -> None:
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
