"""Adaptive: one tau for a whole cache, so that hard positions get more entries than easy ones.

Each position's number of entries is sum min(1, p / tau), rounded. Over a pilot the positions pool: the tau whose
counts average k is the threshold of all their probabilities taken as one list, with k entries a position to spend.

Shapes: n positions, V vocabulary, W head.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.selection.ipps import solve
from kdcache.selection.scan import scan

_HEADS = 16
"""Probabilities kept of a pilot's position, in units of k."""

_TILE_ELEMENTS = 1 << 22


@torch.no_grad()
def solve_adaptive_tau(logits: Tensor | Iterable[Tensor], k: float, sample_temperature: float = 1.0) -> float:
    """The tau at which the positions of a pilot get k entries in the mean.

    sum over positions of sum_i min(1, p_i / tau) = k times their number, before each position's sum is rounded.
    Exact unless more than 16 k probabilities of one position exceed tau; those beyond are counted as p / tau
    each, which makes tau a little too large. `--min-k` comes on top.

    Args:
        logits: `[n, V]`, or several such tiles, read once, one after another. Log-probabilities do as well.
        k: the mean number of entries wanted, at least 1.
        sample_temperature: T of the p_T that is sampled.

    Returns:
        tau, in (0, 1].

    Raises:
        ConfigError: no positions, or k below 1.
    """
    if not k >= 1:
        raise ConfigError(f"--k is {k:g}, but a target needs at least 1 entry")
    heads, rests, positions = [], [], 0
    for tile in [logits] if isinstance(logits, Tensor) else logits:
        rows = max(1, _TILE_ELEMENTS // tile.shape[-1])
        for start in range(0, len(tile), rows):
            seen = scan(
                tile[start : start + rows], min(tile.shape[-1], round(_HEADS * k)), (sample_temperature,), None,
                sample_temperature=sample_temperature,
            )  # fmt: skip
            mass = (seen.head / sample_temperature).exp()  # [n, W]
            rest = seen.rest_at(sample_temperature).exp()
            total = mass.sum(-1) + rest
            heads.append((mass / total[:, None]).flatten())
            rests.append((rest / total).sum())
            positions += len(total)
    if not positions:
        raise ConfigError("--adaptive needs a pilot, but there is no position to look at")
    budget = torch.tensor([positions * k], dtype=torch.float64)
    pool = torch.cat(heads).cpu().sort(descending=True).values
    heavy, light_mass = solve(pool[None], torch.stack(rests).sum().cpu()[None], budget)
    if light_mass == 0:  # k is no less than the mean support
        return pool[pool > 0].min().item()
    return min(1.0, (light_mass / (budget - heavy)).item())
