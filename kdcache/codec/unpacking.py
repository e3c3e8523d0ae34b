"""Unpacking: the loops over entries that make targets of streams.

Nothing is read before its place is known to lie inside its array; problems come back as numbers, for `PROBLEMS` to
name. A row is one call, for on rows of a few hundred positions a call from Python costs as much as thousands of
entries; inside, it is a pass for each thing, for one loop that did them all would keep nothing in registers.

All that call each other stand in this file: compiled code is kept until its own file changes.

Shapes: n positions, K entries, E entries in all, n_T temperatures.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.streams import FAR, Bytes, Doubles, Floats, Ids, Ints, Values
from kdcache.compiled import compiled

PROBLEMS = {
    1: "an id lies outside the vocabulary",
    2: "ids and their far distances do not agree",
    3: "a position has no value at the top level, or one above it",
    4: "the draws of a position do not add up",
    5: "a position has no entries, or more than it can have",
    6: "there are more or fewer values than entries that have one",
    7: "an entropy or a label's log-probability is not a number",
}
_VOCABULARY, _FAR_ENDS, _LEVEL, _DRAWS, _COUNT, _VALUES, _ENTROPY = PROBLEMS

# Unsigned numbers as indices: numba takes a signed one to count from the end where it is negative.
_0, _1, _8, _FAR, _NONE = (np.uint64(x) for x in (0, 1, 8, FAR, 2**64 - 1))

_HALF, _LOW = 32, (1 << 32) - 1  # of a number that holds two sums


@compiled
def _read_count(high: Bytes, plane: int, size: int, out: Ints) -> None:
    """`[n]` whole numbers of `size` planes, high bytes first; 0 where there is none."""
    out[:] = 0
    for byte in range(size):
        for i in range(len(out)):
            out[i] = out[i] << 8 | np.int64(high[plane + byte, i])


@compiled
def _read_word(high: Bytes, low: Bytes, plane: int, word: int, table: Floats | Doubles, out: Floats | Doubles) -> bool:
    """`[n]` what measures stand for, and whether all are numbers; high bytes lie behind the counts, low bytes apart."""
    known = True
    for i in range(high.shape[1]):
        out[i] = table[np.uint64(high[plane + word, i]) << _8 | np.uint64(low[word, i])]
        known &= out[i] == out[i]
    return known


# fmt: off
@compiled
def _read_measures(
    high: Bytes, low: Bytes, plane: int, word: int, nats: Floats, has_entropy: bool, has_label: bool,
    entropy: Floats, label: Floats,
) -> int:
    # fmt: on
    """`[n]` entropies and log-probabilities of labels, where they are stored: 0, or a problem."""
    if has_entropy and not _read_word(high, low, plane, word, nats, entropy):
        return _ENTROPY
    if has_label:
        if not _read_word(high, low, plane, word + has_entropy, nats, label):
            return _ENTROPY
        for i in range(len(label)):
            label[i] = -label[i]
    return 0


@compiled
def _find_ids(
    stream: Bytes, entries: int, planes: int, counts: Ints, heavies: Ints, order: Ids, vocab_size: int, ids: Ids
) -> int:
    """`[n K]` ids of a stream of distances and far ends; see runs.py."""
    last, start, known = np.uint64(vocab_size - 1), np.uint64(entries), np.uint64(len(order))
    at, base, beyond, ends = _0, _0, _0, np.uint64((len(stream) - entries) // planes)
    width = np.uint64(len(ids) // max(1, len(counts)))
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
                        return _FAR_ENDS
                    more = _0
                    for plane in range(np.uint64(planes)):
                        more = more << _8 | np.uint64(stream[start + beyond + plane * ends])
                    rank += more
                    beyond += _1
                    if rank > last:
                        return _VOCABULARY
                place = rank if padded else min(rank, last)
                ids[base + k] = order[place] if padded or place < known else np.int32(place)
            if rank > last:  # ranks rise, so the last of a run is its largest
                return _VOCABULARY
            j = stop
        for k in range(j, width):
            ids[base + k] = 0
        at += j
        base += width
    return 0 if beyond == ends else _FAR_ENDS


@compiled
def _sum_levels(
    values: Values, counts: Ints, floors: Ints, top: int, fixed: Ints, fields: int, unit: float, sums: Doubles
) -> int:
    """`[n, n_T]` sums of what levels stand for; see levels.py."""
    at, highest = _0, np.uint64(top)
    for i in range(len(counts)):
        count, floor = np.uint64(counts[i]), np.uint64(floors[i])
        if not count:
            sums[i] = 1
            continue
        largest = values[at]
        for j in range(count):
            largest = max(largest, values[at + j])
        if floor + np.uint64(largest) != highest:  # so every level lies in the tables, and every sum is at least 1
            return _LEVEL
        for row in range(len(fixed)):
            total = np.int64(0)
            for j in range(count):
                total += fixed[row, floor + np.uint64(values[at + j])]
            if fields == 1:
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
    values: Values, counts: Ints, floors: Ints, table: Floats, log_table: Floats,
    scales: Floats, log_scales: Doubles, temperature: float, weights: Floats, logs: Floats,
) -> None:
    # fmt: on
    """`[n K]` weights of levels, 0 past the count, and T log of them, -inf past it."""
    at, base, width = _0, _0, np.uint64(len(weights) // max(1, len(counts)))
    for i in range(len(counts)):
        count, floor = np.uint64(counts[i]), np.uint64(floors[i])
        scale, shift = scales[i], np.float32(temperature * log_scales[i])
        for j in range(count):
            weights[base + j] = table[floor + np.uint64(values[at + j])]
        for j in range(count):
            logs[base + j] = log_table[floor + np.uint64(values[at + j])]
        for j in range(count):  # apart from the look-ups, this is done eight at a time
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
def _find_weights(
    values: Values, counts: Ints, floors: Ints, log_mass: Doubles,
    top: int, table: Floats, log_table: Floats, fixed: Ints, fields: int, unit: float,
    temperature: float, exponents: Doubles, weights: Floats, logs: Floats, sums: Doubles,
) -> int:
    # fmt: on
    """Turn levels into weights that sum to a given mass, and log sum w^(T / T') at each temperature T'.

    In passes over the row: in one, each position would wait for its own logarithms.
    """
    problem = _sum_levels(values, counts, floors, top, fixed, fields, unit, sums)
    if problem:
        return problem
    scales, log_scales = np.empty(len(counts), np.float32), np.empty(len(counts))
    _scale(sums, log_mass, exponents, scales, log_scales)
    _write_weights(values, counts, floors, table, log_table, scales, log_scales, temperature, weights, logs)
    return 0


@compiled
def add_lights(
    times: Values, counts: Ints, heavies: Ints, log_mass: Doubles, draws: int, weights: Floats, logprobs: Floats
) -> int:
    """Write the lights behind the heavies of `[n K]` weights.

    They share a mass equally, or by how often each was drawn if `draws` is not 0; all of it where there is no heavy.
    """
    at, width = 0, len(weights) // max(1, len(counts))
    left: Any
    for i in range(len(counts)):
        heavy, lights = heavies[i], counts[i] - heavies[i]
        if lights:
            mass, base, left = math.exp(log_mass[i]) if heavy else 1.0, i * width + heavy, draws
            for j in range(lights):
                share = mass / lights
                if draws:
                    if not times[at + j]:
                        return _DRAWS
                    left -= np.int64(times[at + j])
                    share = mass * times[at + j] / draws
                weights[base + j] = share
                logprobs[base + j] = np.nan
            if left:
                return _DRAWS
            if draws:
                at += lights
    return 0


# fmt: off
@compiled
def unpack_truncated(
    near: Bytes, values: Values, high: Bytes, low: Bytes,
    width: int, planes: int, order: Ids, vocab_size: int, named_ids: bool, count_size: int, floor_size: int,
    top: int, table: Floats, log_table: Floats, fixed: Ints, fields: int, unit: float,
    exponents: Doubles, columns: Ints, log_mass: Doubles, log_rest: Doubles, nats: Floats,
    has_entropy: bool, has_label: bool,
    ids: Ids, weights: Floats, logprobs: Floats, count: NDArray[np.int32],
    log_partition: Floats, log_tail: Floats, entropy: Floats, label: Floats,
) -> int:
    # fmt: on
    """Fill the targets of a row of a truncated kind; streams and numbers as compact.py has them.

    Returns:
        0, or a problem.
    """
    n, first, odds = high.shape[1], count_size + floor_size, len(low) - has_entropy - has_label
    counts = np.full(n, width)
    if count_size:
        _read_count(high, 0, count_size, counts)
    entries = 0
    for i in range(n):
        if counts[i] < 1 or counts[i] > width:
            return _COUNT
        entries += counts[i]
    if len(values) != entries:
        return _VALUES
    if named_ids:
        if len(near) < entries or (len(near) - entries) % planes:
            return _FAR_ENDS
        problem = _find_ids(near, entries, planes, counts, counts, order, vocab_size, ids)
        if problem:
            return problem
    floors, sums, kept = np.empty(n, np.int64), np.empty((n, len(exponents))), np.zeros((len(columns), n))
    _read_count(high, count_size, floor_size, floors)
    log_tail[:] = -np.inf
    for k in range(len(columns) if odds else 0):
        _read_word(high, low, first, columns[k], log_rest, kept[k])
        _read_word(high, low, first, columns[k], log_mass, log_tail[:, columns[k]])
    problem = _find_weights(
        values, counts, floors, kept[0], top, table, log_table, fixed, fields, unit,
        1.0, exponents, weights, logprobs, sums,
    )  # fmt: skip
    if problem:
        return problem
    for k in range(len(columns)):
        for i in range(n):
            log_partition[i, columns[k]] = sums[i, k] - kept[k, i] if k else 0.0
    for i in range(n):
        count[i] = counts[i]
    return _read_measures(high, low, first, odds, nats, has_entropy, has_label, entropy, label)


# fmt: off
@compiled
def unpack_sampled(
    near: Bytes, values: Values, high: Bytes, low: Bytes,
    width: int, planes: int, order: Ids, vocab_size: int, draws: int, most_heavies: int,
    count_size: int, heavy_size: int,
    top: int, table: Floats, log_table: Floats, fixed: Ints, unit: float,
    temperatures: Doubles, columns: Ints, own_column: int, log_mass: Doubles, log_rest: Doubles, nats: Floats,
    has_entropy: bool, has_label: bool,
    ids: Ids, weights: Floats, logprobs: Floats, count: NDArray[np.int32],
    log_partition: Floats, entropy: Floats, label: Floats,
) -> int:
    # fmt: on
    """Fill the targets of a row of a sampled kind; `draws` is 0 for `ipps`.

    Returns:
        0, or a problem.
    """
    n, first, odds = high.shape[1], count_size + heavy_size, 1 if heavy_size else 0
    counts, heavies, log_lights, log_heavies = np.empty(n, np.int64), np.empty(n, np.int64), np.zeros(n), np.zeros(n)
    log_partition[:] = 0
    _read_count(high, 0, count_size, counts)
    _read_count(high, count_size, heavy_size, heavies)
    entries, valued = 0, 0
    for i in range(n):
        if counts[i] < 1 or counts[i] > width or heavies[i] > min(counts[i], most_heavies):
            return _COUNT
        entries += counts[i]
        valued += counts[i] - heavies[i] if draws else heavies[i]
    if len(values) != valued:
        return _VALUES
    if len(near) < entries or (len(near) - entries) % planes:
        return _FAR_ENDS
    problem = _find_ids(near, entries, planes, counts, heavies, order, vocab_size, ids)
    if problem:
        return problem
    if odds:
        _read_word(high, low, first, 0, log_mass, log_lights)
        _read_word(high, low, first, 0, log_rest, log_heavies)
    for k in range(len(columns)):
        if not _read_word(high, low, first, odds + k, nats, entropy):
            return _ENTROPY
        for i in range(n):
            log_partition[i, columns[k]] = entropy[i] * (1 - 1 / temperatures[columns[k]])
    temperature = temperatures[own_column]
    for i in range(n):
        if heavies[i] == counts[i]:
            log_heavies[i] = 0.0
    if draws:
        weights[:] = 0
        logprobs[:] = -np.inf
        for i in range(n):
            if heavies[i]:
                weights[i * width], logprobs[i * width] = math.exp(log_heavies[i]), temperature * log_heavies[i]
    else:
        problem = _find_weights(
            values, heavies, np.zeros(n, np.int64), log_heavies, top, table, log_table, fixed, 1, unit, temperature,
            np.ones(1), weights, logprobs, np.empty((n, 1)),
        )  # fmt: skip
        if problem:
            return problem
    if own_column in columns:
        for i in range(n):
            for j in range(i * width, i * width + heavies[i]):
                logprobs[j] += temperature * log_partition[i, own_column]
    problem = add_lights(values, counts, heavies, log_lights, draws, weights, logprobs)
    if problem:
        return problem
    for i in range(n):
        count[i] = counts[i]
    return _read_measures(high, low, first, odds + len(columns), nats, has_entropy, has_label, entropy, label)
