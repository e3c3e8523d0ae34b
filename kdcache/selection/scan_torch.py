"""Scan in torch's operations: what scan_cpu.py does, over a whole tile at a time, for any device.

The k largest logits, ties by id: a value and its place make one integer that orders as (value, then smaller id), so the
answer is unique, the same on every device and for every batch. The k largest lie in the k blocks of ids whose own
largest are largest, so only those blocks are ranked.

Cost: a pass for the blocks' maxima and five for the sums, and three more for each temperature that is not 1; a ranking
of k blocks, over 32,000 ids two thirds of torch.topk's time.

Shapes: n positions, V vocabulary, W head, S = min(W + 1, V), B blocks (V // 64 + 1, or of `size`
ids), n_T temperatures.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from kdcache.lazy_torch import torch
from kdcache.selection.scan_cpu import BLOCK

if TYPE_CHECKING:
    from torch import Tensor

_LAST = 0x7FFFFFFF


def largest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row.

    Args:
        x: `[n, V]` float32.
        k: at most V.

    Returns:
        `[n, k]` values, falling, and their `[n, k]` ids; among equal values the smaller id comes first.
        NaN ranks above everything, or below if its sign is set.
    """
    n, vocab = x.shape
    size = 64 if k < 32 else 32
    if 2 * k * size >= vocab:
        return _split(_keys(x).topk(k).values)
    _, found = _split(_keys(maxima(x, size)).topk(k, sorted=False).values)
    block = found.sort(-1).values  # so that columns below are in id order
    rows = torch.arange(n, device=x.device)[:, None]
    values, column = _split(_keys(contents(x, rows, block, size).flatten(1)).topk(k).values)
    return values, block.gather(-1, column // size) * size + column % size


def _keys(values: Tensor) -> Tensor:
    """int64 that order as (value, then smaller column); -0 is made 0."""
    bits = (values + 0.0).view(torch.int32)
    halves = torch.empty(*values.shape, 2, dtype=torch.int32, device=values.device)
    low, high = (0, 1) if sys.byteorder == "little" else (1, 0)
    torch.bitwise_xor(bits, (bits >> 31) & _LAST, out=halves[..., high])  # the order of floats, as integers
    halves[..., low] = _LAST - torch.arange(values.shape[-1], dtype=torch.int32, device=values.device)
    return halves.view(torch.int64)[..., 0]


def _split(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The values and columns of keys."""
    rising = (keys >> 32).int()
    return (rising ^ ((rising >> 31) & _LAST)).view(torch.float32), _LAST - (keys & 0xFFFFFFFF)


def maxima(x: Tensor, size: int) -> Tensor:
    """`[n, B]` the largest logit of each block of `[n, V]` logits."""
    whole = x.shape[-1] // size
    parts = [_whole(x, size).amax(-1)] if whole else []
    if whole * size < x.shape[-1]:
        parts.append(x[:, whole * size :].amax(-1, keepdim=True))
    return torch.cat(parts, -1)


def contents(x: Tensor, rows: Tensor, block: Tensor, size: int) -> Tensor:
    """`[..., size]` the logits of chosen blocks of chosen rows; -inf past the vocabulary."""
    n, vocab = x.shape
    whole = vocab // size
    if whole * size == vocab and x.is_contiguous():  # whole rows of memory: three times as fast
        return x.view(-1, size).index_select(0, (rows * whole + block).flatten()).view(*block.shape, size)
    found = _whole(x, size)[rows, block.clamp(max=whole - 1)] if whole else None
    if whole * size == vocab and found is not None:
        return found
    last = torch.cat([x[:, whole * size :], x.new_full((n, (whole + 1) * size - vocab), -torch.inf)], -1)
    return last[rows] if found is None else torch.where((block == whole)[..., None], last[rows], found)


def _whole(x: Tensor, size: int) -> Tensor:
    whole = x.shape[-1] // size
    return x[:, : whole * size].reshape(len(x), whole, size)  # a view, whatever the stride of a row


_EXCLUDED = -1e5
"""A logit so low that its exponential is 0 at every temperature, and 0 times it is 0."""


_ELEMENTS = 1 << 24
"""Logits that operations work on at once, so that intermediate results take little memory."""


def scan_rows(
    x: Tensor, width: int, outside: Tensor, temperatures: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest of each row, and the others' block sums: arguments and results are those of `scan_cpu.scan_rows`."""
    rows = max(1, _ELEMENTS // x.shape[-1])
    parts = [
        _scan_rows(x[i : i + rows].float(), width, outside[i : i + rows], temperatures)
        for i in range(0, max(1, len(x)), rows)
    ]
    values, ids, sums, entropy_terms = (torch.cat(part) for part in zip(*parts, strict=True))
    return values, ids, sums, entropy_terms


def _scan_rows(
    x: Tensor, width: int, outside: Tensor, temperatures: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, vocab = x.shape
    values, ids = largest(x, min(width + 1, vocab))
    blocks = vocab // BLOCK + 1  # at least one column beyond the vocabulary, for positions without an id outside
    if width == vocab:
        return values, ids, x.new_zeros(n, len(temperatures), blocks), x.new_zeros(n, blocks)
    below, e = x.new_empty(2, n, blocks * BLOCK)
    below[:, vocab:] = _EXCLUDED
    torch.sub(x, values[:, width:], out=below[:, :vocab])
    below.scatter_(-1, torch.cat([ids[:, :width], outside[:, None]], -1), _EXCLUDED)
    sums = x.new_empty(n, len(temperatures), blocks)
    for column, t in enumerate(temperatures):
        torch.exp(below if t == 1 else torch.div(below, t, out=e), out=e)
        torch.sum(e.view(n, blocks, BLOCK), -1, out=sums[:, column])
    entropy_terms = e.mul_(below).view(n, blocks, BLOCK).sum(-1)  # T = 1 came last
    return values, ids, sums, entropy_terms.neg_()
