"""The loss of each position: by kind of target and by use of the tail.

    tail            target outside the entries K; p is exact inside       gradient on K     gradient elsewhere
    bucket          its mass r, as one outcome                            q - p             q (1 - r / s)
    none            nothing                                               (1-r) q - p       (1-r) q
    renormalise     nothing; p / (1-r) inside                             q - p / (1-r)     q
    label           r on the true next token                              q - p             q - r [label]
    label-sample    1 on the true next token if it is there              W q - p           W q - [label]
    uniform         r / (V-K) on each id                                  q - p             q - r / (V-K)

q is the student, s its mass outside K, W = 1 - r + [label outside K]. `bucket` is a lower bound of the dense loss
whose kept probabilities and tail mass are exact at the optimum; `label-sample` is unbiased as labels follow p at T = 1;
`none`, `renormalise`, `label` and `uniform` are biased and warn once. Targets of sampled kinds need no tail:
weights w that sum to 1, gradient q - w everywhere, unbiased. docs/mathematics.md derives all of them.

All but `bucket` are linear in log q, so one class serves them. Those of several teachers are summed by weight, each on
its own view of the same tile.

Shapes: N positions, n positions of a tile, K entries.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.losses.divergences import ABSENT, Divergence, TeacherDistribution
from kdcache.losses.fused_linear import StudentTile
from kdcache.losses.pool import Pool
from kdcache.losses.union import Union
from kdcache.targets import SparseTargets

TAILS = ("bucket", "none", "renormalise", "label", "label-sample", "uniform")

_BIASED = {
    "none": "its optimum is p / (kept mass) on the entries and 0 elsewhere",
    "renormalise": "its optimum is p / (kept mass) on the entries and 0 elsewhere",
    "label": "its optimum, over labels that follow p, is (1 + tail) p on the entries and tail * p elsewhere",
    "uniform": "its optimum spreads the tail's mass evenly over the ids that are not entries",
}
_warned: set[str] = set()


class TargetLoss(ABC):
    """A loss of each position, as a function of what a tile knows of the student.

    Attributes:
        tail_mean: whether it needs `StudentTile.tail_mean`.
    """

    tail_mean = False

    @abstractmethod
    def losses(self, student: StudentTile, rows: slice) -> Tensor:
        """`[n]` nats. `student.gathered` starts with the K entries and, if labels are known, ends with the label."""


@dataclass(frozen=True)
class BucketLoss(TargetLoss):
    """A divergence over the entries and the tail as one outcome.

    Attributes:
        divergence: which.
        log_p: `[N, K]`, `ABSENT` past `count`.
        log_tail: `[N]`, `ABSENT` where there is no tail.
        targets: over the same positions.
    """

    divergence: Divergence
    log_p: Tensor
    log_tail: Tensor
    targets: SparseTargets

    @staticmethod
    def of(targets: SparseTargets, divergence: Divergence, temperature: float) -> BucketLoss:
        """The loss of truncated targets at a temperature that they hold exactly."""
        log_p, log_tail = targets.at_temperature(temperature)
        log_p = torch.where(targets.valid, log_p.clamp(min=ABSENT), ABSENT)
        return BucketLoss(divergence, log_p, log_tail.clamp(min=ABSENT), targets)

    def losses(self, student: StudentTile, rows: slice) -> Tensor:
        """`[n]` the divergence."""
        targets = self.targets[rows]
        entries = student.gathered[:, : targets.ids.shape[-1]]
        log_q = torch.where(targets.valid, entries - student.lse[:, None], ABSENT)
        log_tail_q = torch.where(torch.isneginf(student.tail), ABSENT, student.tail - student.lse)
        return self.divergence.function(
            log_q, log_tail_q, TeacherDistribution(self.log_p[rows], self.log_tail[rows], targets)
        )


@dataclass(frozen=True)
class LinearLoss(TargetLoss):
    """A cross-entropy with fixed weights, less a constant.

    Attributes:
        weights: `[N, K]` of the entries; 0 past `count`.
        constant: `[N]` added.
        label_weight: `[N]` of the label, added to what it may have as an entry; or None.
        spread: `[N]` mass spread evenly over the ids that are not entries; or None.
    """

    weights: Tensor
    constant: Tensor
    label_weight: Tensor | None = None
    spread: Tensor | None = None

    @property
    def tail_mean(self) -> bool:  # type: ignore[override]
        """Where mass is spread over the tail."""
        return self.spread is not None

    def losses(self, student: StudentTile, rows: slice) -> Tensor:
        """`[n]` the constant, and each weight times -log q."""
        weights, lse = self.weights[rows], student.lse
        total = self.constant[rows] + (weights * (lse[:, None] - student.gathered[:, : weights.shape[-1]])).sum(-1)
        if self.label_weight is not None:
            total = total + self.label_weight[rows] * (lse - student.gathered[:, -1])
        if self.spread is not None and student.tail_mean is not None:
            total = total + self.spread[rows] * (lse - student.tail_mean)
        return total


@dataclass(frozen=True)
class PooledLoss(TargetLoss):
    """The losses of several targets, each on its own view of a union, summed by weight.

    Attributes:
        union: of the targets.
        parts: of each: its number in the union, `[N]` weights, and its loss.
    """

    union: Union
    parts: tuple[tuple[int, Tensor, TargetLoss], ...]

    @property
    def tail_mean(self) -> bool:  # type: ignore[override]
        """Where any of them needs it."""
        return any(target_loss.tail_mean for _, _, target_loss in self.parts)

    def losses(self, student: StudentTile, rows: slice) -> Tensor:
        """`[n]` the weighted sum; `student` is what the whole union has of the tile."""
        return torch.stack(
            [
                weight[rows] * target_loss.losses(self.union.view(member, student, rows), rows)
                for member, weight, target_loss in self.parts
            ]
        ).sum(0)


def pooled_loss(
    pool: Pool, loss_of: Callable[[SparseTargets], TargetLoss], labels: Tensor | None, vocab: int
) -> PooledLoss:
    """The losses of all teachers of a pool, by their weights."""
    parts = zip(range(len(pool.targets)), pool.present, map(loss_of, pool.targets), strict=True)
    return PooledLoss(Union.of(pool.targets, labels, vocab), tuple(parts))


def dense_loss(pool: Pool, divergence: Divergence, temperature: float, labels: Tensor | None, vocab: int) -> PooledLoss:
    """A divergence from the pool of teachers that keep everything; the last of the union is the pool itself."""
    targets, log_p = pool.dense(temperature, vocab)
    no_tail = torch.full_like(log_p[:, 0], ABSENT)
    target_loss = BucketLoss(divergence, log_p.clamp(min=ABSENT), no_tail, targets)
    union = Union.of((*pool.targets, targets), labels, vocab)
    return PooledLoss(union, ((len(pool.targets), pool.present.sum(0), target_loss),))


def sampled_loss(targets: SparseTargets) -> LinearLoss:
    """sum_i w_i (-log q_i): its mean over draws is the dense cross-entropy with p_T, and that of its gradient is q - p.

    It is blind to a shift of the logits and never negative, for every single draw.
    """
    return LinearLoss(torch.where(targets.valid, targets.weights, 0.0), torch.zeros_like(targets.weights[..., 0]))


def truncated_loss(
    targets: SparseTargets, tail: str, temperature: float, labels: Tensor | None, vocab: int
) -> LinearLoss:
    """Forward KL against the entries and what a tail other than `bucket` makes of the rest.

    Raises:
        ConfigError: the tail needs labels.
    """
    if tail in _BIASED:
        warn_once(tail, f"tail {tail!r} is biased: {_BIASED[tail]}; tail 'bucket' is not")
    log_p, log_tail = targets.at_temperature(temperature)
    p, r = torch.where(targets.valid, log_p.exp(), 0.0), log_tail.exp()
    constant = torch.xlogy(p, p).sum(-1)
    if tail == "none":
        return LinearLoss(p, constant)
    if tail == "renormalise":
        a = p.sum(-1).clamp(min=torch.finfo(p.dtype).tiny)
        return LinearLoss(p / a[:, None], constant / a - torch.where(targets.count > 0, a.log(), 0.0))
    if tail == "uniform":
        others = (vocab - targets.count).clamp(min=1)
        return LinearLoss(p, constant + torch.xlogy(r, r / others), spread=r)
    if labels is None:
        raise ConfigError(f"tail {tail!r} needs labels")
    at_label = (targets.ids == labels[:, None]) & targets.valid
    if tail == "label":
        known = torch.where(at_label, p, 0.0).sum(-1)
        changed = torch.xlogy(known + r, known + r) - torch.xlogy(known, known)
        return LinearLoss(p, constant + changed, label_weight=r)
    return LinearLoss(p, constant, label_weight=(~at_label.any(-1)).to(p.dtype))


def warn_once(name: str, text: str) -> None:
    """Warn of something, the first time that it is named."""
    if name not in _warned:
        _warned.add(name)
        warnings.warn(text, stacklevel=2)
