"""Divergences: how far a student is from a teacher over the entries and one bucket for the tail.

A divergence is a function of (log q on the entries, log q of the tail, the teacher's side of both) and is found by
name. Near agreement ours are sums of terms that are never negative and vanish, with their slope, where both agree: a
divergence of log p and log q that are each off by a rounding is then off by the square of it. Merging ids into a
bucket never raises any of them (data processing inequality), so each is a lower bound of the dense divergence and is
exact where everything is kept.

    forward-kl            KL(p ‖ q)                                      Hinton et al. 2015, arXiv 1503.02531
    reverse-kl            KL(q ‖ p)                                      Gu et al. 2024, MiniLLM, arXiv 2306.08543
    skew-kl[:c]           KL(p ‖ c p + (1-c) q), c = 0.1                 Ko et al. 2024, DistiLLM, arXiv 2402.03898
    skew-reverse-kl[:c]   KL(q ‖ c q + (1-c) p), c = 0.1                 the same
    jsd[:c]               c KL(p ‖ m) + (1-c) KL(q ‖ m), c = 0.5,
                          m = c p + (1-c) q                              Agarwal et al. 2024, GKD, arXiv 2306.13649
    tvd                   1/2 sum |p - q|                                Wen et al. 2023, arXiv 2307.15190

An outcome that does not exist (a padded entry, the tail where everything is kept) has the log-probability `ABSENT`
on both sides, which is finite: it weighs nothing and differs by nothing.

Shapes: N positions, K entries.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.registry import Registry
from kdcache.targets import SparseTargets

ABSENT = -1e4
"""Log-probability of what cannot happen: its exponential is 0 in every dtype, and sums with it stay finite."""

_NOISE = 64
"""Machine epsilons by which log q and log p may differ and count as equal where a slope is not continuous (`tvd`):
both are differences of logits of some tens, each rounded."""

_NEAR = 1e-2
"""Nats below which a divergence is summed so that roundings of log p and log q count only squared."""


@dataclass(frozen=True)
class TeacherDistribution:
    """The teacher's side of a divergence, at the temperature of the loss.

    Attributes:
        log_p: `[N, K]` log-probabilities of the entries; `ABSENT` past `count`.
        log_tail: `[N]` log of the mass of everything else; `ABSENT` where there is nothing else.
        targets: what the cache holds for these positions.
    """

    log_p: Tensor
    log_tail: Tensor
    targets: SparseTargets


DivergenceFunction = Callable[..., Tensor]
"""`(log_q [N, K], log_tail_q [N], teacher: TeacherDistribution) -> [N]`, nats.

