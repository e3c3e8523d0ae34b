"""The loss of each position: by kind of target and by use of the tail.

    tail              target outside the entries K; p is exact inside       gradient on K     gradient elsewhere
    bucket            its mass r, as one outcome                            q - p             q (1 - r / s)
    none              nothing                                               (1-r) q - p       (1-r) q
    renormalise       nothing; p / (1-r) inside                             q - p / (1-r)     q
    renormalise-both  ignored; p / (1-r) against q / (1-s) inside           q/(1-s) - p/(1-r) 0
    label             r on the true next token                              q - p             q - r [label]
    label-sample      1 on the true next token if it is there              W q - p           W q - [label]
    uniform           r / (V-K) on each id                                  q - p             q - r / (V-K)

The gradients are those of `forward-kl`. q is the student, s its mass outside K, W = 1 - r + [label outside K].
`bucket` is a lower bound of the dense loss whose kept probabilities and tail mass are exact at the optimum;
`label-sample` is unbiased as labels follow p at T = 1; the others are biased or blind and warn once. Targets of sampled
kinds need no tail: weights w that sum to 1, gradient q - w everywhere, unbiased. docs/mathematics.md derives all of
them.

`OutcomeLoss` is a divergence over the entries and the tail; `LinearLoss` is forward KL where it is linear in log q.
Losses of several teachers are summed by weight, each on its own view of the same tile.

Shapes: N positions, n positions of a tile, K entries.
"""

from __future__ import annotations

import dataclasses
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.losses.divergence_registry import ABSENT, DivergenceFunction, TeacherDistribution
from kdcache.losses.fused_linear import StudentTile
from kdcache.losses.pool import Pool
from kdcache.losses.union import Union
from kdcache.targets import SparseTargets

TAILS = ("bucket", "none", "renormalise", "renormalise-both", "label", "label-sample", "uniform")

LINEAR_TAILS = ("none", "label-sample", "uniform")
"""Tails whose target is not a distribution over the entries and one more outcome: forward KL only."""

ZERO_TAILS = ("renormalise", "label")
"""Tails whose target gives nothing to the ids outside: for divergences that allow it."""

_NOTES = {
    "none": "is biased: its optimum is p / (kept mass) on the entries and 0 elsewhere; tail 'bucket' is not",
    "renormalise": "is biased: its optimum is p / (kept mass) on the entries and 0 elsewhere; tail 'bucket' is not",
    "renormalise-both": "is blind outside the entries: nothing there is learned, nor how much mass is there (measured "
    "once: a held-out KL of 3.97, against 1.69 for tail 'bucket')",
    "label": "is biased: its optimum, over labels that follow p, is (1 + tail) p on the entries and tail * p "
    "elsewhere; tail 'bucket' is not",
    "uniform": "is biased: its optimum spreads the tail's mass evenly over the ids that are not entries; tail "
    "'bucket' is not",
}
_warned: set[str] = set()


class TargetLoss(ABC):
    """A loss of each position, as a function of what a tile knows of the student.

    Attributes:
        tail_mean: whether it needs `StudentTile.tail_mean`.
        targets: the targets whose view of a tile it is given.
    """

    tail_mean = False
    targets: SparseTargets

    @abstractmethod
    def losses(self, student: StudentTile, rows: slice) -> Tensor:
        """`[n]` nats. `student.gathered` starts with the K entries and, if labels are known, ends with the label."""


