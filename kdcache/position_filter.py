"""Position filter: which labelled slots carry a target.

    all          every one
    entropy>X    those where the entropy of the teacher's distribution at T = 1 exceeds X nats

The entropy is the exact one over the whole vocabulary, float32 as the selection gives it, before a codec rounds
anything; X is rounded to float32 as well. Importing this costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kdcache.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from kdcache.targets import SparseTargets

_MOST = 100.0
"""Nats; no vocabulary of a cache has an entropy above 22."""


@dataclass(frozen=True)
class PositionFilter:
    """The rule, checked when built.

    Attributes:
        rule: `all` or `entropy>X`; X in one spelling, so that equal rules are equal text.

    Raises:
        ConfigError: no such rule, or an X outside 0 to 100.
    """

    rule: str = "all"

    def __post_init__(self) -> None:
        if self.above is not None:
            object.__setattr__(self, "rule", f"entropy>{self.above!r}".removesuffix(".0"))

    @property
    def above(self) -> float | None:
        """The entropy above which a labelled slot carries a target, nats; None where all do."""
        if self.rule == "all":
            return None
        name, found, number = self.rule.partition(">")
        try:
            above = float(number) if found and name.strip() == "entropy" else -1.0
        except ValueError:
            above = -1.0
        if not 0 <= above <= _MOST:  # NaN included
            raise ConfigError(
                f"positions {self.rule!r} is neither all nor entropy>X with X from 0 to {_MOST:g} nats, as in "
                "entropy>0.5"
            )
        return above + 0.0  # of -0.0 too

    def mask(self, entropy: Tensor | None) -> Tensor | None:
        """`[N]` bool: which of N labelled slots with these entropies carry a target; None for all of them.

        Where all do, the entropies need not be known.
        """
        if self.above is None:
            return None
        assert entropy is not None, "who asks has made sure that they are known"
        return entropy > self.above

    def apply(self, targets: SparseTargets) -> SparseTargets:
        """Targets of N labelled slots, emptied (`count` is 0) at those that are to carry none."""
        if self.above is None:
            return targets
        kept = targets.require("entropy", f"the position filter {self.rule}") > self.above
        return targets[kept].spread(kept.nonzero()[:, 0], len(targets.count))
