"""Position weights: how much the distillation term of each position counts.

A weight comes from the entropy H of the teacher's whole distribution there at T = 1, which the targets must know (of
several teachers, the mean of theirs by weight), or from the student's own at T = 1, which has no gradient:

    none                          1
    confidence                    1 - H / log V: 1 where the teacher is certain, 0 where its distribution is uniform
    entropy-gate:LO:HI            1 where LO <= H <= HI nats, 0 elsewhere; either may be left out
    student-entropy               H / log V of the student: 0 where it is certain
    student-entropy-gate:LO:HI    1 where LO <= H <= HI nats of the student, 0 elsewhere

They do not change the divisors, so that sums add up across micro-batches and ranks; the label term is not weighed.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.known import Known
from kdcache.losses.pool import Pool
from kdcache.targets import SparseTargets


@dataclass(frozen=True)
class PositionWeights:
    """A rule, checked when built.

    Attributes:
        rule: `none`, `confidence`, `entropy-gate:LO:HI`, `student-entropy` or `student-entropy-gate:LO:HI`.

    Raises:
        ConfigError: no such rule, or a gate that lets nothing through.
    """

    rule: str = "none"

    def __post_init__(self) -> None:
        if self.rule not in ("none", "confidence", "student-entropy"):
            low, high = self._gate()
            if not low < high:
                raise ConfigError(f"position weights {self.rule!r} let nothing through: {low:g} is not below {high:g}")

    @property
    def of_student(self) -> bool:
        """Whether they come from the student's entropy, which each step makes anew."""
        return self.rule.startswith("student-")

    def of(self, targets: SparseTargets | Pool, vocab: int) -> Tensor | None:
        """`[N]` weights of N positions over a vocabulary; None where each is 1, or is the student's to give."""
        if self.rule == "none" or self.of_student:
            return None
        return self.at(targets.require("entropy", f"the rule of position weights {self.rule}"), vocab)

    def at(self, entropy: Tensor, vocab: int) -> Tensor:
        """`[N]` weights of positions of these entropies `[N]`, the teacher's or the student's."""
        if self.rule == "confidence":
            return (1 - entropy / math.log(vocab)).clamp(0, 1)
        if self.rule == "student-entropy":
            return (entropy / math.log(vocab)).clamp(0, 1)
        low, high = self._gate()
        return ((entropy >= low) & (entropy <= high)).to(entropy.dtype)

    def require_known(self, known: Known) -> None:
        """Refuse a cache that does not know what the rule needs.

        Raises:
            ConfigError: it does not know the entropy.
        """
        if self.rule != "none" and not self.of_student:
            known.require("entropy", f"the rule of position weights {self.rule}")

    def _gate(self) -> tuple[float, float]:
        name, *bounds = self.rule.removeprefix("student-").split(":")
        if name == "entropy-gate" and len(bounds) == 2:
            try:
                low, high = (float(x) if x else d for x, d in zip(bounds, (0.0, math.inf), strict=True))
            except ValueError:
                pass
            else:
                return low, high
        raise ConfigError(
            f"position weights {self.rule!r} are not none, confidence or entropy-gate:LO:HI, as in entropy-gate:0.1:3, "
            "nor student-entropy or student-entropy-gate:LO:HI"
        )