@dataclass(frozen=True)
class OutcomeLoss(TargetLoss):
    """A divergence over the entries and the tail as one outcome.

    Attributes:
        function: the divergence.
        log_p: `[N, K]`, `ABSENT` past `count`.
        log_tail: `[N]`, `ABSENT` where there is no tail.
        targets: over the same positions.
        at_label: `[N, K]` which entry is the label, if the divergence takes it.
        within: whether the student is normalised over its entries, and has no tail either.
    """

    function: DivergenceFunction
    log_p: Tensor
    log_tail: Tensor
    targets: SparseTargets
    at_label: Tensor | None = None
    within: bool = False

    @staticmethod
    def bucket(targets: SparseTargets, function: DivergenceFunction, temperature: float) -> OutcomeLoss:
        """The loss of truncated targets at a temperature that they hold exactly."""
        log_p, log_tail = targets.at_temperature(temperature)
        return OutcomeLoss(function, _present(log_p, targets.valid), _present(log_tail), targets)

    @staticmethod
    def bucket_and_label(
        targets: SparseTargets, function: DivergenceFunction, temperature: float, labels: Tensor
    ) -> OutcomeLoss:
        """The same with the label among the entries, out of the tail: its own probability is known.

        Raises:
            TargetError: the label's log-probability is unknown.
        """
        log_p, log_tail = targets.at_temperature(temperature)
        wider = _LabelAmongEntries.of(targets, labels)
        own = targets.label_at_temperature(temperature, "a loss with the label as an outcome")
        own = torch.where(targets.count > 0, own, -torch.inf)
        rest = torch.where(wider.added, _log_less(log_tail, own), log_tail)
        log_p = wider.spread(log_p, torch.minimum(own, log_tail))
        return OutcomeLoss(
            function, _present(log_p, wider.targets.valid), _present(rest), wider.targets, at_label=wider.at_label
        )

    @staticmethod
    def label(targets: SparseTargets, function: DivergenceFunction, temperature: float, labels: Tensor) -> OutcomeLoss:
        """The mass of the tail on the label, whether that is an entry or not."""
        log_p, log_tail = targets.at_temperature(temperature)
        wider = _LabelAmongEntries.of(targets, labels)
        log_p = wider.spread(log_p, torch.full_like(log_tail, -torch.inf))
        moved = torch.where(wider.at_label, torch.logaddexp(log_p, log_tail[:, None]), log_p)
        none = torch.full_like(log_tail, ABSENT)
        return OutcomeLoss(function, _present(moved, wider.targets.valid), none, wider.targets, at_label=wider.at_label)

    @staticmethod
    def renormalised(
        targets: SparseTargets, function: DivergenceFunction, temperature: float, *, both: bool
    ) -> OutcomeLoss:
        """The teacher normalised over its entries, at any temperature; with `both`, the student as well."""
        scaled = torch.where(targets.valid, targets.logprobs / temperature, -torch.inf)
        log_p = torch.where(targets.valid, scaled - _logsumexp_of_any(scaled)[:, None], -torch.inf)
        none = torch.full_like(log_p[:, 0], ABSENT)
        return OutcomeLoss(function, _present(log_p, targets.valid), none, targets, within=both)

    def losses(self, student: StudentTile, rows: slice) -> Tensor:
        """`[n]` the divergence."""
        targets, log_tail = self.targets[rows], self.log_tail[rows]
        entries = student.gathered[:, : targets.ids.shape[-1]]
        if self.within:
            total = _logsumexp_of_any(torch.where(targets.valid, entries, -torch.inf))
            log_tail_q = log_tail.to(total.dtype)  # there is none on either side
        else:
            total = student.lse
            gone = torch.isneginf(student.tail) & (log_tail <= ABSENT)  # no id is left: no such outcome
            log_tail_q = torch.where(gone, ABSENT, student.tail - student.lse)
        log_q = torch.where(targets.valid, entries - total[:, None], ABSENT)
        at_label = None if self.at_label is None else self.at_label[rows]
        return self.function(log_q, log_tail_q, TeacherDistribution(self.log_p[rows], log_tail, targets, at_label))


def _present(log_p: Tensor, valid: Tensor | None = None) -> Tensor:
    """Log-probabilities with `ABSENT` for what cannot happen and for what is not `valid`."""
    some = ~torch.isneginf(log_p) if valid is None else valid & ~torch.isneginf(log_p)
    return torch.where(some, log_p, ABSENT)


def _logsumexp_of_any(values: Tensor) -> Tensor:
    """`[n]` log-sum-exp; 0, with gradient 0, where all values are -inf."""
    some = (values > -torch.inf).any(-1)
    return torch.where(some, torch.where(some[:, None], values, 0.0).logsumexp(-1), 0.0)


