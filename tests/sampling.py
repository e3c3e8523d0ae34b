"""What the sampled selections must obey: the law of each, dense and in float64, and figures over many seeds."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from kdcache import Selection, SparseTargets, select


def logits_of(kind: str, vocab: int, rows: int = 64) -> torch.Tensor:
    """Rows of one character: random, flat, peaked, tied, half (bfloat16), or wide (most p are 0 in float32)."""
    g = torch.Generator().manual_seed(vocab)
    noise = torch.randn(rows, vocab, generator=g)
    if kind == "random":
        return 3 * noise
    if kind == "flat":
        return 1e-3 * noise
    if kind == "tied":
        return noise.round()
    if kind == "half":
        return (5 * noise).bfloat16()
    if kind == "wide":
        return 100 * noise
    assert kind == "peaked"
    at = torch.randint(vocab, (rows,), generator=g)
    noise[torch.arange(rows), at] += 20 + 10 * torch.rand(rows, generator=g)
    return noise


KINDS = ("random", "flat", "peaked", "tied", "half", "wide")


def tau_of(p: torch.Tensor, k: int) -> torch.Tensor:
    """`[n]` the tau with sum min(1, p / tau) = k, by bisection in float64; 0 where the support fits into k."""
    rising = p.sort(-1).values
    mass = torch.nn.functional.pad(rising.cumsum(-1), (1, 0))
    low, high = torch.zeros(len(p), dtype=torch.float64), torch.ones(len(p), dtype=torch.float64)
    for _ in range(200):
        tau = (low + high) / 2
        below = torch.searchsorted(rising, tau[:, None])
        entries = p.shape[-1] - below[:, 0] + mass.gather(-1, below)[:, 0] / tau.clamp(min=5e-324)
        low, high = torch.where(entries > k, tau, low), torch.where(entries > k, high, tau)
    return torch.where((p > 0).sum(-1) <= k, 0.0, high)


def draws_of(
    logits: torch.Tensor,
    rule: Selection,
    seeds: int,
    labels: torch.Tensor | None = None,
    temperatures: tuple[float, ...] = (1.0,),
) -> Iterator[SparseTargets]:
    """The targets of each row under `seeds` keys, one row after another."""
    for row in range(len(logits)):
        keys = torch.tensor([[3, row, 0]]).repeat(seeds, 1)
        keys[:, 2] = torch.arange(seeds)
        label = None if labels is None else labels[row].expand(seeds)
        yield select(logits[row].expand(seeds, -1), rule, labels=label, keys=keys, temperatures=temperatures)


def dense(targets: SparseTargets, vocab: int) -> torch.Tensor:
    """`[n, V]` float64 weights."""
    out = torch.zeros(len(targets.count), vocab, dtype=torch.float64)
    return out.scatter_add_(-1, targets.ids.long(), targets.weights.double())


class Moments:
    """How far the mean of many draws lies from p, in standard errors of the law."""

    def __init__(self) -> None:
        self.z: list[torch.Tensor] = []

    def add(self, weights: torch.Tensor, p: torch.Tensor, variance: torch.Tensor, inclusion: torch.Tensor) -> None:
        """Count one row: `[seeds, V]` weights; `[V]` p, variance of a weight, and probability of being an entry.

        Ids that never vary must be exact; those that enter too rarely for a normal law are left out.
        """
        seeds = len(weights)
        fixed = variance == 0
        assert torch.allclose(weights[:, fixed], p[fixed].expand(seeds, -1), rtol=1e-5, atol=1e-12)
        often = ~fixed & (seeds * torch.minimum(inclusion, 1 - inclusion) >= 50)
        self.z.append(((weights.mean(0) - p) / (variance / seeds).sqrt())[often])

    def check(self, least: int) -> None:
        """No more ids beyond 4 standard errors than chance allows, and a mean square of 1."""
        z = torch.cat(self.z)
        assert len(z) >= least, "the test looked at too few ids"
        # P(|z| > 4) = 6.3e-5; a binomial of 50 trials' worth is a little heavier in the tail.
        allowed = len(z) * 2e-4 + 3
        assert (z.abs() > 4).sum() <= allowed, f"{int((z.abs() > 4).sum())} of {len(z)}"
        assert abs(z.square().mean().item() - 1) < 6 * math.sqrt(2 / len(z))
