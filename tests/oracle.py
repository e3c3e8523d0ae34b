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


DIVERGENCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward-kl": _kl,
    "reverse-kl": lambda p, q: _kl(q, p),
    "skew-kl": lambda p, q: _kl(p, 0.1 * p + 0.9 * q),
    "skew-kl:0.6": lambda p, q: _kl(p, 0.6 * p + 0.4 * q),
    "skew-reverse-kl": lambda p, q: _kl(q, 0.1 * q + 0.9 * p),
    "jsd": lambda p, q: _jsd(p, q, 0.5),
    "jsd:0.9": lambda p, q: _jsd(p, q, 0.9),
    "tvd": lambda p, q: (p - q).abs().sum(-1) / 2,
}
TAILS = ("none", "renormalise", "label", "label-sample", "uniform")
COMBINATIONS = [(loss, "bucket") for loss in DIVERGENCES] + [("forward-kl", tail) for tail in TAILS]
STEPS = [(loss, tail, t) for loss, tail in COMBINATIONS for t in (1.0, 2.0) if tail != "label-sample" or t == 1]
"""With a temperature: `label-sample` has 1 only."""


def coarse(p: Tensor, ids: Tensor) -> Tensor:
    """`[N, K + 1]` the probabilities of the entries, and of all other ids together."""
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(-1, ids.long(), True)
    return torch.cat([p.gather(-1, ids.long()), (p * ~inside).sum(-1, keepdim=True)], -1)


def targets_of(teacher: Tensor, k: int, temperatures: Sequence[float] = (1.0,)) -> SparseTargets:
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
        label_logprob=torch.full(ids.shape[:1], torch.nan, dtype=torch.float64),
        temperatures=tuple(temperatures),
    )


def position_losses(
    logits: Tensor, teacher: Tensor, ids: Tensor, labels: Tensor, loss: str, tail: str, temperature: float
) -> Tensor:
    """`[N]` the distillation term before T^2, in the dtype of the logits."""
    dtype = logits.dtype
    p, q = (teacher.to(dtype) / temperature).softmax(-1), (logits / temperature).softmax(-1)
    if tail == "bucket":
        return DIVERGENCES[loss](coarse(p, ids), coarse(q, ids))
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(-1, ids.long(), True)
    kept, r = p * inside, (p * ~inside).sum(-1, keepdim=True)
    at_label = torch.zeros_like(p).scatter(-1, labels[:, None], 1.0)
    target = {
        "none": kept,
        "renormalise": kept / kept.sum(-1, keepdim=True),
        "label": kept + r * at_label,
        "label-sample": kept + at_label * ~inside,
        "uniform": kept + ~inside * r / (~inside).sum(-1, keepdim=True).clamp(min=1),
    }[tail]
    return _kl(target, q)


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
    soft = position_losses(logits[keep], teacher[keep], ids[keep], labels[keep], loss, tail, temperature).mean()
    hard = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)
    return soft_weight * temperature ** (1 if loss == "tvd" else 2) * soft + (1 - soft_weight) * hard
