"""Scan on a GPU: what scan_cpu.py does on a CPU, in Triton (Tillet, Kung and Cox 2019).

Each logit is read once from the GPU's memory, in the dtype that it has, and blocks that hold the largest once more:

    _look    of every block of 64: its largest, and what it weighs around that
    _choose  the S blocks whose own largest are largest: the S largest logits lie in them
    _rank    those S logits, and what their blocks weigh without the head
    _finish  the S in order, and all other blocks weighed around the same centre

What is chosen is found by halving the integers that order as floats do, 32 times; ties go by id. Nothing is sorted but
the S, nothing is added up across programs and nothing waits for the CPU, so the same logits give the same bits, if
they are stored alike: a dtype, or a row's stride that is no multiple of 16, may change the order of a block's sum.

Guarantee: that of `scan_cpu.scan_rows`, with the GPU's own exponential: within 3e-7 (6e-7 in blocks that
are not chosen, where it is a product of two), and 2e-7 more for each nat of its argument.
Cost: one read of the logits, and B (2 + n_T) numbers a position written and read once more.

Shapes: n positions, V vocabulary, W head, S = W + 1, B blocks (V // 64 + 1), n_T temperatures.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdcache.selection import scan_torch
from kdcache.selection.scan_cpu import BLOCK

WIDEST = 255
"""The widest head that `_rank` can hold, as 32 logits a thread; wider ones are left to scan_torch.py."""

_CHUNK = 64
"""Blocks of a program of `_look`."""

_SIZE = tl.constexpr(BLOCK)
_LEAST = tl.constexpr(-(2**31))
_LAST = tl.constexpr(0x7FFFFFFF)


@triton.jit
def _rising(value):
    """An integer that orders as the value does, see scan_cpu.py."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & _LAST)


@triton.jit
def _value(rising):
    return (rising ^ ((rising >> 31) & _LAST)).to(tl.float32, bitcast=True)


@triton.jit
def _bound(keys, k):
    """The k-th largest of some integers, bit by bit: the largest number that k of them reach."""
    bound = tl.where(tl.sum((keys >= 0).to(tl.int32)) >= k, 0, _LEAST)
    for i in range(31):
        higher = bound | (1 << (30 - i))
        bound = tl.where(tl.sum((keys >= higher).to(tl.int32)) >= k, higher, bound)
    return bound


@triton.jit
def _first(keys, valid, k):
    """The k-th largest, and which keys are the k largest; of equal ones those that come first."""
    bound = _bound(tl.where(valid, keys, _LEAST), k)
    above, equal = valid & (keys > bound), valid & (keys == bound)
    left = k - tl.sum(above.to(tl.int32))
    return bound, above | (equal & (tl.cumsum(equal.to(tl.int32)) <= left))


