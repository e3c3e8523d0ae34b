"""The loss of a distillation step: divergences, label cross-entropy, temperature and weights, summed and divided once.

    soft_weight * sum_t a_t sum_i w_i T^n_i D_i(teacher_T, student_T) / targets
        + (1 - soft_weight) * sum_t CE(label) / items

The sum over i is that of the terms of the loss, most often one of weight 1. T^n, n = 2 (1 for `tvd`), keeps the
gradient's size as T grows (Hinton et al. 2015, arXiv 1503.02531, section 2.1).
A position whose label is -100 counts for neither term, one without a target not for the first: `targets` are the
positions of the step that have one, `items` those that have a label. All terms, all temperatures and all figures come
out of one pass over the tiles.

The weights a_t of positions are those of `position_weights`. They change neither divisor.

Shapes: N positions, M positions that count, V vocabulary, D hidden, K entries.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.aligned_targets import AlignedTargets
from kdcache.errors import ConfigError, TargetError
from kdcache.losses.aligned_losses import ChunkLoss, SortedLoss, read_aligned, weight_in_common
from kdcache.losses.divergence_registry import (
    ALM,
    GOLD,
    ULD,
    Divergence,
    DivergenceFunction,
    LossTerm,
    find_divergence,
    read_terms,
)
from kdcache.losses.fused_linear import StudentTile, View, eager, fused_loss
from kdcache.losses.given_faults import require_sound
from kdcache.losses.logit_sources import LinearHead, LogitSource, StoredLogits
from kdcache.losses.pool import Pool
from kdcache.losses.position_metrics import Figures
from kdcache.losses.position_weights import PositionWeights
from kdcache.losses.rollout_loss import RolloutLoss, read_clip
from kdcache.losses.target_losses import (
    LINEAR_TAILS,
    TAILS,
    ZERO_TAILS,
    PooledLoss,
    TargetLoss,
    dense_loss,
    linear_loss,
    outcome_loss,
    pooled_loss,
    sampled_loss,
    warn_once,
)
from kdcache.losses.union import Union
from kdcache.rows import IGNORE
from kdcache.targets import SparseTargets


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a step minimises, checked when built.

    Attributes:
        loss: name of a divergence, with its constants if it has any: `jsd:0.9`; or several, each with its weight:
            `forward-kl*0.7+jsd:0.5*0.3`.
        tail: what is made of the mass that truncated targets did not keep; see `losses.target_losses`.
        temperature: T of the distillation term.
        soft_weight: weight of the distillation term; the label term gets the rest.

    Raises:
        ConfigError: an unknown name, a value out of range, or a loss and a tail that do not go together.
    """

    loss: str = "forward-kl"
    tail: str = "bucket"
    temperature: float = 1.0
    soft_weight: float = 1.0

    def __post_init__(self) -> None:
        divergences = self._divergences()
        if self.tail not in TAILS:
            raise ConfigError(f"tail {self.tail!r} is not one of {', '.join(TAILS)}")
        for name, divergence in divergences.items():
            self._require_tail(name, divergence)
        for term, name, _ in self._aligned_terms():
            if self.tail != "bucket":
                raise ConfigError(f"loss {term.name!r} takes tail 'bucket' only")
            if name == ALM and self.temperature != 1:
                raise ConfigError(
                    f"loss {term.name!r} compares likelihoods of text, at temperature 1, not {self.temperature:g}"
                )
        if not divergences and self.tail != "bucket":
            raise ConfigError(f"tail {self.tail!r} is not for loss {self.loss!r}, which uses no entries and no tail")
        if not self.temperature > 0:
            raise ConfigError(f"temperature {self.temperature:g} is not positive")
        if self.tail == "label-sample" and self.temperature != 1:
            raise ConfigError(
                f"tail 'label-sample' is for temperature 1, not {self.temperature:g}: labels follow p, not p_T"
            )
        if not 0 <= self.soft_weight <= 1:
            raise ConfigError(f"soft_weight is {self.soft_weight:g}, outside [0, 1]")

    def _require_tail(self, name: str, divergence: Divergence) -> None:
        if self.tail in LINEAR_TAILS and name != "forward-kl":
            raise ConfigError(f"tail {self.tail!r} is for loss 'forward-kl' only; {name} takes tail 'bucket'")
        if divergence.takes_label and self.tail != "bucket":
            raise ConfigError(f"loss {name!r} has the label as an outcome of its own and takes tail 'bucket' only")
        if self.tail in ZERO_TAILS and not divergence.zero_tail:
            raise ConfigError(
                f"tail {self.tail!r} gives the ids that are not entries no probability, which loss {name!r} does not "
                "allow; use tail 'bucket' or 'renormalise-both'"
            )

    def _divergences(self) -> dict[str, Divergence]:
        """The divergences among the terms, by name."""
        names = (term.name for term in self._terms())
        return {name: find_divergence(name) for name in names if read_clip(name) is None and not read_aligned(name)}

    def _aligned_terms(self) -> Iterator[tuple[LossTerm, str, tuple[float, ...]]]:
        """The terms `uld`, `gold` and `alm`, each with its constants."""
        for term in self._terms():
            if (found := read_aligned(term.name)) is not None:
                yield term, *found

    def _terms(self) -> Iterator[LossTerm]:
        """Terms that count."""
        return (term for term in read_terms(self.loss) if term.weight > 0)

    @property
    def any_temperature(self) -> bool:
        """Whether truncated targets give the loss at temperatures that they do not store."""
        return self.tail in ("renormalise", "renormalise-both") and not self.takes_rollouts

    @property
    def takes_rollouts(self) -> bool:
        """Whether it needs the log-probability that the writer of the text gave each label."""
        return any(read_clip(term.name) is not None for term in self._terms())

    @property
    def takes_chunks(self) -> bool:
        """Whether it needs all labels of a chunk of text at once."""
        return any(name == ALM for _, name, _ in self._aligned_terms())

    @property
    def takes_entries(self) -> bool:
        """Whether it needs the teacher's entries, and not the likelihood of chunks alone."""
        return bool(self._divergences()) or any(name != ALM for _, name, _ in self._aligned_terms())

    @property
    def takes_label_entry(self) -> bool:
        """Whether it needs the label among the teacher's ids."""
        return self.takes_rollouts or any(each.takes_label for each in self._divergences().values())

    @property
    def takes_label_logprob(self) -> bool:
        """Whether it needs the teacher's log-probability of each label."""
        return self.takes_label_entry or self.takes_chunks

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
        for name in self._divergences():
            if name != "forward-kl":
                raise TargetError(
                    f"loss {name!r} needs the teacher's probabilities, but {kind} targets hold random weights, whose "
                    "logarithm or absolute value is biased; use forward-kl, or a cache of topk targets"
                )
        for term, name, _ in self._aligned_terms():
            if name != ALM:
                raise TargetError(
                    f"loss {term.name!r} needs the teacher's probabilities, but {kind} targets hold random weights; "
                    "use alm, or a cache of topk targets"
                )
        if self.tail != "bucket":
            raise TargetError(f"tail {self.tail!r} is for truncated targets; {kind} targets have no tail")
        if self._divergences() and self.temperature != sample_temperature:
            raise TargetError(
                f"{kind} targets drawn at temperature {sample_temperature:g} say nothing of temperature "
                f"{self.temperature:g}: their weights cannot be softened without bias"
            )

    def target_loss(
        self, pool: Pool, labels: Tensor | None, vocab: int, writer_logp: Tensor | None = None
    ) -> PooledLoss:
        """What the teachers ask of the student.

        Args:
            pool: their targets, at M positions.
            labels: `[M]` true next tokens, if they are known.
            vocab: V.
            writer_logp: `[M]` log-probability that the writer of the text gave each label, for a loss on rollouts.

        Raises:
            ConfigError: labels or writer_logp are missing.
            TargetError: the targets cannot give the loss exactly.
        """
        if labels is None and self.takes_label_logprob:
            raise ConfigError(f"loss {self.loss!r} needs labels")
        several = len(pool.targets) > 1 and bool(self._divergences())
        if several and pool.keeps_everything(vocab):  # then every tail is the same: nothing
            function = self._sum_of(self._divergences())
            found = dense_loss(pool, function, self.temperature, labels, vocab)
        else:
            if several and not pool.targets[0].sampled:
                warn_once("pool", _TRUNCATED_POOL)
            found = pooled_loss(pool, lambda targets: self._losses_of_one(targets, labels, vocab), labels, vocab)
        if self.takes_chunks:
            found = dataclasses.replace(found, parts=(*found.parts, *self._chunk_losses(pool)))
        if not self.takes_rollouts:
            return found
        more = [
            (number, weight, self._rollout_loss(term, clip, targets, writer_logp))
            for number, (targets, weight) in enumerate(zip(pool.targets, pool.present, strict=True))
            for term in self._terms()
            if (clip := read_clip(term.name)) is not None
        ]
        return dataclasses.replace(found, parts=(*found.parts, *more))

    def _chunk_losses(self, pool: Pool) -> Iterator[tuple[int, Tensor, ChunkLoss]]:
        for number, (targets, weight) in enumerate(zip(pool.targets, pool.weights, strict=True)):
            for term, name, constants in self._aligned_terms():
                if name == ALM:
                    some = torch.full_like(targets.weights[..., 0], weight)
                    yield number, some, ChunkLoss.of(targets, constants[0], term.weight)

    def sorted_losses(self, pool: Pool, vocab: int) -> Iterator[tuple[Tensor, SortedLoss]]:
        """`[M]` weights of the losses that compare by rank, and these losses.

        Args:
            pool: targets of the teachers, at M positions.
            vocab: V.

        Raises:
            TargetError: the targets cannot give the loss exactly.
        """
        for targets, weight in zip(pool.targets, pool.weights, strict=True):
            for term, name, constants in self._aligned_terms():
                factor, found = term.weight * self.temperature, None
                if name == ULD:
                    found = SortedLoss.uld(targets, self.temperature, factor, vocab)
                elif name == GOLD:
                    rest = factor * (1 - weight_in_common(constants, targets))
                    found = SortedLoss.gold(targets, self.temperature, rest, vocab) if rest else None
                if found is not None:
                    yield torch.where(targets.has_target, weight, 0.0).to(targets.weights.dtype), found

    def _rollout_loss(
        self, term: LossTerm, clip: float, targets: SparseTargets, writer_logp: Tensor | None
    ) -> RolloutLoss:
        return RolloutLoss.of(targets, self.temperature, writer_logp, clip, term.weight * self.temperature**2)

    def _losses_of_one(self, targets: SparseTargets, labels: Tensor | None, vocab: int) -> Iterator[TargetLoss]:
        """The losses of one teacher's divergences: of those that take the label, of the others, or of neither."""
        self.require_fit(targets.kind, targets.sampled, targets.sample_temperature)
        divergences = self._divergences()
        if targets.sampled or self.tail in LINEAR_TAILS:
            if divergences:
                factor = sum(self._factor(term) for term in self._terms() if term.name in divergences)
                if targets.sampled:
                    yield sampled_loss(targets, factor)
                else:
                    yield linear_loss(targets, self.tail, self.temperature, labels, vocab, factor)
            return
        for takes_label in (False, True):
            some = {name: each for name, each in divergences.items() if each.takes_label == takes_label}
            if some:
                function = self._sum_of(some)
                yield outcome_loss(targets, function, self.tail, self.temperature, labels, takes_label)
        for term, name, constants in self._aligned_terms():
            weight = weight_in_common(constants, targets) if name == GOLD else 0.0
            if weight:
                jsd = LossTerm("jsd", term.weight * weight)
                function = functools.partial(_scaled, find_divergence(jsd.name).function, self._factor(jsd))
                yield outcome_loss(targets, function, self.tail, self.temperature, labels, False)

    def _factor(self, term: LossTerm) -> float:
        """A term's weight, and T to the power that keeps its gradient's size."""
        return float(term.weight * self.temperature ** find_divergence(term.name).temperature_power)

    def _sum_of(self, divergences: dict[str, Divergence]) -> DivergenceFunction:
        """The terms of some divergences as one."""
        parts = [
            (self._factor(term), divergences[term.name].function) for term in self._terms() if term.name in divergences
        ]

        def total(*given: Any) -> Tensor:
            return torch.stack([factor * function(*given) for factor, function in parts]).sum(0)

        return total


