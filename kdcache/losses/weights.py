"""Position weights: how much the distillation term of each position counts, from what the cache knows of the teacher.

    none                  1
    confidence            1 - H / log V: 1 where the teacher is certain, 0 where it knows nothing
    entropy-gate:LO:HI    1 where LO <= H <= HI nats, 0 elsewhere; either may be left out

H is the entropy of the teacher's whole distribution at T = 1, stored exactly for every kind of target; of several
teachers, the mean of theirs by weight. The divisor of
the loss stays the number of positions, so weights add up across micro-batches and ranks; the label term is not weighed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.losses.pool import Pool
from kdcache.targets import SparseTargets


@dataclass(frozen=True)
class PositionWeights:
    """A rule, checked when built.

    Attributes:
        rule: `none`, `confidence` or `entropy-gate:LO:HI`.

    Raises:
        ConfigError: no such rule, or a gate that lets nothing through.
    """

    rule: str = "none"

    def __post_init__(self) -> None:
        if self.rule not in ("none", "confidence"):
            low, high = self._gate()
            if not low < high:
                raise ConfigError(f"position weights {self.rule!r} let nothing through: {low:g} is not below {high:g}")

    def of(self, targets: SparseTargets | Pool, vocab: int) -> Tensor | None:
        """`[N]` weights of N positions over a vocabulary; None where each is 1."""
        if self.rule == "none":
            return None
        if self.rule == "confidence":
            return (1 - targets.entropy / math.log(vocab)).clamp(0, 1)
        low, high = self._gate()
        return ((targets.entropy >= low) & (targets.entropy <= high)).to(targets.entropy.dtype)

    def _gate(self) -> tuple[float, float]:
        name, *bounds = self.rule.split(":")
        if name == "entropy-gate" and len(bounds) == 2:
            try:
                low, high = (float(x) if x else d for x, d in zip(bounds, (0.0, math.inf), strict=True))
            except ValueError:
                pass
            else:
                return low, high
        raise ConfigError(
            f"position weights {self.rule!r} are not none, confidence or entropy-gate:LO:HI, as in entropy-gate:0.1:3"
        )
