"""Threshold: the tau with sum min(1, p / tau) = k, of one position, or one for a whole cache.

One tau for a whole cache (`adaptive`) gives hard positions more entries than easy ones. Each position's number of
entries is sum min(1, p / tau), rounded. Over a pilot the positions pool: the tau whose counts average k is the
threshold of all their probabilities taken as one list, with k entries a position to spend.

Shapes: n positions, V vocabulary, W head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from kdcache.errors import ConfigError
from kdcache.lazy_torch import no_grad, torch
from kdcache.selection.scan import scan

if TYPE_CHECKING:
    from torch import Tensor

_MARGIN = 1e-5
"""How near to tau, as a part of it, a probability counts as heavy."""

_HEADS = 16
"""Probabilities kept of a pilot's position, in units of k."""

_TILE_ELEMENTS = 1 << 22


def find_heavies(mass: Tensor, rest: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the largest reach tau, where sum min(1, p / tau) = budget.

    Args:
        mass: `[n, W]` float64, falling, in any unit.
        rest: `[n]` mass of the ids that are no larger than any of these.
        budget: `[n]` entries, 1 to W.

    Returns:
        `[n]` how many of the largest are heavy, and `[n]` the mass of all others: tau times their number in the
        target. 0 where the support fits into the budget.
    """
    width = mass.shape[-1]
    onward = torch.cat([mass, rest[:, None]], -1).flip(-1).cumsum(-1).flip(-1)  # [n, W + 1], small ones first
    left = budget[:, None] - torch.arange(width, device=mass.device)  # entries left at each column
    heavy = ((mass * left >= onward[:, :-1] * (1 - _MARGIN)) & (left > 1)).long().cumprod(-1).sum(-1)
    support = (mass > 0).sum(-1)
    fits = (rest == 0) & (support <= budget)
    heavy = torch.where(fits, support, heavy)
    return heavy, torch.where(fits, 0.0, onward.gather(-1, heavy[:, None])[:, 0])


def expected_count(mass: Tensor, rest: Tensor, own: Tensor, tau: Tensor) -> Tensor:
    """`[n]` sum min(1, p / tau), all in the same unit; nothing in `rest` reaches tau.

    Args:
        mass: `[n, W]`.
        rest: `[n]` of what is neither in `mass` nor in `own`.
        own: `[n]` of a forced label.
        tau: `[n]`.
    """
    tau = tau[:, None]
    return (torch.cat([mass, own[:, None]], -1) / tau).clamp(max=1).sum(-1) + rest / tau[:, 0]


@no_grad
def solve_adaptive_tau(logits: Tensor | Iterable[Tensor], k: float, sample_temperature: float = 1.0) -> float:
    """The tau at which the positions of a pilot get k entries in the mean.

    sum over positions of sum_i min(1, p_i / tau) = k times their number, before each position's sum is rounded.
    Exact unless more than 16 k probabilities of one position exceed tau; those beyond are counted as p / tau
    each, which makes tau a little too large. `min_k` comes on top.

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
        raise ConfigError(f"k is {k:g}, but a target needs at least 1 entry")
    heads, rests, positions = [], [], 0
    for part in [logits] if isinstance(logits, torch.Tensor) else logits:
        rows = max(1, _TILE_ELEMENTS // part.shape[-1])
        for start in range(0, len(part), rows):
            tile = scan(
                part[start : start + rows], min(part.shape[-1], round(_HEADS * k)), (sample_temperature,), None,
                sample_temperature=sample_temperature,
            )  # fmt: skip
            mass = (tile.head / sample_temperature).exp()  # [n, W]
            rest = tile.rest_at(sample_temperature).exp()
            total = mass.sum(-1) + rest
            heads.append((mass / total[:, None]).flatten())
            rests.append((rest / total).sum())
            positions += len(total)
    if not positions:
        raise ConfigError("adaptive needs a pilot, but there is no position to look at")
    budget = torch.tensor([positions * k], dtype=torch.float64)
    pool = torch.cat(heads).cpu().sort(descending=True).values
    heavy, light_mass = find_heavies(pool[None], torch.stack(rests).sum().cpu()[None], budget)
    if light_mass == 0:  # k is no less than the mean support
        return pool[pool > 0].min().item()
    return min(1.0, (light_mass / (budget - heavy)).item())
