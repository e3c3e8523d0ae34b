"""Lights: the entries of sampled targets that have no probability of their own, and the mass that they share.

Lights share what the heavies leave: equally, or by how often each was drawn. So a position needs the log-odds of the
lights' mass, and how often each was drawn where that decides.

Shapes: n positions, K entries.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.streams import DRAWS, Doubles, Floats, Ints, Values
from kdcache.compiled import compiled
from kdcache.errors import TargetError


def light_odds(weights: NDArray[np.float64], light: NDArray[np.bool_]) -> NDArray[np.float64]:
    """`[n]` log-odds of the lights' mass; both masses summed directly, for one minus the other would cancel."""
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = np.log((weights * light).sum(-1)) - np.log((weights * ~light).sum(-1))
    return np.where(np.isnan(odds), -np.inf, odds)


def multiplicities(draws: int, weights: NDArray[np.float64], light: NDArray[np.bool_]) -> Ints:
    """`[n, K]` how often each light of `sample` was drawn, 0 for others.

    Raises:
        TargetError: weights that are no counts of N draws.
    """
    mass = (weights * light).sum(-1, keepdims=True)
    share = np.divide(weights * draws, mass, out=np.zeros_like(weights), where=light)
    counts: Ints = np.rint(share).astype(np.int64)
    drawn = counts.sum(-1)
    if (np.abs(share - counts) > 1e-3 * np.maximum(counts, 1)).any() or ((drawn != draws) & light.any(-1)).any():
        raise TargetError(f"a target's weights are not the counts of {draws} draws")
    return counts


@compiled
def unpack_lights(
    times: Values, counts: Ints, heavies: Ints, log_mass: Doubles, draws: int, weights: Floats, logprobs: Floats
) -> int:
    """Write the lights behind the heavies of `[n K]` weights.

    They share a mass equally, or by how often each was drawn if `draws` is not 0; all of it where there is no heavy.
    """
    at, width = 0, len(weights) // max(1, len(counts))
    left: Any
    for i in range(len(counts)):
        heavy, lights = heavies[i], counts[i] - heavies[i]
        if lights:
            mass, base, left = math.exp(log_mass[i]) if heavy else 1.0, i * width + heavy, draws
            for j in range(lights):
                share = mass / lights
                if draws:
                    if not times[at + j]:
                        return DRAWS
                    left -= np.int64(times[at + j])
                    share = mass * times[at + j] / draws
                weights[base + j] = share
                logprobs[base + j] = np.nan
            if left:
                return DRAWS
            if draws:
                at += lights
    return 0
