"""Squared error: E‖w − p‖² of a selection at a position, from what a stored target knows of p.

docs/selection.md derives the terms. With the largest p of a position known, and of the others only their mass r,

    topk, topp   the sum of p² over all ids that are not kept
    ipps         the sum of p (tau - p) over the light ids, where tau is their mass over their number (VarOpt,
                 arXiv 0803.0473); with k entries no more than k ids are heavy, so tau is exact where k are known
    sample       (1 - the sum of all p²) / N for N draws (arXiv 2503.16870)

each up to S, the sum of p² over the ids of unknown p. As each of these is at most c, the least p that is known, and
there are m of them, r² / m <= S <= min(c, r) r. So an error is two numbers, between which it lies; they are equal where
all of p is known. The entries are compared as they stand: that the tail's mass is known beside them is not counted.

Of targets w' drawn again from stored weights w, E‖w' − p‖² = E‖w' − w‖² + E‖w − p‖², as E[w' | w] = w. The first is
exact, from w. The second is, of `ipps`, at most the sum of the light w²; of N draws, (1 - Σ p²) / N, in which the
pairs of equal draws, sum of c (c - 1) / (N (N - 1)) over the counts c, are an unbiased estimate of Σ p².

Shapes: n positions, K entries. All in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from kdcache.lazy_torch import torch
from kdcache.selection.threshold import find_heavies
from kdcache.targets import SparseTargets

Between: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
"""`[n]` the least and the most that an error can be."""

_ROUNDING = 1e-14
"""What two sums of squares, each at most 1, may differ by without meaning it."""


@dataclass(frozen=True)
class KnownProbabilities:
    """What truncated targets know of p at T = 1.

    Attributes:
        p: `[n, K]` the probabilities of the entries, falling; 0 past their number.
        rest: `[n]` mass of all other ids.
        low, high: `[n]` bounds of the sum of p² over these.
    """

    p: torch.Tensor
    rest: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @classmethod
    def of(cls, targets: SparseTargets, vocab_size: int, labelled: bool) -> KnownProbabilities:
        """Of targets `[n]`, each with entries.

        Args:
            targets: truncated ones.
            vocab_size: V.
            labelled: whether the least entry may be a label that is among them by force.
        """
        logs, log_tail = targets.at_temperature(1.0)
        p = logs.double().exp().sort(-1, descending=True).values
        rest, others = log_tail.double().exp(), (vocab_size - targets.count).double()
        place = (targets.count - 1 - int(labelled)).clamp(min=0)
        least = p.gather(-1, place[:, None])[:, 0]
        if labelled:  # of a single entry nothing bounds the others but their mass
            least = torch.where(targets.count > 1, least, 1.0)
        rest = torch.where(others > 0, rest, 0.0)
        high = torch.minimum(least, rest) * rest
        low = torch.minimum(rest.square() / others.clamp(min=1), high)
        return cls(p, rest, low, high)

    def truncated(self, kept: SparseTargets) -> Between:
        """The error of targets that keep some of these."""
        known = self.p.square().sum(-1) - kept.at_temperature(1.0)[0].double().exp().square().sum(-1)
        lost = torch.where(known > _ROUNDING, known, 0.0)
        return lost + self.low, lost + self.high

    def ipps(self, k: int) -> Between:
        """The error of `ipps` with k entries, at most K."""
        above, below = _light_error(self.p, self.rest, k)
        return (above - below - self.high).clamp(min=0), (above - below - self.low).clamp(min=0)

    def sample(self, draws: int) -> Between:
        """The error of so many draws."""
        squares = self.p.square().sum(-1)
        return (1 - squares - self.high).clamp(min=0) / draws, (1 - squares - self.low).clamp(min=0) / draws


def redrawn_ipps(targets: SparseTargets, k: int | None) -> Between:
    """The error of targets `[n]` of kind `ipps` drawn again with k entries; None for the stored ones."""
    weights = torch.where(targets.valid, targets.weights.double(), 0.0)
    of_lights = torch.where(targets.valid & targets.logprobs.isnan(), weights, 0.0).square().sum(-1)
    if k is None:
        return torch.zeros_like(of_lights), of_lights
    above, below = _light_error(weights.sort(-1, descending=True).values, torch.zeros_like(of_lights), k)
    more = (above - below).clamp(min=0)
    return more, more + of_lights


def fewer_draws(targets: SparseTargets, stored: int, draws: int) -> Between:
    """The error of `draws` of the stored draws of targets `[n]`: at each position an estimate, in the mean unbiased."""
    counts = (torch.where(targets.valid, targets.weights.double(), 0.0) * stored).round()
    pairs = (counts * (counts - 1)).sum(-1) / max(1, stored * (stored - 1))
    found = (1 - pairs) / draws
    return found, found


def _light_error(p: torch.Tensor, rest: torch.Tensor, k: int) -> Between:
    """`[n]` tau times the mass of the lights, and the sum of p² over those of them that are in `p`."""
    budget = torch.full(rest.shape, min(k, p.shape[-1]), dtype=torch.int64)
    heavy, mass = find_heavies(p, rest, budget)
    lights = (budget - heavy).clamp(min=1)
    light = torch.arange(p.shape[-1]) >= heavy[:, None]
    squares = torch.where(light & (mass > 0)[:, None], p, 0.0).square().sum(-1)
    return mass.square() / lights, squares
