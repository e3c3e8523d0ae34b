"""Passes: what loops.py does on a CPU, in whole-tile operations of torch, for any device.

Cost: a pass for the blocks' maxima and five for the sums, and three more for each temperature that is not 1.

Shapes: n positions, V vocabulary, W head, S = min(W + 1, V), B blocks (V // 64 + 1), n_T temperatures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.selection.largest import largest
from kdcache.selection.loops import BLOCK

_NOBODY = -1e5
"""A logit so low that its exponential is 0 at every temperature, and 0 times it is 0."""


_ELEMENTS = 1 << 24
"""Logits that operations work on at once, so that what lies between them takes little memory."""


def visit(x: Tensor, width: int, outside: Tensor, temperatures: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The largest of each row, and the others' block sums: arguments and results are those of `loops.visit`."""
    rows = max(1, _ELEMENTS // x.shape[-1])
    parts = [
        _visit(x[i : i + rows].float(), width, outside[i : i + rows], temperatures)
        for i in range(0, max(1, len(x)), rows)
    ]
    values, ids, sums, surprise = (torch.cat(part) for part in zip(*parts, strict=True))
    return values, ids, sums, surprise


def _visit(x: Tensor, width: int, outside: Tensor, temperatures: list[float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, vocab = x.shape
    values, ids = largest(x, min(width + 1, vocab))
    blocks = vocab // BLOCK + 1  # at least one column beyond the vocabulary, for who is not outside
    if width == vocab:
        return values, ids, x.new_zeros(n, len(temperatures), blocks), x.new_zeros(n, blocks)
    below, e = x.new_empty(2, n, blocks * BLOCK)
    below[:, vocab:] = _NOBODY
    torch.sub(x, values[:, width:], out=below[:, :vocab])
    below.scatter_(-1, torch.cat([ids[:, :width], outside[:, None]], -1), _NOBODY)
    sums = x.new_empty(n, len(temperatures), blocks)
    for column, t in enumerate(temperatures):
        torch.exp(below if t == 1 else torch.div(below, t, out=e), out=e)
        torch.sum(e.view(n, blocks, BLOCK), -1, out=sums[:, column])
    surprise = e.mul_(below).view(n, blocks, BLOCK).sum(-1)  # T = 1 came last
    return values, ids, sums, surprise.neg_()