@triton.jit
def _look(
    x, stride, vocab, blocks, scales, peaks, sums, entropy_terms, temperatures: tl.constexpr, chunk: tl.constexpr
):
    """Program (i, c): of position i, 64 blocks from 64 c on. Scales are log2(e) / T, the last of them of T = 1."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1) * chunk + tl.arange(0, chunk)
    token = block[:, None] * _SIZE + tl.arange(0, _SIZE)[None, :]
    inside, there = token < vocab, block < blocks
    logits = tl.load(x + row * stride + token, mask=inside, other=0.0).to(tl.float32)
    peak = tl.max(tl.where(inside, _rising(logits), _LEAST), axis=1)
    below = logits - _value(peak)[:, None]
    tl.store(peaks + row * blocks + block, peak, mask=there)
    for t in tl.static_range(temperatures):
        e = tl.where(inside, tl.exp2(below * tl.load(scales + t)), 0.0)
        tl.store(sums + (row * temperatures + t) * blocks + block, tl.sum(e, axis=1), mask=there)
        if t == temperatures - 1:
            terms = tl.where(inside, -below * e, 0.0)
            tl.store(entropy_terms + row * blocks + block, tl.sum(terms, axis=1), mask=there)


@triton.jit
def _choose(peaks, blocks, full, k, chosen, borders, span: tl.constexpr):
    """Program i: the k of its `full` blocks that are to be ranked, rising; and the last of them in falling order."""
    row, block = tl.program_id(0).to(tl.int64), tl.arange(0, span)
    peak = tl.load(peaks + row * blocks + block, mask=block < full, other=_LEAST)
    bound, mine = _first(peak, block < full, k)
    tl.store(chosen + row * k + tl.cumsum(mine.to(tl.int32)) - 1, block, mask=mine)
    tl.store(borders + 2 * row, bound)
    tl.store(borders + 2 * row + 1, tl.max(tl.where(mine & (peak == bound), block, -1)))


# fmt: off
@triton.jit
def _rank(
    x, stride, vocab, blocks, scales, outside, chosen, k, kept, near, ids, centres, sums, entropy_terms,
    temperatures: tl.constexpr, span: tl.constexpr,
):
    # fmt: on
    """Program i: the `kept` largest logits of its k chosen blocks, in the order of ids; and those blocks' sums."""
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, span * _SIZE)
    block = tl.load(chosen + row * k + place // _SIZE, mask=place // _SIZE < k, other=0)
    token = block * _SIZE + place % _SIZE
    inside = (place // _SIZE < k) & (token < vocab)
    logits = tl.load(x + row * stride + token, mask=inside, other=0.0).to(tl.float32)
    rising = _rising(logits)
    bound, mine = _first(rising, inside, kept)
    slot = row * kept + tl.cumsum(mine.to(tl.int32)) - 1
    tl.store(near + slot, rising, mask=mine)
    tl.store(ids + slot, token, mask=mine)
    centre = tl.max(tl.where(mine & (rising == bound), token, -1))  # the last of them is not of the head
    tl.store(centres + row, bound)
    counts = inside & (~mine | (token == centre)) & (token != tl.load(outside + row))
    below = tl.where(counts, logits - _value(bound), 0.0)
    which = tl.arange(0, span)
    here = tl.load(chosen + row * k + which, mask=which < k, other=0)
    for t in tl.static_range(temperatures):
        e = tl.where(counts, tl.exp2(below * tl.load(scales + t)), 0.0)
        mass = tl.sum(tl.reshape(e, (span, _SIZE)), axis=1)
        tl.store(sums + (row * temperatures + t) * blocks + here, mass, mask=which < k)
        if t == temperatures - 1:
            terms = tl.sum(tl.reshape(-below * e, (span, _SIZE)), axis=1)
            tl.store(entropy_terms + row * blocks + here, terms, mask=which < k)


# fmt: off
@triton.jit
def _finish(
    x, stride, vocab, blocks, scales, outside, peaks, borders, centres, near, near_ids, kept, values, ids,
    sums, entropy_terms,
    temperatures: tl.constexpr, span: tl.constexpr, width: tl.constexpr,
):
    # fmt: on
    """Program i: its `kept` largest in falling order, and the sums of all blocks that were not chosen."""
    row, place = tl.program_id(0).to(tl.int64), tl.arange(0, width)
    own = tl.load(near + row * kept + place, mask=place < kept, other=_LEAST)
    rank = tl.zeros((width,), tl.int32)
    for j in range(kept):  # in the order of ids: of equal ones the first comes first
        other = tl.load(near + row * kept + j)
        rank += ((other > own) | ((other == own) & (j < place))).to(tl.int32)
    tl.store(values + row * kept + rank, _value(own), mask=place < kept)
    token = tl.load(near_ids + row * kept + place, mask=place < kept, other=0)
    tl.store(ids + row * kept + rank, token.to(tl.int64), mask=place < kept)

    block = tl.arange(0, span)
    centre, label = _value(tl.load(centres + row)), tl.load(outside + row)
    peak = tl.load(peaks + row * blocks + block, mask=block < blocks, other=_LEAST)
    bound, last = tl.load(borders + 2 * row), tl.load(borders + 2 * row + 1)
    rest = (block * _SIZE < vocab) & ((peak < bound) | ((peak == bound) & (block > last)))
    again = tl.max((rest & (block == label // _SIZE)).to(tl.int32)) > 0  # a block without the label is weighed anew
    rest = rest & (block != label // _SIZE)
    token = label // _SIZE * _SIZE + tl.arange(0, _SIZE)
    counts = again & (token < vocab) & (token != label)
    below = tl.where(counts, tl.load(x + row * stride + token, mask=counts, other=0.0).to(tl.float32) - centre, 0.0)
    down = _value(peak) - centre
    for t in tl.static_range(temperatures):
        scale, at = tl.load(scales + t), (row * temperatures + t) * blocks
        mass, unit = tl.load(sums + at + block, mask=rest, other=0.0), tl.exp2(down * scale)
        tl.store(sums + at + block, mass * unit, mask=rest)
        e = tl.where(counts, tl.exp2(below * scale), 0.0)
        tl.store(sums + at + label // _SIZE, tl.sum(e), mask=again)
        if t == temperatures - 1:
            terms = tl.load(entropy_terms + row * blocks + block, mask=rest, other=0.0) * unit
            terms -= down * unit * mass  # not `down * mass` first: where a teacher masks ids, that overflows
            tl.store(entropy_terms + row * blocks + block, terms, mask=rest)
            tl.store(entropy_terms + row * blocks + label // _SIZE, tl.sum(-below * e), mask=again)


def scan_rows(
    x: Tensor, width: int, outside: Tensor, temperatures: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest of each row, and the others' block sums: arguments and results are those of `scan_cpu.scan_rows`."""
    n, vocab = x.shape
    if n == 0 or width == vocab or width > WIDEST:
        return scan_torch.scan_rows(x, width, outside, temperatures)
    if x.stride(-1) != 1:
        x = x.contiguous()
    kept, blocks, full = width + 1, vocab // BLOCK + 1, -(-vocab // BLOCK)
    k, scales = min(kept, full), _scales(tuple(temperatures), x.device)
    given = (x, x.stride(0), vocab, blocks, scales)
    peaks, sums = x.new_empty(n, blocks, dtype=torch.int32), x.new_empty(n, len(scales), blocks, dtype=torch.float32)
    entropy_terms, borders = torch.empty_like(peaks, dtype=torch.float32), peaks.new_empty(n, 2)
    chosen, centres, near, near_ids = (peaks.new_empty(n, size) for size in (k, 1, kept, kept))
    values, ids = sums.new_empty(n, kept), outside.new_empty(n, kept)
    temps = {"temperatures": len(scales)}
    with torch.cuda.device_of(x):
        _look[n, triton.cdiv(blocks, _CHUNK)](*given, peaks, sums, entropy_terms, **temps, chunk=_CHUNK)
        span = triton.next_power_of_2(full)
        _choose[n,](peaks, blocks, full, k, chosen, borders, span=span, num_warps=_warps(span))
        span = triton.next_power_of_2(k)
        _rank[n,](
            *given, outside, chosen, k, kept, near, near_ids, centres, sums, entropy_terms,
            **temps, span=span, num_warps=_warps(span * BLOCK),
        )  # fmt: skip
        span = triton.next_power_of_2(blocks)
        _finish[n,](
            *given, outside, peaks, borders, centres, near, near_ids, kept, values, ids, sums, entropy_terms,
            **temps, span=span, width=triton.next_power_of_2(kept), num_warps=_warps(span),
        )  # fmt: skip
    return values, ids, sums, entropy_terms


def _warps(numbers: int) -> int:
    """Warps of a program that holds so many numbers at once: 16 a thread, as far as 4 to 16 warps go."""
    return min(16, max(4, numbers // 512))


@functools.cache
def _scales(temperatures: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor([1 / (t * math.log(2)) for t in temperatures], dtype=torch.float32, device=device)
