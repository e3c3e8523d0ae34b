"""Ipps: exactly k entries, unbiased, with the least variance that exactly k entries can have.

Inclusion probability proportional to size, by systematic sampling (Madow 1949, "On the theory of systematic
sampling, II"); the threshold is that of VarOpt (Cohen, Duffield, Kaplan, Lund and Thorup 2009, arXiv 0803.0473). tau
solves sum min(1, p / tau) = k. An id with p >= tau is heavy: it is kept, with its own p. Each other is light: it is
kept with probability p / tau, and weighs tau = (mass of the lights) / (their number in the target).

Guarantee: exactly min(k, support) distinct entries; weights sum to 1; E[w] = p. The support is what is above 0 in
float64. Ids within 1e-5 of tau count as heavy: that is unbiased too, and makes a light's share of the line
shorter than the distance between two points, whatever rounding does, so no id is drawn twice.

Shapes: n positions, V vocabulary, W width of the head and of the targets.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.selection.inverse_cdf import CategoricalSampler
from kdcache.selection.layout import lay
from kdcache.selection.rule import Selection
from kdcache.selection.scan import Scan
from kdcache.targets import SparseTargets

_MARGIN = 1e-5


def ipps(x: Tensor, seen: Scan, rule: Selection, temperatures: tuple[float, ...], uniform: Tensor) -> SparseTargets:
    """Draw the entries of a tile.

    Args:
        x: `[n, V]` logits.
        seen: their scan, W wide.
        rule: of kind `ipps`.
        temperatures: those to store.
        uniform: `[n]` in [0, 1).
    """
    width, t = seen.head.shape[-1], rule.sample_temperature
    forced = seen.forced.long()
    ids, logits = _others(seen)  # [n, W]
    mass, rest = (logits / t).exp(), seen.rest_at(t).exp()  # in units of the likeliest id's
    own = torch.where(seen.forced, (seen.label / t).exp(), 0.0)
    total = mass.sum(-1) + rest + own
    if rule.tau is None:
        budget = torch.full_like(forced, width)
    else:
        least = (1 + forced).clamp(min=rule.min_k)  # beside a forced label one entry stands for the rest
        budget = expected_count(mass, rest, own, rule.tau * total).round().long().maximum(least).clamp(max=width)
    heavy, light_mass = solve(mass, rest, budget - forced)
    lights = torch.where(light_mass > 0, budget - forced - heavy, 0)
    points, used = systematic(uniform, lights, width)
    # In the head, a label that stands among the heavies shifts them by one.
    crowd = CategoricalSampler(x, seen, heavy + (seen.column < heavy).long(), t)
    drawn = crowd.find(points, used)
    each = torch.where(lights > 0, light_mass / lights, 0.0)
    log_total = seen.log_total(1.0)[:, None]
    entries = compose(
        (ids, logits - log_total, mass / total[:, None], heavy),
        (seen.labels, seen.label - log_total[:, 0], own / total, seen.forced),
        (drawn, each / total, lights),
    )
    return SparseTargets(
        **entries,
        log_tail=seen.rest.new_full((len(x), len(temperatures)), torch.nan, dtype=torch.float32),
        **seen.scalars(temperatures),
        temperatures=temperatures,
        kind=rule.kind,
        sample_temperature=t,
    )


def compose(
    heavies: tuple[Tensor, Tensor, Tensor, Tensor],
    label: tuple[Tensor, Tensor, Tensor, Tensor],
    lights: tuple[Tensor, Tensor, Tensor],
) -> dict[str, Any]:
    """The entries of a target: heavies by falling weight, a forced label among them; then the lights.

    Args:
        heavies: `[n, W]` ids, log-probabilities and weights, falling; `[n]` how many count.
        label: `[n]` id, log-probability, weight; and whether it is forced.
        lights: `[n, W]` ids, `[n]` the weight that all share, `[n]` how many count.

    Returns:
        `ids`, `logprobs`, `weights` of width W, and `count`, as in SparseTargets.
    """
    ids, logprobs, weights, heavy = heavies
    label_id, label_logprob, label_weight, forced = label
    drawn, each, light = lights
    width = ids.shape[-1]
    column = torch.arange(width, device=ids.device)
    rank = (weights >= label_weight[:, None]).sum(-1).minimum(heavy)[:, None]  # of the label among the heavies
    one = forced.long()[:, None]
    places = [
        torch.where(column < heavy[:, None], column + one * (column >= rank), width),
        torch.where(forced[:, None], rank, width),
        torch.where(column < light[:, None], column + heavy[:, None] + one, width),
    ]
    place = torch.cat(places, -1)  # [n, 2 W + 1]
    shared, unknown = each[:, None].expand(-1, width), torch.full_like(weights, torch.nan)
    return {
        "ids": lay(place, torch.cat([ids, label_id[:, None], drawn], -1), width, 0),
        "logprobs": lay(place, torch.cat([logprobs, label_logprob[:, None], unknown], -1), width, -torch.inf).float(),
        "weights": lay(place, torch.cat([weights, label_weight[:, None], shared], -1), width, 0).float(),
        "count": heavy + light + forced,
    }


def _others(seen: Scan) -> tuple[Tensor, Tensor]:
    """`[n, W]` ids and logits of the head without a forced label; where it stood in the head, the last is -inf."""
    width = seen.head.shape[-1]
    column = torch.arange(width, device=seen.head.device)
    shifted = column + (column >= seen.column[:, None]).long()
    source = shifted.clamp(max=width - 1)
    return seen.ids.gather(-1, source), seen.head.gather(-1, source).masked_fill(shifted == width, -torch.inf)


def solve(mass: Tensor, rest: Tensor, budget: Tensor) -> tuple[Tensor, Tensor]:
    """Who is heavy: solves sum min(1, p / tau) = budget.

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
    """`[n]` sum min(1, p / tau), all in the same unit; nothing in `rest` reaches tau."""
    tau = tau[:, None]
    return (torch.cat([mass, own[:, None]], -1) / tau).clamp(max=1).sum(-1) + rest / tau[:, 0]


def systematic(uniform: Tensor, lights: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Points (u + j) / L, j < L, of the line on which the lights lie one behind the other.

    Returns:
        `[n, width]` points, and which of them are in use.
    """
    column = torch.arange(width, device=uniform.device)
    used = column < lights[:, None]
    return torch.where(used, (uniform[:, None] + column) / lights.clamp(min=1)[:, None], 0.0), used