def _scaled(function: DivergenceFunction, factor: float, *given: Any) -> Tensor:
    return factor * function(*given)


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
    position_weights: Tensor | PositionWeights | None = None,
    figures: Figures | None = None,
    writer_logp: Tensor | None = None,
) -> Tensor:
    """The loss of a step; `sparse_kd_loss` says what each argument means.

    Args:
        figures: filled with figures of the M positions that count, at T = 1; needs labels.
    """
    soft, hard = objective.soft_weight > 0, objective.soft_weight < 1 and labels is not None
    if not soft and not hard:
        raise ConfigError("nothing to learn from: soft_weight is 0 and no labels were given")
    pool = Pool.of(targets)
    rule = position_weights if isinstance(position_weights, PositionWeights) else None
    fixed = position_weights if isinstance(position_weights, Tensor) else None
    if rule is not None:
        fixed = rule.of(targets, source.vocab)
    given_of = {"targets": pool.count, "labels": labels, "position_weights": fixed, "writer_logp": writer_logp}
    for name, given in given_of.items():
        if given is not None and given.shape != (source.positions,):
            raise TargetError(
                f"{name} are of shape {tuple(given.shape)}, but the student has {source.positions} positions"
            )
    has_target = pool.has_target
    labelled = torch.ones_like(has_target) if labels is None else labels != IGNORE
    keep = labelled if hard or objective.takes_chunks else labelled & has_target
    index = None if bool(keep.all()) else keep.nonzero()[:, 0]
    counted = pool if index is None else pool[index]
    counted_labels, fixed, writer_logp = (
        given if given is None or index is None else given[index] for given in (labels, fixed, writer_logp)
    )
    has_target = counted.has_target

    def share(counts: Tensor, scale: float, given: Tensor | float | None) -> Tensor:
        return counts.to(source.dtype) * scale / (counts.sum().clamp(min=1) if given is None else given)

    at: dict[float, list[_Term]] = {}
    target_loss = objective.target_loss(counted, counted_labels, source.vocab, writer_logp) if soft else None
    union = Union.of(counted.targets, counted_labels, source.vocab) if target_loss is None else target_loss.union
    looks: list[Callable[[StudentTile, slice], None]] = []  # at T = 1
    weighing = target_loss is not None and rule is not None and rule.of_student
    if target_loss is not None:
        factor = share(has_target, objective.soft_weight, num_items if num_targets is None else num_targets)
        losses = target_loss.losses
        if fixed is not None:
            factor = factor * fixed
        if weighing and rule is not None:
            student_weights = torch.zeros_like(factor)
            looks.append(lambda student, rows: _weigh(rule, student, source.vocab, student_weights[rows]))
            losses = _Weighed(losses, student_weights).losses
            at[1.0] = []  # first, so that a tile's weights are there before its loss is made
        if target_loss.parts:
            at.setdefault(objective.temperature, []).append(_Term(factor, losses))
        factor_of_targets = factor
    if hard:
        factor = share(torch.ones_like(has_target), 1 - objective.soft_weight, num_items)
        at.setdefault(1.0, []).append(_Term(factor, _label_losses))
    if figures is not None and counted_labels is not None:
        at.setdefault(1.0, [])
        looks.append(figures.over(counted, union))
    inside = _inside(counted) if soft and objective.takes_chunks else None
    views = [
        View(
            temperature,
            union.ids,
            union.kept,
            _sum_of(terms),
            _all_of(looks) if temperature == 1 else None,
            target_loss is not None and target_loss.tail_mean and temperature == objective.temperature,
            weighing and temperature == 1,
        )
        for temperature, terms in at.items()
    ]
    if soft:
        for weights, by_rank in objective.sorted_losses(counted, source.vocab):
            losses = _Weighed(by_rank.losses, student_weights).losses if weighing else by_rank.losses
            term = _Term(factor_of_targets * weights, losses)
            views.append(View(objective.temperature, union.ids, loss=term.summands, pick=by_rank.pick))
    return fused_loss(source, views, index, inside)


