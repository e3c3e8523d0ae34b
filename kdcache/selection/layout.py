"""Layout: entries from several sources, side by side and padded at the end.

Shapes: n positions, M candidates, K width of the targets, N draws.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lay(places: Tensor, values: Tensor, width: int, fill: float) -> Tensor:
    """`[n, K]` the `[n, M]` values at their places; a place of K is nowhere."""
    out = values.new_full((len(values), width + 1), fill)
    return out.scatter_(-1, places, values)[:, :width]


def tally(drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count what was drawn.

    Args:
        drawn: `[n, N]` ids.

    Returns:
        `[n, N]` the distinct ids, rising; `[n, N]` how often each was drawn; `[n]` how many there are. Past
        that number, ids and counts are 0.
    """
    ordered = drawn.sort(-1).values
    new = torch.ones_like(ordered)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    slot = new.cumsum(-1) - 1
    distinct = torch.zeros_like(ordered).scatter_(-1, slot, ordered)
    counts = torch.zeros_like(ordered).scatter_add_(-1, slot, torch.ones_like(slot))
    return distinct, counts, new.sum(-1)
