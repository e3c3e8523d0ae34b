"""Scan on a CPU: one pass over each row of logits, for its largest and for what the others weigh.

A row is read from memory once and stays in a core's own cache. Rows are divided among as many threads as torch uses,
and no row's result depends on how.

The k largest: they lie in the k blocks whose own largest are largest, and reach the smallest of those; few others
do, so few are sorted. The others' exponentials: Taylor's series of exp(r) to the sixth power, where x = n log 2 + r and
abs(r) <= log(2) / 2. A block's sum is made in the order that suits the machine's vectors, the same for every row.

Guarantee: the largest are exact, ties by id; an exponential is within 3e-7 of itself, and 0 below exp(-87). Its
argument (x - centre) / T is rounded to float32, three times at T != 1: 2e-7 more for each nat of it.

Shapes: n positions, V vocabulary, W head, S = min(W + 1, V), B blocks (V // 64 + 1), n_T temperatures.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from kdcache.compiled import compiled, compiled_fused, compiled_reordered
from kdcache.lazy_torch import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64
"""Ids whose exponentials are summed in float32, before float64 takes over."""

_THREAD_ELEMENTS = 1 << 18
"""Logits that are worth a thread."""

_Floats = NDArray[np.float32]
_Ints = NDArray[np.int64]

_LAST, _LEAST, _SIGN = np.int32(0x7FFFFFFF), np.int32(-(2**31)), np.int32(31)
_LOG2_E = np.float32(1 / np.log(2))
_LN2_HIGH = np.float32(np.round(np.log(2) * 512) / 512)  # few bits, so that its small multiples are exact
_LN2_LOW = np.float32(np.log(2) - np.round(np.log(2) * 512) / 512)
_ROUNDER = np.float32(1.5 * 2**23)  # a number added to it leaves its nearest integer in the last bits
_LOWEST = np.float32(-87)
_EXCLUDED = np.float32(-1e5)  # a difference whose exponential is 0 at every temperature, and 0 times it is 0
_T2, _T3, _T4, _T5, _T6 = (np.float32(1 / factorial) for factorial in (2, 6, 24, 120, 720))
_ZERO, _ONE = np.float32(0), np.float32(1)


@compiled
def _rising(value: np.float32) -> np.int32:
    """An integer that orders as the value does; -0 counts as 0, and a NaN has a place like others."""
    bits = np.float32(value + _ZERO).view(np.int32)
    return np.int32(bits ^ ((bits >> _SIGN) & _LAST))


@compiled
def _peak(x: _Floats) -> np.int32:
    """The largest `_rising` of some numbers: as integers, in vectors."""
    best = _LEAST
    for j in range(len(x)):
        best = max(best, _rising(x[j]))
    return best


@compiled
def _key(rising: np.int32, place: int) -> int:
    """An integer that orders as (value, then smaller place)."""
    return (int(rising) << 32) | (int(_LAST) - place)


@compiled
def _place(key: int) -> int:
    return int(_LAST) - (key & 0xFFFFFFFF)


@compiled
def _part(keys: _Ints, k: int) -> _Ints:
    """The k largest, the least of them first, by reordering: Hoare's selection (1961, Algorithm 65: Find)."""
    low, high, border = 0, len(keys) - 1, len(keys) - k
    while low < high:
        pivot, i, j = keys[(low + high) >> 1], low, high
        while i <= j:
            while keys[i] < pivot:
                i += 1
            while keys[j] > pivot:
                j -= 1
            if i <= j:
                keys[i], keys[j] = keys[j], keys[i]
                i, j = i + 1, j - 1
        if border <= j:
            high = j
        elif border >= i:
            low = i
        else:
            break
    return keys[border:]


@compiled
def _rank(row: _Floats, peaks: _Ints, near: _Ints, values: _Floats, ids: _Ints) -> None:
    """Fill `[S]` values and ids of the largest of a row, falling; `[B]` peaks and `[V]` near are scratch."""
    vocab, k, found = len(row), len(values), 0
    blocks, whole = (vocab + BLOCK - 1) // BLOCK, vocab // BLOCK
    if k < blocks:
        for b in range(whole):
            peaks[b] = _key(_peak(row[b * BLOCK : (b + 1) * BLOCK]), b)
        if whole < blocks:
            peaks[whole] = _key(_peak(row[whole * BLOCK :]), whole)
        nearest = _part(peaks[:blocks], k)
        bound = nearest[0] >> 32
        for peak in nearest:
            start = _place(peak) * BLOCK
            for j in range(start, min(vocab, start + BLOCK)):
                rising = _rising(row[j])
                if rising >= bound:
                    near[found] = _key(rising, j)
                    found += 1
    else:
        for j in range(vocab):
            near[j] = _key(_rising(row[j]), j)
        found = vocab
    best = _part(near[:found], k)
    best.sort()
    for j in range(k):
        token = _place(best[k - 1 - j])
        values[j], ids[j] = row[token] + _ZERO, token


@compiled_fused
def _exp(x: np.float32) -> np.float32:
    low = x if x > _LOWEST else _LOWEST
    rounded = low * _LOG2_E + _ROUNDER
    n = rounded - _ROUNDER
    r = low - n * _LN2_HIGH - n * _LN2_LOW
    series = (((((_T6 * r + _T5) * r + _T4) * r + _T3) * r + _T2) * r + _ONE) * r + _ONE
    e = np.int32(np.float32(series).view(np.int32) + (np.float32(rounded).view(np.int32) << np.int32(23)))
    return e.view(np.float32) if x > _LOWEST else _ZERO


