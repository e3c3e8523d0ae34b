"""Inverse CDF: points of [0, 1) to ids, with probability in proportion to exp(logit / T), in id order.

Two levels: the cumulative sum of the blocks' masses, which the scan has made anyway, finds the block; the
logits of that one block find the id. No cumulative sum over the vocabulary exists.
Guarantee: an id of probability 0 is never found. A probability is off by at most 1e-6 of itself, and by 2e-7 more
for each nat by which it lies below the largest: logits are float32, and so is what is divided by T.
Cost: a cumulative sum over V / 64 a position, and over 64 a point.

Shapes: n positions, V vocabulary, W head, B blocks, D points a position, P points in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.lazy_torch import torch
from kdcache.rows import IGNORE
from kdcache.selection.scan import Scan
from kdcache.selection.scan_cpu import BLOCK
from kdcache.selection.scan_torch import contents

if TYPE_CHECKING:
    from torch import Tensor

_POINTS = {"cpu": 1 << 14, "cuda": 1 << 16}
"""Points whose blocks are looked into at once, by device."""


@dataclass(frozen=True)
class CategoricalSampler:
    """The ids among which points choose: all, or all from some column of the head on; without a forced label.

    Attributes:
        x: `[n, V]` logits.
        tile: their scan.
        first: `[n]` the column, W where no id of the head belongs; None where all do.
        temperature: T, the sampling temperature of the scan.
    """

    x: Tensor
    tile: Scan
    first: Tensor | None
    temperature: float

    def find(self, points: Tensor, used: Tensor) -> Tensor:
        """The ids that points fall on.

        Args:
            points: `[n, D]` float64 in [0, 1): shares of their mass, in id order.
            used: `[n, D]` bool; where it is set, they have some mass.

        Returns:
            `[n, D]` ids; 0 where not in use.
        """
        cdf = self._block_masses().cumsum(-1)  # [n, B]
        block = locate(cdf, points).clamp(max=(self.x.shape[-1] - 1) // BLOCK)  # where no block weighs anything
        after = cdf.gather(-1, block)
        before = torch.where(block > 0, cdf.gather(-1, (block - 1).clamp(min=0)), 0.0)
        share = ((_reach(cdf, points) - before) / (after - before)).flatten()  # where in its block each point lies
        block, out, width = block.flatten(), torch.zeros_like(block).flatten(), points.shape[-1]
        looked_at, some = _looked_at(used), _POINTS.get(used.device.type, _POINTS["cuda"])
        for start in range(0, len(looked_at), some):
            point = looked_at[start : start + some]
            out[point] = self._in_block(point // width, block[point], share[point])
        out = out.clamp(max=self.x.shape[-1] - 1)  # where a logit is NaN, a point falls past the last
        return torch.where(used, out.view_as(used), 0)

    def _block_masses(self) -> Tensor:
        """`[n, B]` float64 mass of each block, in units of the likeliest member."""
        tile, t = self.tile, self.temperature
        column = torch.arange(tile.head.shape[-1], device=tile.head.device)
        member = column != tile.label.column[:, None]
        if self.first is not None:
            member &= column >= self.first[:, None]
        members = torch.where(member, tile.head, -torch.inf)
        rest = torch.where(tile.rest_at(t) > -torch.inf, tile.centre, -torch.inf)
        unit = torch.maximum(members.amax(-1), rest)
        unit = torch.where(torch.isneginf(unit), 0.0, unit)[:, None]  # no id is left: all masses are 0
        masses = tile.blocks.double() * ((tile.centre[:, None] - unit) / t).exp()
        return masses.scatter_add(-1, tile.ids // BLOCK, ((members - unit) / t).exp())

    def _in_block(self, rows: Tensor, block: Tensor, share: Tensor) -> Tensor:
        """`[P]` the id at a share of its block's mass."""
        logits = contents(self.x, rows, block, BLOCK).float()  # [P, 64]
        tile, start = self.tile, block * BLOCK
        if self.first is not None:
            first = self.first.clamp(max=tile.order.shape[-1] - 1)[:, None]
            highest, its_id = tile.values.gather(-1, first)[rows], tile.order.gather(-1, first)[rows]  # [P, 1]
            earlier = torch.arange(BLOCK, device=block.device) < its_id - start[:, None]
            logits.masked_fill_(torch.where(earlier, logits >= highest, logits > highest), -torch.inf)
        label = (torch.where(tile.forced, tile.label.ids, IGNORE)[rows] - start)[:, None]  # its place, if it is here
        place = label.clamp(0, BLOCK - 1)
        logits.scatter_(-1, place, torch.where(label == place, -torch.inf, logits.gather(-1, place)))
        below = logits - logits.amax(-1, keepdim=True)
        e = (below if self.temperature == 1 else below / self.temperature).exp()
        return start + locate(e.cumsum(-1, dtype=torch.float64), share[:, None])[:, 0]


def _looked_at(used: Tensor) -> Tensor:
    """`[P]` places of the points in use, in `[n, D]` made flat; on a GPU of all, as to know them is to wait for it."""
    if used.device.type == "cpu":
        return used.flatten().nonzero()[:, 0]
    return torch.arange(used.numel(), device=used.device)


def locate(cdf: Tensor, points: Tensor) -> Tensor:
    """`[n, D]` the column of a cumulative sum `[n, M]` that each of `[n, D]` points of [0, 1] falls on.

    A column that adds nothing is never found, unless none adds anything.
    """
    return torch.searchsorted(cdf, _reach(cdf, points), right=True).clamp(max=cdf.shape[-1] - 1)


def _reach(cdf: Tensor, points: Tensor) -> Tensor:
    """Points as parts of the total, which they stay below however they are rounded."""
    total = cdf[:, -1:]
    return torch.minimum(points * total, torch.nextafter(total, torch.zeros_like(total)))