def _log_less(whole: Tensor, part: Tensor) -> Tensor:
    """log(e^whole - e^part); -inf where the part is all of it, or, by its rounding, more."""
    gap = part - whole
    some = gap < 0  # false for NaN
    return torch.where(some, whole + torch.log(-torch.where(some, gap, -1.0).expm1()), -torch.inf)


@dataclass(frozen=True)
class _LabelAmongEntries:
    """Targets to which the label is added where it is no entry.

    Attributes:
        targets: with ids and `count` of the wider entries; only these two are to be used.
        at_label: `[N, K + 1]` which of them is the label.
        added: `[N]` where it was no entry.
    """

    targets: SparseTargets
    at_label: Tensor
    added: Tensor

    @staticmethod
    def of(targets: SparseTargets, labels: Tensor) -> _LabelAmongEntries:
        """The wider targets; a position without a target stays without one."""
        added = (targets.count > 0) & ~((targets.ids == labels[:, None]) & targets.valid).any(-1)
        wider = targets.widen(targets.ids.shape[-1] + 1)
        ids = wider.ids.scatter(-1, _last(targets, added), labels[:, None].to(wider.ids.dtype))
        ids = torch.where(added[:, None], ids, wider.ids)
        wider = dataclasses.replace(wider, ids=ids, count=targets.count + added.to(targets.count.dtype))
        return _LabelAmongEntries(wider, (ids == labels[:, None]) & wider.valid, added)

    def spread(self, log_p: Tensor, of_label: Tensor) -> Tensor:
        """`[N, K + 1]` log-probabilities `[N, K]` of the old entries, and `[N]` that of the label where it is new."""
        wider = torch.nn.functional.pad(log_p, (0, 1), value=-torch.inf)
        return torch.where(self.added[:, None] & self.at_label, of_label[:, None], wider)


def _products(weights: Tensor, values: Tensor) -> Tensor:
    """The products, 0 where a weight is, also of what is infinite."""
    return torch.where(weights != 0, weights * values, 0.0)


def _last(targets: SparseTargets, added: Tensor) -> Tensor:
    """`[N, 1]` the column behind the entries in use, where one is added."""
    return torch.where(added, targets.count, 0)[:, None].long()


@dataclass(frozen=True)
class LinearLoss(TargetLoss):
    """A cross-entropy with fixed weights, less a constant.

    Attributes:
        targets: over the same positions.
        weights: `[N, K]` of the entries; 0 past `count`.
        constant: `[N]` added.
        label_weight: `[N]` of the label, added to what it may have as an entry; or None.
        spread: `[N]` mass spread evenly over the ids that are not entries; or None.
    """

    targets: SparseTargets
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
        surprisal = lse[:, None] - student.gathered  # [n, G] -log q
        total = self.constant[rows] + _products(weights, surprisal[:, : weights.shape[-1]]).sum(-1)
        if self.label_weight is not None:
            total = total + _products(self.label_weight[rows], surprisal[:, -1])
        if self.spread is not None and student.tail_mean is not None:
            total = total + self.spread[rows] * (lse - student.tail_mean)
        return total


@dataclass(frozen=True)
class PooledLoss:
    """The losses of several targets, each on its own view of a union, summed by weight.

    Attributes:
        union: of the targets of the teachers first, and of those that a loss changed.
        parts: of each loss: the number of its targets in the union, `[N]` weights, and the loss.
    """

    union: Union
    parts: tuple[tuple[int, Tensor, TargetLoss], ...]

    @property
    def tail_mean(self) -> bool:
        """Whether any of them needs `StudentTile.tail_mean`."""
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
    pool: Pool, losses_of: Callable[[SparseTargets], Iterable[TargetLoss]], labels: Tensor | None, vocab: int
) -> PooledLoss:
    """The losses to all teachers of a pool, by their weights."""
    members, parts = list(pool.targets), []
    for number, (targets, weight) in enumerate(zip(pool.targets, pool.present, strict=True)):
        for target_loss in losses_of(targets):
            member = number
            if target_loss.targets is not targets:
                member = len(members)
                members.append(target_loss.targets)
            parts.append((member, weight, target_loss))
    return PooledLoss(Union.of(members, labels, vocab), tuple(parts))


