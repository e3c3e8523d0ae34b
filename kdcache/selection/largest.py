"""Largest: the k largest logits of each position, ties by id.

A value and its place make one integer that orders as (value, then smaller id), so the answer is unique: the same
on every device and for every batch. The k largest lie in the k blocks of ids whose own largest are
largest, so only those blocks are ranked.
Cost: one pass for the blocks' maxima, and a ranking of k blocks; over 32,000 ids two thirds of torch.topk's.

Shapes: n positions, V vocabulary.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from kdcache.selection.blocks import contents, maxima

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
