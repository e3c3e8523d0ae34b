"""Losses as the textbooks write them: dense distributions and plain autograd. Shares no code with kdcache.losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kdcache import Selection, SparseTargets, select


def _kl(a: Tensor, b: Tensor) -> Tensor:
    """`[N]` sum of a log(a / b), with 0 log 0 = 0 on both sides."""
    some = a > 0
    safe_a, safe_b = torch.where(some, a, 1.0), torch.where(some, b, 1.0)
    return (safe_a * (safe_a.log() - safe_b.log())).sum(-1)


def _jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    m = beta * p + (1 - beta) * q
    return beta * _kl(p, m) + (1 - beta) * _kl(q, m)


def _adaptive(p: Tensor, q: Tensor, mass: float = 0.5) -> Tensor:
    """`[N]` of outcomes whose last is a tail, never in the head: position by position, as in the paper."""
    found = []
    for one, other in zip(p, q, strict=True):
        order = sorted(range(len(one) - 1), key=lambda i: -one[i].item())
        head, total = [order[0]], one[order[0]].item()
        for i in order[1:]:
            total += one[i].item()
            if total > mass:
                break
            head.append(i)
        gap = (one - other).abs().detach()
        share = gap[head].sum() / gap.sum() if gap.sum() > 0 else 0.5
        found.append(share * _kl(one[None], other[None])[0] + (1 - share) * _kl(other[None], one[None])[0])
    return torch.stack(found)


def _alpha_beta(p: Tensor, q: Tensor, a: float, b: float) -> Tensor:
    """Cichocki, Cruces and Amari 2011, equation 19, and its limits (equation 21); 0 log 0 = 0."""
    some = (p > 0) | (q > 0)  # what neither has has no slope either
    p, q = torch.where(some, p, 1.0), torch.where(some, q, 1.0)
    if b == 0:
        terms = (p**a * a * (p.log() - q.log()) - p**a + q**a) / a**2
    elif a == 0:
        terms = (q**b * b * (q.log() - p.log()) - q**b + p**b) / b**2
    else:
        terms = -(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)) / (a * b)
    return torch.where(some, terms, 0.0).sum(-1)


def _split(p: Tensor, q: Tensor, head: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`[N]` KL of the head and the rest as one, KL within the rest, and the rest's mass under p."""
    rest_p, rest_q = ((x * ~head).sum(-1, keepdim=True) for x in (p, q))
    between = _kl(torch.cat([p * head, rest_p], -1), torch.cat([q * head, rest_q], -1))
    safe_p, safe_q = torch.where(rest_p > 0, rest_p, 1.0), torch.where(rest_q > 0, rest_q, 1.0)
    return between, _kl(p * ~head / safe_p, q * ~head / safe_q), rest_p[:, 0]


def _tail_kl(p: Tensor, q: Tensor, largest: int, weight: float) -> Tensor:
    """Of outcomes whose last is a tail, which is never among the largest."""
    head = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p[:, :-1].topk(largest).indices, True)
    between, within, mass = _split(p, q, head)
    return between + weight * mass * within


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward-kl": _kl,
    "reverse-kl": lambda p, q: _kl(q, p),
    "skew-kl": lambda p, q: _kl(p, 0.1 * p + 0.9 * q),
    "skew-kl:0.6": lambda p, q: _kl(p, 0.6 * p + 0.4 * q),
    "skew-reverse-kl": lambda p, q: _kl(q, 0.1 * q + 0.9 * p),
    "jsd": lambda p, q: _jsd(p, q, 0.5),
    "jsd:0.9": lambda p, q: _jsd(p, q, 0.9),
    "tvd": lambda p, q: (p - q).abs().sum(-1) / 2,
    "adaptive-kl": _adaptive,
    "alpha-beta": lambda p, q: _alpha_beta(p, q, 0.2, 0.7),
    "alpha-beta:0.5:0.5": lambda p, q: _alpha_beta(p, q, 0.5, 0.5),
    "alpha-beta:0.6:0": lambda p, q: _alpha_beta(p, q, 0.6, 0),
    "alpha-beta:0:1.4": lambda p, q: _alpha_beta(p, q, 0, 1.4),
    "tail-kl:1:3": lambda p, q: _tail_kl(p, q, 1, 3),
}
"""Functions of the probabilities of outcomes, the last of which is a tail."""

LABEL_DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "decoupled-kl": lambda p, q, at_label: _dkd(p, q, at_label, 1, 8),
    "decoupled-kl:0.5:2": lambda p, q, at_label: _dkd(p, q, at_label, 0.5, 2),
}
"""The same with a mask of the outcome that is the label."""


def _dkd(p: Tensor, q: Tensor, at_label: Tensor, alpha: float, beta: float) -> Tensor:
    target, other, _ = _split(p, q, at_label)
    return alpha * target + beta * other