def _inside(pool: Pool) -> Tensor | None:
    """`[M]` bool: positions inside a chunk that begins before them; None where each label is a chunk."""
    (targets,) = pool.targets if len(pool.targets) == 1 else (None,)
    return targets.inside if isinstance(targets, AlignedTargets) else None


def _weigh(rule: PositionWeights, student: StudentTile, vocab: int, out: Tensor) -> None:
    """Put the weights of a tile's positions, from the student's entropy there, into `out` `[n]`."""
    assert student.entropy is not None
    out.copy_(rule.at(student.entropy, vocab))


@dataclass(frozen=True)
class _Weighed:
    """Losses of each position times weights that are known when they are asked for."""

    of: Callable[[StudentTile, slice], Tensor]
    weights: Tensor  # [M]

    def losses(self, student: StudentTile, rows: slice) -> Tensor:
        return self.weights[rows] * self.of(student, rows)


def _all_of(looks: list[Callable[[StudentTile, slice], None]]) -> Callable[[StudentTile, slice], None] | None:
    if not looks:
        return None

    def look(student: StudentTile, rows: slice) -> None:
        for each in looks:
            each(student, rows)

    return look


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
    position_weights: Tensor | PositionWeights | None = None,
    vocab_size: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    writer_logp: Tensor | None = None,
) -> Tensor:
    """Distillation loss of a student with a linear head, without its logits in memory.

    `soft_weight * T^2 * D(teacher_T, student_T) + (1 - soft_weight) * cross-entropy(label)`, D being the divergence
    that `loss` names, or a weighted sum of several, and T instead of T^2 for `tvd`. For sampled targets D is an
    unbiased estimate of the cross-entropy with the teacher: the forward KL and a constant.

    The gradient is made along with the value: call it where a gradient is not wanted under `torch.no_grad()`.

    Args:
        hidden: `[N, D]` the student's last hidden states.
        weight: `[V, D]` its output head.
        targets: SparseTargets over the same N positions, or a `Pool` of those of several teachers: exact where they
            keep everything, unbiased where they are sampled; of truncated ones the losses are added, which warns once.
        labels: `[N]` true next tokens; a position whose label is -100 counts for neither term.
        loss: `forward-kl`, `reverse-kl`, `skew-kl`, `skew-reverse-kl`, `jsd`, `tvd`, `adaptive-kl`, `alpha-beta`,
            `decoupled-kl`, `tail-kl`, `sampled-reverse-kl`, or a name given to `register_divergence`; `skew-kl:0.2`
            sets a constant, and `forward-kl*0.7+jsd:0.5*0.3` is a sum by weights. Sampled targets: `forward-kl` and
            `sampled-reverse-kl` only.
        tail: what truncated targets make of the mass that they did not keep. `bucket`: one more outcome, its mass
            known exactly. `renormalise-both`: nothing, both sides are normalised over the entries. The others are for
            the sake of recipes that were published: `none`, `label-sample` and `uniform` for `forward-kl`,
            `renormalise` and `label` for `forward-kl`, `skew-kl`, `skew-reverse-kl`, `jsd` and `tvd`; all but
            `label-sample` are biased. Sampled targets have no tail.
        temperature: T; it must be one that the targets store, unless they keep everything or the tail is
            `renormalise` or `renormalise-both`; for sampled targets, the one that they were drawn at.
        soft_weight: weight of the distillation term; the label term gets the rest.
        bias: `[V]`, optional.
        num_items: divisor of both sums, for accumulation over micro-batches and ranks; by default
            each term is divided by its own number of positions.
        num_targets: divisor of the distillation term, where fewer positions have a target than have a label; by
            default `num_items`.
        position_weights: `[N]` factors of the distillation term of each position, or the rule that gives them; they
            do not change the divisor.
        vocab_size: ids of the cache, if the head has more rows than that (padding): the rest do not exist.
        logit_scale: a constant factor of the logits, where the model has one.
        softcap: cap of the logits `cap * tanh(logits / cap)`, where the model has one; applied after the scale.
        writer_logp: `[N]` log-probability that the writer of the text gave each label, for `sampled-reverse-kl`.

    Returns:
        A scalar, nats.

    Raises:
        TargetError: the targets cannot give that divergence or temperature exactly, name an id twice, or name one
            that is not in the vocabulary; or a label is not in it.
        ConfigError: an unknown loss or tail, or a weight outside [0, 1].
    """
    objective = Objective(loss=loss, tail=tail, temperature=temperature, soft_weight=soft_weight)
    source = LinearHead(hidden, weight, bias, vocab=vocab_size, scale=logit_scale, softcap=softcap)
    require_sound(Pool.of(targets), labels, source.vocab)
    return distil(
        source, targets, labels, objective, num_items=num_items, num_targets=num_targets,
        position_weights=position_weights, writer_logp=writer_logp,
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
    position_weights: Tensor | PositionWeights | None = None,
    writer_logp: Tensor | None = None,
) -> Tensor:
    """`sparse_kd_loss` for a student whose logits `[N, V]` exist, cut to the cache's vocabulary."""
    objective = Objective(loss=loss, tail=tail, temperature=temperature, soft_weight=soft_weight)
    source = StoredLogits(logits)
    require_sound(Pool.of(targets), labels, source.vocab)
    return distil(
        source, targets, labels, objective, num_items=num_items, num_targets=num_targets,
        position_weights=position_weights, writer_logp=writer_logp,
    )  # fmt: skip
