"""Blocks: the vocabulary in runs of ids, so that a search need look into a few of them only.

Shapes: n positions, V vocabulary, B blocks of `size` ids (the last may be short).
"""

from __future__ import annotations

import torch
from torch import Tensor


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