def dense_loss(
    pool: Pool, function: DivergenceFunction, temperature: float, labels: Tensor | None, vocab: int
) -> PooledLoss:
    """A divergence from the pool of teachers that keep everything; the last of the union is the pool itself."""
    targets, log_p = pool.dense(temperature, vocab)
    no_tail = torch.full_like(log_p[:, 0], ABSENT)
    at_label = None if labels is None else (targets.ids == labels[:, None]) & targets.valid
    target_loss = OutcomeLoss(function, _present(log_p), no_tail, targets, at_label=at_label)
    union = Union.of((*pool.targets, targets), labels, vocab)
    return PooledLoss(union, ((len(pool.targets), pool.present.sum(0), target_loss),))


def outcome_loss(
    targets: SparseTargets,
    function: DivergenceFunction,
    tail: str,
    temperature: float,
    labels: Tensor | None,
    takes_label: bool,
) -> OutcomeLoss:
    """A divergence of truncated targets, with a tail that is one more outcome or none.

    Args:
        targets: at N positions.
        function: the divergence.
        tail: not one of `LINEAR_TAILS`.
        temperature: T.
        labels: `[N]`, if they are known.
        takes_label: whether the divergence needs the label among the entries, which then must be known.

    Raises:
        ConfigError: the tail needs labels.
    """
    _warn_of(tail)
    if tail in ("renormalise", "renormalise-both"):
        return OutcomeLoss.renormalised(targets, function, temperature, both=tail == "renormalise-both")
    if tail == "bucket" and not takes_label:
        return OutcomeLoss.bucket(targets, function, temperature)
    if labels is None:
        raise ConfigError(f"tail {tail!r} needs labels")
    make = OutcomeLoss.label if tail == "label" else OutcomeLoss.bucket_and_label
    return make(targets, function, temperature, labels)


def sampled_loss(targets: SparseTargets, factor: float = 1.0) -> LinearLoss:
    """sum_i w_i (-log q_i): its mean over draws is the dense cross-entropy with p_T, and that of its gradient is q - p.

    It is blind to a shift of the logits and never negative, for every single draw.
    """
    weights = torch.where(targets.valid, targets.weights * factor, 0.0)
    return LinearLoss(targets, weights, torch.zeros_like(targets.weights[..., 0]))


def linear_loss(
    targets: SparseTargets, tail: str, temperature: float, labels: Tensor | None, vocab: int, factor: float = 1.0
) -> LinearLoss:
    """`factor` times forward KL against the entries and what one of `LINEAR_TAILS` makes of the rest.

    Raises:
        ConfigError: the tail needs labels.
    """
    _warn_of(tail)
    log_p, log_tail = targets.at_temperature(temperature)
    p, r = torch.where(targets.valid, log_p.exp(), 0.0), log_tail.exp()
    constant = torch.xlogy(p, p).sum(-1)
    if tail == "none":
        return LinearLoss(targets, factor * p, factor * constant)
    if tail == "uniform":
        others = (vocab - targets.count).clamp(min=1)
        constant = constant + torch.xlogy(r, r / others)
        return LinearLoss(targets, factor * p, factor * constant, spread=factor * r)
    if labels is None:
        raise ConfigError(f"tail {tail!r} needs labels")
    outside = ~((targets.ids == labels[:, None]) & targets.valid).any(-1)
    return LinearLoss(targets, factor * p, factor * constant, label_weight=factor * outside.to(p.dtype))


def _warn_of(tail: str) -> None:
    if tail in _NOTES:
        warn_once(tail, f"tail {tail!r} {_NOTES[tail]}")


def warn_once(name: str, text: str) -> None:
    """Warn of something, the first time that it is named."""
    if name not in _warned:
        _warned.add(name)
        warnings.warn(text, stacklevel=2)
