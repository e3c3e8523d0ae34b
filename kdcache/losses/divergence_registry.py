"""Divergences by name: what one is, how it is registered, and how a loss names one or several of them.

    --loss jsd:0.9                        one, with its constant
    --loss "forward-kl*0.7+jsd:0.5*0.3"   a sum, each with its weight; a weight that is left out is 1

Weights are factors: they are not made to sum to 1.

Shapes: N positions, K entries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.registry import Registry
from kdcache.targets import SparseTargets

SAMPLED_REVERSE_KL, ULD, GOLD, ALM = OTHER_LOSSES = ("sampled-reverse-kl", "uld", "gold", "alm")
"""Losses that are no divergences: of rollouts (`rollout_loss.py`), and across tokenizers (`aligned_losses.py`)."""

ABSENT = -1e4
"""Log-probability of an outcome that does not exist, on both sides: its exponential is 0 in every dtype, and sums with
it stay finite. Outcomes that exist may have smaller ones; none is cut off."""


@dataclass(frozen=True)
class TeacherDistribution:
    """The teacher's side of a divergence, at the temperature of the loss.

    Attributes:
        log_p: `[N, K]` log-probabilities of the entries; `ABSENT` past `count`.
        log_tail: `[N]` log of the mass of everything else; `ABSENT` where there is nothing else.
        targets: what the cache holds for these positions; the entries are its `ids`.
        at_label: `[N, K]` which entry is the true next token, for a divergence that takes the label; else None.
    """

    log_p: Tensor
    log_tail: Tensor
    targets: SparseTargets
    at_label: Tensor | None = None


DivergenceFunction = Callable[..., Tensor]
"""`(log_q [N, K], log_tail_q [N], teacher: TeacherDistribution) -> [N]`, nats.

The function is given further arguments if it takes constants."""


@dataclass(frozen=True)
class Constants:
    """The constants of a divergence.

    Attributes:
        defaults: of each, in order.
        allowed: whether they may be these; called with as many numbers.
        limits: which those are, in words that follow "needs".
    """

    defaults: tuple[float, ...]
    allowed: Callable[..., bool]
    limits: str

    def read(self, name: str, given: Sequence[str]) -> tuple[float, ...]:
        """The constants that a loss gives as text; those that it leaves out at the end are the defaults.

        Raises:
            ConfigError: too many, not numbers, or not allowed.
        """
        base = name.partition(":")[0]
        example = ":".join([base, *(f"{x:g}" for x in self.defaults)])
        try:
            found = [float(text) for text in given]
        except ValueError:
            found = [math.nan]
        found += self.defaults[len(found) :]
        if len(found) > len(self.defaults) or any(map(math.isnan, found)) or not self.allowed(*found):
            raise ConfigError(f"loss {name!r} needs {self.limits}, as in {example}")
        return tuple(found)


NONE = Constants((), lambda: True, "")


def share_of_one(default: float) -> Constants:
    """One constant between 0 and 1."""
    return Constants((default,), lambda c: 0 < c < 1, "a constant between 0 and 1")


@dataclass(frozen=True)
class Divergence:
    """A divergence that is ready to be used.

    Attributes:
        function: `(log_q, log_tail_q, teacher) -> [N]`.
        temperature_power: the loss at T is multiplied by T to this power, so that its gradient keeps its size.
        takes_label: whether the label must be one of the entries.
        zero_tail: whether it is finite, and still exact, where the teacher gives a tail nothing and the student gives
            it something.
    """

    function: DivergenceFunction
    temperature_power: int
    takes_label: bool = False
    zero_tail: bool = False


@dataclass(frozen=True)
class _Family:
    divergence: Divergence
    constants: Constants


_FAMILIES: Registry[_Family] = Registry("loss", OTHER_LOSSES)


def register_divergence(
    name: str,
    function: DivergenceFunction,
    *,
    constant: float | Constants | None = None,
    temperature_power: int = 2,
    takes_label: bool = False,
    zero_tail: bool = False,
) -> None:
    """Make a divergence known by a name, for `loss=` and `--loss`.

    Args:
        name: without a colon, and not taken.
        function: `(log_q [N, K], log_tail_q [N], teacher) -> [N]`, differentiable by autograd in the first two.
        constant: the default of a constant in (0, 1), or the `Constants`, if it has any: the function is then given
            them as further arguments, and `name:0.3` sets the first.
        temperature_power: see `Divergence`: 2, unless the gradient at T shrinks by another power of T.
        takes_label: see `Divergence`; `teacher.at_label` then says which entry is the label.
        zero_tail: see `Divergence`: the tails `renormalise` and `label` are allowed only then.

    Raises:
        ConfigError: the name is taken, or has other characters than letters, digits, `-`, `_` and `.`.
    """
    constants = NONE if constant is None else constant if isinstance(constant, Constants) else share_of_one(constant)
    _FAMILIES.register(name, _Family(Divergence(function, temperature_power, takes_label, zero_tail), constants))


def divergence_names() -> tuple[str, ...]:
    """The names of all registered divergences, in the order in which they were registered."""
    return _FAMILIES.names()


@functools.cache
def find_divergence(name: str) -> Divergence:
    """The divergence of a name, or of a name and its constants, as in `jsd:0.9`.

    Raises:
        ConfigError: no such name, or a constant that it does not take.
    """
    base, *given = name.split(":")
    family = _FAMILIES.find(base)
    found, constants = family.divergence, family.constants
    if not constants.defaults:
        if given:
            raise ConfigError(f"loss {name!r} gives {base} a constant, but it takes none")
        return found
    bound: Any = functools.partial(_with_constants, found.function, constants.read(name, given))
    return Divergence(bound, found.temperature_power, found.takes_label, found.zero_tail)


def _with_constants(
    function: DivergenceFunction,
    constants: tuple[float, ...],
    log_q: Tensor,
    log_tail_q: Tensor,
    teacher: TeacherDistribution,
) -> Tensor:
    return function(log_q, log_tail_q, teacher, *constants)


@dataclass(frozen=True)
class LossTerm:
    """One summand of a loss.

    Attributes:
        name: as it was given, with its constants and without its weight.
        weight: its factor, at least 0.
    """

    name: str
    weight: float


@functools.cache
def read_terms(loss: str) -> tuple[LossTerm, ...]:
    """The terms of a loss: `NAME[:CONSTANT...][*WEIGHT]`, joined by `+`.

    Raises:
        ConfigError: a weight that is not a number, is negative, or all of them 0. Names are not looked up.
    """
    found = []
    for part in loss.split("+"):
        name, star, text = (x.strip() for x in part.partition("*"))
        try:
            weight = float(text) if star else 1.0
        except ValueError:
            weight = math.nan
        if not name or not 0 <= weight < math.inf:  # NaN included
            raise ConfigError(
                f"loss {loss!r} has the term {part.strip()!r}, which is not a NAME or a NAME*WEIGHT with a weight of "
                "at least 0, as in forward-kl*0.7+reverse-kl*0.3"
            )
        found.append(LossTerm(name, weight))
    if not sum(term.weight for term in found):
        raise ConfigError(f"loss {loss!r} has weights that sum to 0, so there is nothing to learn from")
    return tuple(found)