The function is given a fourth argument if it takes a constant."""


@dataclass(frozen=True)
class Divergence:
    """A divergence that is ready to be used.

    Attributes:
        function: `(log_q, log_tail_q, teacher) -> [N]`.
        temperature_power: the loss at T is multiplied by T to this power, so that its gradient keeps its size.
    """

    function: DivergenceFunction
    temperature_power: int


@dataclass(frozen=True)
class _Family:
    function: DivergenceFunction
    constant: float | None
    temperature_power: int


_FAMILIES: Registry[_Family] = Registry("loss")


def register_divergence(
    name: str, function: DivergenceFunction, *, constant: float | None = None, temperature_power: int = 2
) -> None:
    """Make a divergence known by a name, for `loss=` and `--loss`.

    Args:
        name: without a colon, and not taken.
        function: `(log_q [N, K], log_tail_q [N], teacher) -> [N]`, differentiable by autograd in the first two.
        constant: the default of a constant in (0, 1), if it has one: the function is then given it as a fourth
            argument, and `name:0.3` sets it.
        temperature_power: see `Divergence`: 2, unless the gradient at T shrinks by another power of T.

    Raises:
        ConfigError: the name is taken, or has other characters than letters, digits, `-`, `_` and `.`.
    """
    _FAMILIES.register(name, _Family(function, constant, temperature_power))


def divergence_names() -> tuple[str, ...]:
    """The names of all registered divergences, in the order in which they were registered."""
    return _FAMILIES.names()


@functools.cache
def find_divergence(name: str) -> Divergence:
    """The divergence of a name, or of a name and its constant, as in `jsd:0.9`.

    Raises:
        ConfigError: no such name, or a constant that it does not take.
    """
    base, colon, text = name.partition(":")
    family = _FAMILIES.find(base)
    if family.constant is None:
        if colon:
            raise ConfigError(f"loss {name!r} gives {base} a constant, but it takes none")
        return Divergence(family.function, family.temperature_power)
    constant = family.constant
    if colon:
        try:
            constant = float(text)
        except ValueError:
            constant = -1.0
    if not 0 < constant < 1:
        raise ConfigError(f"loss {name!r} needs a constant between 0 and 1, as in {base}:{family.constant:g}")
    bound: Any = functools.partial(_with_constant, family.function, constant)
    return Divergence(bound, family.temperature_power)


def _with_constant(
    function: DivergenceFunction, constant: float, log_q: Tensor, log_tail_q: Tensor, teacher: TeacherDistribution
) -> Tensor:
    return function(log_q, log_tail_q, teacher, constant)


def _outcomes(log_q: Tensor, log_tail_q: Tensor, teacher: TeacherDistribution) -> tuple[Tensor, Tensor]:
    """`[N, K + 1]` log p and log q: the entries, and the tail as the last one."""
    log_p = torch.cat([teacher.log_p, teacher.log_tail[:, None]], -1).to(log_q.dtype)
    return log_p, torch.cat([log_q, log_tail_q[:, None]], -1)


def _kl(log_a: Tensor, log_b: Tensor, share: float = 0.0) -> Tensor:
    """`[2, N]` KL(a ‖ m), m = share a + (1 - share) b, summed in two ways of equal value; see `_best`.

    The first is the sum of m - a - a log(m / a), whose terms are never negative; a and m both sum to 1. The second is
    the plain sum of -a log(m / a).
    """
    a, b = log_a.exp(), log_b.exp()
    ratio = _log_mixture(log_b - log_a, share)  # log(m / a)
    small = ratio.clamp(-1, 1)
    terms = torch.where(ratio.abs() < 1, a * (small.expm1() - small), (1 - share) * (b - a) - a * ratio)
    return torch.stack([terms.sum(-1), -(a * ratio).sum(-1)])


def _best(sums: Tensor) -> Tensor:
    """`[N]` the first way near agreement, where the plain sum is what is left of terms of either sign; the second far
    from it, where a skewed slope may be far smaller than the b that the first way adds and takes away."""
    return torch.where(sums[0] < _NEAR, sums[0], sums[1])


def _log_mixture(log_ratio: Tensor, share: float) -> Tensor:
    """log(share + (1 - share) e^x), neither cancelling near x = 0 nor losing the slope where e^x is tiny."""
    if share == 0:
        return log_ratio
    near = torch.log1p((1 - share) * log_ratio.clamp(-1, 1).expm1())
    far = torch.logaddexp(log_ratio + math.log(1 - share), torch.full_like(log_ratio, math.log(share)))
    return torch.where(log_ratio.abs() < 1, near, far)


def _forward_kl(log_q: Tensor, log_tail_q: Tensor, teacher: TeacherDistribution) -> Tensor:
    p, q = _outcomes(log_q, log_tail_q, teacher)
    return _best(_kl(p, q))


def _reverse_kl(log_q: Tensor, log_tail_q: Tensor, teacher: TeacherDistribution) -> Tensor:
    p, q = _outcomes(log_q, log_tail_q, teacher)
    return _best(_kl(q, p))


def _skew_kl(log_q: Tensor, log_tail_q: Tensor, teacher: TeacherDistribution, share: float) -> Tensor:
    p, q = _outcomes(log_q, log_tail_q, teacher)
    return _best(_kl(p, q, share))


def _skew_reverse_kl(log_q: Tensor, log_tail_q: Tensor, teacher: TeacherDistribution, share: float) -> Tensor:
    p, q = _outcomes(log_q, log_tail_q, teacher)
    return _best(_kl(q, p, share))


def _jsd(log_q: Tensor, log_tail_q: Tensor, teacher: TeacherDistribution, beta: float) -> Tensor:
    p, q = _outcomes(log_q, log_tail_q, teacher)
    return _best(beta * _kl(p, q, beta) + (1 - beta) * _kl(q, p, 1 - beta))


def _tvd(log_q: Tensor, log_tail_q: Tensor, teacher: TeacherDistribution) -> Tensor:
    p, q = _outcomes(log_q, log_tail_q, teacher)
    ratio = q - p
    difference = torch.where(ratio.abs() < 1, p.exp() * ratio.clamp(-1, 1).expm1(), q.exp() - p.exp())
    noise = _NOISE * max(torch.finfo(x.dtype).eps for x in (log_q, teacher.log_p))
    # The slope jumps where p = q: within the noise of both sides it would be a coin toss, so it is 0.
    return torch.where(ratio.abs() <= noise, 0.0, difference).abs().sum(-1) / 2


register_divergence("forward-kl", _forward_kl)
register_divergence("reverse-kl", _reverse_kl)
register_divergence("skew-kl", _skew_kl, constant=0.1)
register_divergence("skew-reverse-kl", _skew_reverse_kl, constant=0.1)
register_divergence("jsd", _jsd, constant=0.5)
register_divergence("tvd", _tvd, temperature_power=1)
