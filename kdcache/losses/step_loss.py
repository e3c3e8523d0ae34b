"""The loss of a distillation step: divergence, label cross-entropy, temperature and weights, summed and divided once.

    soft_weight * T^2 * sum_t a_t D(teacher_T, student_T) / targets + (1 - soft_weight) * sum_t CE(label) / items

T^2 (T for `tvd`) keeps the gradient's size as T grows (Hinton et al. 2015, arXiv 1503.02531, section 2.1).
A position whose label is -100 counts for neither term, one without a target not for the first: `targets` are the
positions of the step that have one, `items` those that have a label. Both terms, all temperatures and all figures come
out of one pass over the tiles.

`PositionWeights` gives a_t, how much the distillation term of a position counts, from the entropy H of the teacher's
whole distribution there at T = 1, which the targets must know (of several teachers, the mean of theirs by weight):

    none                  1
    confidence            1 - H / log V: 1 where the teacher is certain, 0 where its distribution is uniform
    entropy-gate:LO:HI    1 where LO <= H <= HI nats, 0 elsewhere; either may be left out

They do not change the divisors, so that sums add up across micro-batches and ranks; the label term is not weighed.

Shapes: N positions, M positions that count, V vocabulary, D hidden, K entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import ConfigError, TargetError
from kdcache.known import Known
from kdcache.losses.divergences import find_divergence
from kdcache.losses.fused_linear import StudentTile, View, eager, fused_loss
from kdcache.losses.logit_sources import LinearHead, LogitSource, StoredLogits
from kdcache.losses.pool import Pool
from kdcache.losses.position_metrics import Figures
from kdcache.losses.target_losses import (
    TAILS,
    BucketLoss,
    PooledLoss,
    TargetLoss,
    dense_loss,
    pooled_loss,
    sampled_loss,
    truncated_loss,
    warn_once,
)
from kdcache.losses.union import Union
from kdcache.rows import IGNORE
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
            return (1 - self._entropy(targets) / math.log(vocab)).clamp(0, 1)
        (low, high), entropy = self._gate(), self._entropy(targets)
        return ((entropy >= low) & (entropy <= high)).to(entropy.dtype)

    def _entropy(self, targets: SparseTargets | Pool) -> Tensor:
        return targets.require("entropy", f"the rule of position weights {self.rule}")

    def require_known(self, known: Known) -> None:
        """Refuse a cache that does not know what the rule needs.

        Raises:
            ConfigError: it does not know the entropy.
        """
        if self.rule != "none":
            known.require("entropy", f"the rule of position weights {self.rule}")

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


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a step minimises, checked when built.

    Attributes:
        loss: name of a divergence, with its constant if it has one: `jsd:0.9`.
        tail: what is made of the mass that truncated targets did not keep; see `losses.target_losses`.
        temperature: T of the distillation term.
        soft_weight: weight of the distillation term; the label term gets the rest.

    Raises:
        ConfigError: an unknown name, or a value out of range.
    """

    loss: str = "forward-kl"
    tail: str = "bucket"
    temperature: float = 1.0
    soft_weight: float = 1.0

    def __post_init__(self) -> None:
        find_divergence(self.loss)
        if self.tail not in TAILS:
            raise ConfigError(f"tail {self.tail!r} is not one of {', '.join(TAILS)}")
        if self.tail != "bucket" and self.loss != "forward-kl":
            raise ConfigError(f"tail {self.tail!r} is for loss 'forward-kl' only; {self.loss} takes tail 'bucket'")
        if not self.temperature > 0:
            raise ConfigError(f"temperature {self.temperature:g} is not positive")
        if self.tail == "label-sample" and self.temperature != 1:
            raise ConfigError(
                f"tail 'label-sample' is for temperature 1, not {self.temperature:g}: labels follow p, not p_T"
            )
        if not 0 <= self.soft_weight <= 1:
            raise ConfigError(f"soft_weight is {self.soft_weight:g}, outside [0, 1]")

    @property
    def scale(self) -> float:
        """The factor of the distillation term: soft_weight times T to the power that keeps the gradient's size."""
        return float(self.soft_weight * self.temperature ** find_divergence(self.loss).temperature_power)

    def require_fit(self, kind: str, sampled: bool, sample_temperature: float) -> None:
        """Refuse what targets of a sampled kind cannot give.

        Args:
            kind: its name.
            sampled: whether it is sampled.
            sample_temperature: T that it was drawn at.

        Raises:
            TargetError: a divergence, tail or temperature that their weights say nothing of.
        """
        if not sampled:
            return
        if self.loss != "forward-kl":
            raise TargetError(
                f"loss {self.loss!r} needs the teacher's probabilities, but {kind} targets hold random weights, whose "
                "logarithm or absolute value is biased; use forward-kl, or a cache of topk targets"
            )
        if self.tail != "bucket":
            raise TargetError(f"tail {self.tail!r} is for truncated targets; {kind} targets have no tail")
        if self.temperature != sample_temperature:
            raise TargetError(
                f"{kind} targets drawn at temperature {sample_temperature:g} say nothing of temperature "
                f"{self.temperature:g}: their weights cannot be softened without bias"
            )

    def target_loss(self, pool: Pool, labels: Tensor | None, vocab: int) -> PooledLoss:
        """What the teachers ask of the student."""
        several = len(pool.targets) > 1
        if several and pool.keeps_everything(vocab):  # then every tail is the same: nothing
            return dense_loss(pool, find_divergence(self.loss), self.temperature, labels, vocab)
        if several and not pool.targets[0].sampled:
            warn_once("pool", _TRUNCATED_POOL)
        return pooled_loss(pool, lambda targets: self._target_loss_of_one(targets, labels, vocab), labels, vocab)

    def _target_loss_of_one(self, targets: SparseTargets, labels: Tensor | None, vocab: int) -> TargetLoss:
        self.require_fit(targets.kind, targets.sampled, targets.sample_temperature)
        if targets.sampled:
            return sampled_loss(targets)
        if self.tail == "bucket":
            return BucketLoss.of(targets, find_divergence(self.loss), self.temperature)
        return truncated_loss(targets, self.tail, self.temperature, labels, vocab)


