"""Entropies: a histogram of the teacher's entropy, small enough for a commit, from which quantiles can be told.

Bin i counts positions with (i / 32)^2 <= H < ((i + 1) / 32)^2 nats: a thousandth of a nat wide at 0, where most
positions of a sure teacher lie, a sixteenth at 1 nat, a fifth at 10. Histograms of shards add up. A quantile is found
inside its bin by interpolation, so it is off by less than the bin is wide, whatever the distribution.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import numpy as np
import torch

MOST_BINS = 150
"""The entropy of 2^31 tokens lies in the last but one."""

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)

_BINS_A_ROOT = 32


def histogram(entropy: torch.Tensor) -> list[int]:
    """Positions in each bin, up to the last that has any.

    Args:
        entropy: `[N]` nats, on the CPU.
    """
    bins = (_BINS_A_ROOT * entropy.double().clamp(min=0).sqrt()).long().clamp(max=MOST_BINS - 1)
    return np.bincount(bins.numpy()).tolist() if len(bins) else []


def added(histograms: Iterable[Sequence[int]]) -> list[int]:
    """One histogram of several."""
    return [sum(column) for column in itertools.zip_longest(*histograms, fillvalue=0)]


def quantiles(counts: Sequence[int]) -> dict[str, float] | None:
    """The entropy, nats, below which a share of the positions lies, by share; None where there is no position."""
    ends = list(itertools.accumulate(counts))
    if not ends or not ends[-1]:
        return None
    found = {}
    for level in LEVELS:
        wanted = level * ends[-1]
        i = next(i for i, end in enumerate(ends) if end >= wanted)
        low, high = (i / _BINS_A_ROOT) ** 2, ((i + 1) / _BINS_A_ROOT) ** 2
        found[f"{level:g}"] = low + (high - low) * (wanted - (ends[i] - counts[i])) / counts[i]
    return found
