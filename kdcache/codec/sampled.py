"""Sampled: what `sample` and `ipps` store, and the weights that follow.

An entry of a sampled target is heavy or light. Heavies have a probability of their own: those above tau of `ipps`, and
the forced label of `sample`. Lights share what the heavies leave: equally in `ipps`, by how often they were drawn in
`sample`. So a position needs the log-odds of the lights' mass, and neither tau nor the lights' values.

Where one of the two classes is empty the other has all the mass, and the log-odds say nothing.

Shapes: n positions, K entries.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.arrays import Ints
from kdcache.codec.layout import Layout
from kdcache.errors import TargetError
from kdcache.targets import SparseTargets


def light_odds(weights: NDArray[np.float64], light: NDArray[np.bool_]) -> NDArray[np.float64]:
    """`[n]` log-odds of the lights' mass; both masses summed directly, for one minus the other would cancel."""
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = np.log((weights * light).sum(-1)) - np.log((weights * ~light).sum(-1))
    return np.where(np.isnan(odds), -np.inf, odds)


def multiplicities(layout: Layout, weights: NDArray[np.float64], light: NDArray[np.bool_]) -> Ints:
    """`[n, K]` how often each light of `sample` was drawn, 0 for others.

    Raises:
        TargetError: weights that are no counts of N draws.
    """
    draws = layout.draws or 0
    mass = (weights * light).sum(-1, keepdims=True)
    share = np.divide(weights * draws, mass, out=np.zeros_like(weights), where=light)
    counts: Ints = np.rint(share).astype(np.int64)
    drawn = counts.sum(-1)
    if (np.abs(share - counts) > 1e-3 * np.maximum(counts, 1)).any() or ((drawn != draws) & light.any(-1)).any():
        raise TargetError(f"a target's weights are not the counts of {draws} draws")
    return counts


def renyi(layout: Layout, targets: SparseTargets, column: int) -> NDArray[np.float64]:
    """`[n]` Rényi entropy of order 1/T: log sum p^(1/T) over 1 - 1/T; from 0 to log V at every T."""
    t = layout.temperatures[column]
    return np.asarray(targets.log_partition[:, column].double().numpy() / (1 - 1 / t), np.float64)