_TRUNCATED_POOL = (
    "truncated targets of several teachers are not pooled: their losses are added, and where the teachers keep "
    "different entries the optimum is not the pool's; full targets pool exactly, sampled ones without bias"
)


@dataclass(frozen=True)
class _Term:
    """One summand of the loss at each position, and its factor."""

    factor: Tensor  # [M]
    losses: Callable[[StudentTile, slice], Tensor]

    def summands(self, student: StudentTile, rows: slice) -> Tensor:
        return self.factor[rows] * self.losses(student, rows)


def _label_losses(student: StudentTile, rows: slice) -> Tensor:  # noqa: ARG001 - a term's signature
    return student.lse - student.gathered[:, -1]


@eager
def distil(
    source: LogitSource,
    targets: SparseTargets | Pool,
    labels: Tensor | None,
    objective: Objective,
    *,
    num_items: Tensor | float | None = None,
    num_targets: Tensor | float | None = None,
    position_weights: Tensor | None = None,
    figures: Figures | None = None,
) -> Tensor:
    """The loss of a step; `sparse_kd_loss` says what each argument means.

    Args:
        figures: filled with figures of the M positions that count, at T = 1; needs labels.
    """
    soft, hard = objective.soft_weight > 0, objective.soft_weight < 1 and labels is not None
    if not soft and not hard:
        raise ConfigError("nothing to learn from: soft_weight is 0 and no labels were given")
    pool = Pool.of(targets)
    for name, given in (("targets", pool.count), ("labels", labels), ("position_weights", position_weights)):
        if given is not None and given.shape != (source.positions,):
            raise TargetError(
                f"{name} are of shape {tuple(given.shape)}, but the student has {source.positions} positions"
            )
    has_target = pool.count > 0
    labelled = torch.ones_like(has_target) if labels is None else labels != IGNORE
    keep = labelled if hard else labelled & has_target
    index = None if bool(keep.all()) else keep.nonzero()[:, 0]
    counted, counted_labels = (
        (pool, labels) if index is None else (pool[index], None if labels is None else labels[index])
    )
    has_target = counted.count > 0

    def share(counts: Tensor, scale: float, given: Tensor | float | None) -> Tensor:
        return counts.to(source.dtype) * scale / (counts.sum().clamp(min=1) if given is None else given)

    at: dict[float, list[_Term]] = {}
    target_loss = objective.target_loss(counted, counted_labels, source.vocab) if soft else None
    union = Union.of(counted.targets, counted_labels, source.vocab) if target_loss is None else target_loss.union
    if target_loss is not None:
        factor = share(has_target, objective.scale, num_items if num_targets is None else num_targets)
        if position_weights is not None:
            factor = factor * (position_weights if index is None else position_weights[index])
        at.setdefault(objective.temperature, []).append(_Term(factor, target_loss.losses))
    if hard:
        factor = share(torch.ones_like(has_target), 1 - objective.soft_weight, num_items)
        at.setdefault(1.0, []).append(_Term(factor, _label_losses))
    look: Any = None
    if figures is not None and counted_labels is not None:
        at.setdefault(1.0, [])
        look = figures.over(counted, union)
    views = [
        View(
            temperature,
            union.ids,
            union.kept,
            _sum_of(terms),
            look if temperature == 1 else None,
            target_loss is not None and target_loss.tail_mean and temperature == objective.temperature,
        )
        for temperature, terms in at.items()
    ]
    return fused_loss(source, views, index)


