"""Divergences: how far a student is from a teacher over the entries and one bucket for the tail.

A divergence is a function of (log q on the entries, log q of the tail, the teacher's side of both) and is found by
name. Near agreement ours are sums of terms that are never negative and vanish, with their slope, where both agree: a
divergence of log p and log q that are each off by a rounding is then off by the square of it. Merging ids into a
bucket never raises an f-divergence (data processing inequality), so each of the first six is a lower bound of the dense
divergence; all are exact where everything is kept.

    forward-kl            KL(p ‖ q)                                      Hinton et al. 2015, arXiv 1503.02531
    reverse-kl            KL(q ‖ p)                                      Gu et al. 2024, MiniLLM, arXiv 2306.08543
    skew-kl[:c]           KL(p ‖ c p + (1-c) q), c = 0.1                 Ko et al. 2024, DistiLLM, arXiv 2402.03898
    skew-reverse-kl[:c]   KL(q ‖ c q + (1-c) p), c = 0.1                 the same
    jsd[:c]               c KL(p ‖ m) + (1-c) KL(q ‖ m), c = 0.5,
                          m = c p + (1-c) q                              Agarwal et al. 2024, GKD, arXiv 2306.13649
    tvd                   1/2 sum |p - q|                                Wen et al. 2023, arXiv 2307.15190
    adaptive-kl[:c]       h KL(p ‖ q) + (1-h) KL(q ‖ p), c = 0.5, h from
                          the gaps |p - q| in the head of mass c         Wu et al. 2024, arXiv 2404.02657
    alpha-beta[:a:b]      1/(ab) sum (a p^s + b q^s) / s - p^a q^b,
                          s = a + b, a = 0.2, b = 0.7                    Wang et al. 2025, ABKD, arXiv 2505.04560
    decoupled-kl[:a:b]    a KL(label, rest) + b KL(within the rest),
                          a = 1, b = 8                                   Zhao et al. 2022, DKD, arXiv 2203.08679
    tail-kl[:k:w]         KL(k largest, rest) + w r KL(within the rest),
                          r the rest's mass, k = 10, w = 2               Dasgupta et al. 2026, arXiv 2602.20816

An outcome that does not exist (a padded entry, the tail where everything is kept) has the log-probability `ABSENT`
on both sides, which is finite: it weighs nothing and differs by nothing. One that the student makes impossible (a logit
of -inf) has -inf: it adds nothing to KL(q ‖ p), and makes KL(p ‖ q) infinite.

Shapes: N positions, K entries, M = K + 1 outcomes: the entries, and the tail as the last one.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.losses.divergence_registry import ABSENT, Constants, TeacherDistribution, register_divergence

_NOISE = 64
"""Machine epsilons by which log q and log p may differ and count as equal where a slope is not continuous (`tvd`):
both are differences of logits of some tens, each rounded."""

_NEAR = 1e-2
"""Nats below which a divergence is summed so that roundings of log p and log q count only squared."""


def _outcomes(log_q: Tensor, log_tail_q: Tensor, teacher: TeacherDistribution) -> tuple[Tensor, Tensor]:
    """`[N, M]` log p and log q."""
    log_p = torch.cat([teacher.log_p, teacher.log_tail[:, None]], -1).to(log_q.dtype)
    return log_p, torch.cat([log_q, log_tail_q[:, None]], -1)


def _kl(log_a: Tensor, log_b: Tensor, share: float = 0.0) -> Tensor:
    """`[2, N]` KL(a ‖ m), m = share a + (1 - share) b, summed in two ways of equal value; see `_best`.

    The first is the sum of m - a - a log(m / a), whose terms are never negative; a and m both sum to 1. The second is
    the plain sum of -a log(m / a). Where a is 0, both terms are what is left: m, and 0.
    """
    a, b = log_a.exp(), log_b.exp()
    some = a > 0
    ratio = _log_mixture(torch.where(some, log_b - log_a, 0.0), share)  # log(m / a)
    small = ratio.clamp(-1, 1)
    near = some & (ratio.abs() < 1)
    terms = torch.where(near, a * (small.expm1() - small), (1 - share) * (b - a) - a * ratio)
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


def _adaptive_kl(log_q: Tensor, log_tail_q: Tensor, teacher: TeacherDistribution, mass: float) -> Tensor:
    """The weights have no gradient. The head is the likeliest entry and those after it up to `mass`, never the tail."""
    p, q = _outcomes(log_q, log_tail_q, teacher)
    with torch.no_grad():
        kept, order = p[:, :-1].exp().sort(stable=True, dim=-1, descending=True)
        inside = kept.cumsum(-1) <= mass
        inside[:, 0] = True
        head = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, inside)  # [N, M]
        gap = (p.exp() - q.exp()).abs()
        total = gap.sum(-1)
        share = torch.where(total > 0, torch.where(head, gap, 0.0).sum(-1) / total, 0.5)
    return share * _best(_kl(p, q)) + (1 - share) * _best(_kl(q, p))


def _alpha_beta(log_q: Tensor, log_tail_q: Tensor, teacher: TeacherDistribution, alpha: float, beta: float) -> Tensor:
    """Each term is never negative by itself (Young's inequality); alpha = 0 and beta = 0 are the limits."""
    p, q = _outcomes(log_q, log_tail_q, teacher)
    if beta == 0:
        return _bregman(p, q, alpha)
    if alpha == 0:
        return _bregman(q, p, beta)
    s = alpha + beta
    ratio = q - p
    near = (s * ratio).abs() < 1
    small = torch.where(near, ratio, 0.0)
    close = (s * p).exp() * (_above_line(s * small) / s - _above_line(beta * small) / beta) / alpha
    plain = ((s * p).exp() / beta + (s * q).exp() / alpha) / s - (alpha * p + beta * q).exp() / (alpha * beta)
    return torch.where(near, close, plain).sum(-1)


def _bregman(log_a: Tensor, log_b: Tensor, power: float) -> Tensor:
    """`[N]` sum of (u log(u / v) - u + v) / power^2, u = a^power and v = b^power."""
    x, y = power * log_a, power * log_b
    u, v = x.exp(), y.exp()
    ratio = torch.where(u > 0, y - x, 0.0)  # log(v / u)
    small = ratio.clamp(-1, 1)
    near = (u > 0) & (ratio.abs() < 1)
    return torch.where(near, u * _above_line(small), v - u - u * ratio).sum(-1) / power**2


def _above_line(x: Tensor) -> Tensor:
    """e^x - 1 - x."""
    return x.expm1() - x


def _decoupled_kl(log_q: Tensor, log_tail_q: Tensor, teacher: TeacherDistribution, alpha: float, beta: float) -> Tensor:
    if teacher.at_label is None:
        raise ConfigError("loss decoupled-kl needs labels")
    p, q = _outcomes(log_q, log_tail_q, teacher)
    between, within, _ = _split(p, q, torch.nn.functional.pad(teacher.at_label, (0, 1)))
    return alpha * between + beta * within


def _tail_kl(log_q: Tensor, log_tail_q: Tensor, teacher: TeacherDistribution, largest: float, weight: float) -> Tensor:
    p, q = _outcomes(log_q, log_tail_q, teacher)
    head = torch.zeros_like(p, dtype=torch.bool)
    head.scatter_(-1, p[:, :-1].argsort(stable=True, dim=-1, descending=True)[:, : int(largest)], True)
    between, within, rest = _split(p, q, head)
    return between + weight * rest.exp() * within


def _split(log_p: Tensor, log_q: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(p ‖ q) in two parts: KL = between + rest's mass under p * within.

    Args:
        log_p, log_q: `[N, M]`.
        head: `[N, M]` outcomes that stay apart; the rest are merged into one.

    Returns:
        `[N]` KL over the head and the rest as one outcome; `[N]` KL of the rest, normalised on both sides; `[N]` log of
        the rest's mass under p.
    """
    (rest_p, within_p), (rest_q, within_q) = (_conditional(x, ~head) for x in (log_p, log_q))
    merged_p, merged_q = (
        torch.cat([torch.where(head, x, ABSENT), rest[:, None]], -1) for x, rest in ((log_p, rest_p), (log_q, rest_q))
    )
    return _best(_kl(merged_p, merged_q)), _best(_kl(within_p, within_q)), rest_p


def _conditional(log_x: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """`[N]` log mass of some outcomes, and `[N, M]` their log-probabilities given that it is one of them."""
    # Impossible ones stay finite: a mass of nothing has no share to give.
    some = torch.where(inside, torch.where(torch.isneginf(log_x), ABSENT, log_x), -torch.inf)
    mass = some.logsumexp(-1)
    return mass, torch.where(inside, some - mass[:, None], ABSENT)


_PAIR = Constants((0.2, 0.7), lambda a, b: min(a, b) >= 0 and 0 < a + b < math.inf, "2 constants >= 0, not both 0")
_FACTORS = Constants((1.0, 8.0), lambda a, b: min(a, b) >= 0 and 0 < a + b < math.inf, "2 factors >= 0, not both 0")
_COUNT_AND_WEIGHT = Constants(
    (10.0, 2.0), lambda k, w: k >= 1 and k % 1 == 0 and 0 <= w < math.inf, "a count of at least 1 and a weight >= 0"
)

register_divergence("forward-kl", _forward_kl, zero_tail=True)
register_divergence("reverse-kl", _reverse_kl)
register_divergence("skew-kl", _skew_kl, constant=0.1, zero_tail=True)
register_divergence("skew-reverse-kl", _skew_reverse_kl, constant=0.1, zero_tail=True)
register_divergence("jsd", _jsd, constant=0.5, zero_tail=True)
register_divergence("tvd", _tvd, temperature_power=1, zero_tail=True)
register_divergence("adaptive-kl", _adaptive_kl, constant=0.5)
register_divergence("alpha-beta", _alpha_beta, constant=_PAIR)
register_divergence("decoupled-kl", _decoupled_kl, constant=_FACTORS, takes_label=True)
register_divergence("tail-kl", _tail_kl, constant=_COUNT_AND_WEIGHT)