TAILS = ("none", "renormalise", "renormalise-both", "label", "label-sample", "uniform")
BOUNDED = ("forward-kl", "skew-kl", "skew-reverse-kl", "jsd", "tvd")
"""Finite where the teacher has no mass."""
SUMS = ("forward-kl*0.7+jsd:0.9*0.3", "reverse-kl*2+tvd*0.5+decoupled-kl*0.1", "reverse-kl + forward-kl*0")
COMBINATIONS = [
    *((loss, "bucket") for loss in (*DIVERGENCES, *LABEL_DIVERGENCES, *SUMS)),
    *(("forward-kl", tail) for tail in TAILS),
    *((loss, tail) for loss in BOUNDED[1:] for tail in ("renormalise", "label")),
    *((loss, "renormalise-both") for loss in ("reverse-kl", "jsd", "tvd", "adaptive-kl", "alpha-beta", "tail-kl:1:3")),
    ("forward-kl*0.5+tvd*2", "renormalise"),
    ("forward-kl*0.25", "uniform"),
]
STEPS = [(loss, tail, t) for t in (1.0, 2.0) for loss, tail in COMBINATIONS if tail != "label-sample" or t == 1]
"""With a temperature: `label-sample` has 1 only."""


def coarse(p: Tensor, ids: Tensor) -> Tensor:
    """`[N, K + 1]` the probabilities of the entries, and of all other ids together."""
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(-1, ids.long(), True)
    return torch.cat([p.gather(-1, ids.long()), (p * ~inside).sum(-1, keepdim=True)], -1)


def targets_of(
    teacher: Tensor, k: int, temperatures: Sequence[float] = (1.0,), labels: Tensor | None = None
) -> SparseTargets:
    """`topk` targets of float64 logits `[N, V]`, with every value in float64."""
    ids = select(teacher, Selection(k=k)).ids
    log_p = teacher.log_softmax(-1)
    outside = log_p.scatter(-1, ids.long(), -torch.inf)
    partitions = torch.stack([(log_p / t).logsumexp(-1) for t in temperatures], -1)
    kept = log_p.gather(-1, ids.long())
    return SparseTargets(
        ids=ids,
        logprobs=kept,
        weights=kept.exp(),
        count=torch.full(ids.shape[:1], k),
        log_partition=partitions,
        log_tail=torch.stack([(outside / t).logsumexp(-1) for t in temperatures], -1) - partitions,
        entropy=-(log_p.exp() * log_p).sum(-1),
        label_logprob=torch.full(ids.shape[:1], torch.nan, dtype=torch.float64)
        if labels is None
        else log_p.gather(-1, labels.clamp(min=0)[:, None])[:, 0],
        temperatures=tuple(temperatures),
    )


def terms_of(loss: str) -> list[tuple[str, float]]:
    """Names and weights of the terms of a loss that count."""
    split = [(part.strip().partition("*")) for part in loss.split("+")]
    found = [(name, float(weight) if weight else 1.0) for name, _, weight in split]
    return [(name, weight) for name, weight in found if weight]


def soft_losses(
    logits: Tensor, teacher: Tensor, ids: Tensor, labels: Tensor, loss: str, tail: str, temperature: float
) -> Tensor:
    """`[N]` the distillation term: the terms of the loss by their weights, each with its power of T."""
    parts = [
        weight
        * temperature ** (1 if name == "tvd" else 2)
        * position_losses(logits, teacher, ids, labels, name, tail, temperature)
        for name, weight in terms_of(loss)
    ]
    return torch.stack(parts).sum(0)


def position_losses(
    logits: Tensor, teacher: Tensor, ids: Tensor, labels: Tensor, loss: str, tail: str, temperature: float
) -> Tensor:
    """`[N]` one divergence before T^2 (T of `tvd`), in the dtype of the logits."""
    dtype = logits.dtype
    p, q = (teacher.to(dtype) / temperature).softmax(-1), (logits / temperature).softmax(-1)
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(-1, ids.long(), True)
    at_label = torch.zeros_like(p, dtype=torch.bool).scatter(-1, labels[:, None], True)
    if loss in LABEL_DIVERGENCES:  # ids that are neither entries nor the label, as one outcome
        rest = ~(inside | at_label)
        both = [torch.cat([x * ~rest, (x * rest).sum(-1, keepdim=True)], -1) for x in (p, q)]
        return LABEL_DIVERGENCES[loss](*both, torch.nn.functional.pad(at_label, (0, 1)))
    if tail == "bucket":
        return DIVERGENCES[loss](coarse(p, ids), coarse(q, ids))
    if tail == "renormalise-both":
        kept = [x.gather(-1, ids.long()) for x in (p, q)]
        return DIVERGENCES[loss](*(torch.nn.functional.pad(x / x.sum(-1, keepdim=True), (0, 1)) for x in kept))
    kept, r = p * inside, (p * ~inside).sum(-1, keepdim=True)
    target = {
        "none": kept,
        "renormalise": kept / kept.sum(-1, keepdim=True),
        "label": kept + r * at_label,
        "label-sample": kept + at_label * ~inside,
        "uniform": kept + ~inside * r / (~inside).sum(-1, keepdim=True).clamp(min=1),
    }[tail]
    return DIVERGENCES[loss](target, q)


def step_loss(
    logits: Tensor,
    teacher: Tensor,
    ids: Tensor,
    labels: Tensor,
    loss: str,
    tail: str,
    temperature: float,
    soft_weight: float,
) -> Tensor:
    """The loss of a step: positions whose label is -100 do not count."""
    keep = labels != -100
    soft = soft_losses(logits[keep], teacher[keep], ids[keep], labels[keep], loss, tail, temperature).mean()
    hard = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)
    return soft_weight * soft + (1 - soft_weight) * hard