def _sum_of(terms: list[_Term]) -> Callable[[StudentTile, slice], Tensor] | None:
    if not terms:
        return None
    first, *rest = terms

    def total(student: StudentTile, rows: slice) -> Tensor:
        value = first.summands(student, rows)
        for term in rest:
            value = value + term.summands(student, rows)
        return value

    return total


@eager
def sparse_kd_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: SparseTargets | Pool,
    *,
    labels: Tensor | None = None,
    loss: str = "forward-kl",
    tail: str = "bucket",
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    bias: Tensor | None = None,
    num_items: Tensor | float | None = None,
    num_targets: Tensor | float | None = None,
    position_weights: Tensor | None = None,
    vocab_size: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Distillation loss of a student with a linear head, without its logits in memory.

    `soft_weight * T^2 * D(teacher_T, student_T) + (1 - soft_weight) * cross-entropy(label)`, D being the divergence
    that `loss` names, and T instead of T^2 for `tvd`. For sampled targets D is an unbiased estimate of the
    cross-entropy with the teacher: the forward KL and a constant.

    The gradient is made along with the value: call it where a gradient is not wanted under `torch.no_grad()`.

    Args:
        hidden: `[N, D]` the student's last hidden states.
        weight: `[V, D]` its output head.
        targets: SparseTargets over the same N positions, or a `Pool` of those of several teachers: exact where they
            keep everything, unbiased where they are sampled; of truncated ones the losses are added, which warns once.
        labels: `[N]` true next tokens; a position whose label is -100 counts for neither term.
        loss: `forward-kl`, `reverse-kl`, `skew-kl`, `skew-reverse-kl`, `jsd`, `tvd`, or a name given to
            `register_divergence`; `skew-kl:0.2` sets its constant. Sampled targets: `forward-kl` only.
        tail: what truncated targets make of the mass that they did not keep. `bucket`: one more outcome, its mass
            known exactly. For `forward-kl` also `none`, `renormalise`, `label`, `label-sample`, `uniform`, for the sake
            of recipes that were published; all but `label-sample` are biased. Sampled targets have no tail.
        temperature: T; it must be one that the targets store, unless they keep everything; for sampled targets,
            the one that they were drawn at.
        soft_weight: weight of the distillation term; the label term gets the rest.
        bias: `[V]`, optional.
        num_items: divisor of both sums, for accumulation over micro-batches and ranks; by default
            each term is divided by its own number of positions.
        num_targets: divisor of the distillation term, where fewer positions have a target than have a label; by
            default `num_items`.
        position_weights: `[N]` factors of the distillation term of each position; they do not change the divisor.
        vocab_size: ids of the cache, if the head has more rows than that (padding): the rest do not exist.
        logit_scale: a constant factor of the logits, where the model has one.
        softcap: cap of the logits `cap * tanh(logits / cap)`, where the model has one; applied after the scale.

    Returns:
        A scalar, nats.

    Raises:
        TargetError: the targets cannot give that divergence or temperature exactly.
        ConfigError: an unknown loss or tail, or a weight outside [0, 1].
    """
    objective = Objective(loss=loss, tail=tail, temperature=temperature, soft_weight=soft_weight)
    source = LinearHead(hidden, weight, bias, vocab=vocab_size, scale=logit_scale, softcap=softcap)
    return distil(
        source, targets, labels, objective,
        num_items=num_items, num_targets=num_targets, position_weights=position_weights,
    )  # fmt: skip


@eager
def sparse_kd_loss_from_logits(
    logits: Tensor,
    targets: SparseTargets | Pool,
    *,
    labels: Tensor | None = None,
    loss: str = "forward-kl",
    tail: str = "bucket",
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    num_items: Tensor | float | None = None,
    num_targets: Tensor | float | None = None,
    position_weights: Tensor | None = None,
) -> Tensor:
    """`sparse_kd_loss` for a student whose logits `[N, V]` exist, cut to the cache's vocabulary."""
    objective = Objective(loss=loss, tail=tail, temperature=temperature, soft_weight=soft_weight)
    return distil(
        StoredLogits(logits), targets, labels, objective,
        num_items=num_items, num_targets=num_targets, position_weights=position_weights,
    )  # fmt: skip