@compiled_reordered
def _mass(block: _Floats, centre: np.float32, scale: np.float32) -> np.float32:
    """The sum of e = exp((x - centre) scale) over 64 logits."""
    mass = _ZERO
    for j in range(BLOCK):
        mass += _exp((block[j] - centre) * scale)
    return mass


@compiled_reordered
def _mass_and_entropy(block: _Floats, centre: np.float32) -> tuple[np.float32, np.float32]:
    """The sums of e and of -e log e at T = 1; the latter is NaN if a logit is not finite."""
    mass = entropy_terms = _ZERO
    for j in range(BLOCK):
        below = block[j] - centre
        e = _exp(below)
        mass += e
        entropy_terms -= below * e
    return mass, entropy_terms


# fmt: off
@compiled
def _weigh(
    row: _Floats, centre: np.float32, skip: _Ints, scales: _Floats, copy: _Floats,
    sums: _Floats, entropy_terms: _Floats,
) -> None:
    # fmt: on
    """Fill `[n_T, B]` masses of blocks and `[B]` entropy terms.

    `skip` are the ids to leave out, rising, then V; `[64]` copy is scratch.
    """
    vocab, last, at = len(row), len(scales) - 1, 0
    for b in range(len(entropy_terms)):
        start, end = b * BLOCK, (b + 1) * BLOCK
        block, around = row[start:end], centre
        if end > vocab or skip[at] < end:
            for j in range(BLOCK):
                copy[j] = block[j] - centre if start + j < vocab else _EXCLUDED
            block, around = copy, _ZERO  # a copy of differences: below a huge centre there is no excluded number
            while at < len(skip) - 1 and skip[at] < end:
                copy[skip[at] - start] = _EXCLUDED
                at += 1
        for t in range(last):
            sums[t, b] = _mass(block, around, scales[t])
        sums[last, b], entropy_terms[b] = _mass_and_entropy(block, around)


# fmt: off
@compiled
def _scan_rows(
    x: _Floats, stride: int, vocab: int, width: int, outside: _Ints, scales: _Floats,
    values: _Floats, ids: _Ints, sums: _Floats, entropy_terms: _Floats,
) -> None:
    # fmt: on
    """The rows of one thread, into arrays that `scan_rows` returns."""
    n, blocks = entropy_terms.shape
    peaks, near = np.empty(blocks, np.int64), np.empty(vocab, np.int64)
    copy, skip = np.empty(BLOCK, np.float32), np.full(width + 2, vocab)
    for i in range(n):
        row = x[i * stride : i * stride + vocab]
        _rank(row, peaks, near, values[i], ids[i])
        if width < vocab:
            for j in range(width):
                skip[j] = ids[i, j]
            skip[width] = outside[i]
            skip[: width + 1].sort()  # one beyond it is V
            _weigh(row, values[i, width], skip, scales, copy, sums[i], entropy_terms[i])


def scan_rows(
    x: Tensor, width: int, outside: Tensor, temperatures: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest of each row, and the others' block sums around the largest of them.

    Args:
        x: `[n, V]` on a CPU, of any floating dtype, taken as float32.
        width: W, 1 to V.
        outside: `[n]` an id to leave out of the sums besides the W largest; V for none.
        temperatures: T of the sums; the last is 1.

    Returns:
        `[n, S]` values, falling, and their ids: S = W + 1, the last is not of the head and what sums are relative to
        (without it if W = V); `[n, n_T, B]` sums of e = exp((x - centre) / T), and `[n, B]` of -e log e at T = 1.
        One of them is NaN where a logit is not finite.
    """
    n, vocab = x.shape
    x = x.float()
    if x.stride(-1) != 1:
        x = x.contiguous()
    blocks, stride = vocab // BLOCK + 1, x.stride(0)
    line = x.detach().as_strided(((n - 1) * stride + vocab if n else 0,), (1,)).numpy()
    values, ids = np.empty((n, min(width + 1, vocab)), np.float32), np.empty((n, min(width + 1, vocab)), np.int64)
    sums, entropy_terms = np.zeros((n, len(temperatures), blocks), np.float32), np.zeros((n, blocks), np.float32)
    labels, scales = outside.numpy(), np.array([1 / t for t in temperatures], np.float32)

    def run(part: slice) -> None:
        start = part.start * stride
        _scan_rows(
            line[start:], stride, vocab, width, labels[part], scales,
            values[part], ids[part], sums[part], entropy_terms[part],
        )  # fmt: skip

    threads = max(1, min(torch.get_num_threads(), n * vocab // _THREAD_ELEMENTS, n))
    bounds = [n * i // threads for i in range(threads + 1)]
    first, *others = [slice(*pair) for pair in pairwise(bounds)]
    waiting = [_pool(os.getpid(), torch.get_num_threads()).submit(run, part) for part in others]
    run(first)
    for each in waiting:
        each.result()
    return torch.from_numpy(values), torch.from_numpy(ids), torch.from_numpy(sums), torch.from_numpy(entropy_terms)


@functools.cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:  # noqa: ARG001 - a fork has none of its parent's threads
    return ThreadPoolExecutor(threads, thread_name_prefix="kdcache-rows")
