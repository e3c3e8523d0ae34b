"""Position metrics: how a student does at each position, at T = 1, from the same tiles as its loss.

    nll             of the true next token, nats
    log_partition   log sum_v e^(z_v) of the student's logits: it drifts before a training diverges
    kept_mass       the student's mass on the entries; the teacher's is one minus its tail
    top1_agreement  1 where the teacher's most likely entry is the student's most likely token
    kl              forward KL with the tail as one bucket, a lower bound; for targets sampled at T = 1 an unbiased
                    estimate, which may be negative; absent if they were sampled at another temperature, or do not
                    know the entropy
    has_target      1 where there is a target; `TEACHER_FIGURES` are 0 where there is none
    kl/2, kl/3, ... the same of the other teachers of a pool, and has_target/2, ...; all else is of its first

Guarantee: no gradient, nothing averaged: sums over positions add up across micro-batches and ranks.
Cost: operations on `[n, K]`, where the loss is at T = 1 or has a label term; else one more exponential of each tile.

Shapes: N positions, n positions of a tile, V vocabulary, K entries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kdcache.losses.divergence_registry import find_divergence
from kdcache.losses.fused_linear import StudentTile, View, fused_loss
from kdcache.losses.logit_sources import LogitSource, StoredLogits
from kdcache.losses.pool import Pool
from kdcache.losses.target_losses import OutcomeLoss, TargetLoss, sampled_loss
from kdcache.losses.union import Union
from kdcache.targets import SparseTargets

TEACHER_FIGURES = ("kept_mass", "top1_agreement", "kl", "teacher_nll", "acceptance_low", "acceptance_high")
"""Those that compare with a target: their mean is over the positions that have one."""


TileMetric = Callable[[StudentTile, Any], dict[str, Tensor]]
"""`(student, targets) -> {name: [n]}`: further figures, of what a tile knows of a student, whose last gathered id is
the label, and of the `SparseTargets` there, or None where it is called without targets."""


class Figures:
    """A collector of figures, position by position, in order.

    Args:
        more: further figures, of the first teacher.
    """

    def __init__(self, more: Sequence[TileMetric] = ()) -> None:
        self._more = tuple(more)
        self._parts: list[dict[str, Tensor]] = []

    def over(self, pool: Pool, union: Union) -> Callable[[StudentTile, slice], None]:
        """What a view over a union of a pool's entries calls on each tile; the last id it gathers is the label."""
        target_losses = [_kl_of(targets) for targets in pool.targets]
        first = pool.targets[0]

        def look(whole: StudentTile, rows: slice) -> None:
            student, held = union.view(0, whole, rows), first[rows]
            entries = student.gathered[:, : held.ids.shape[-1]]
            best = entries.gather(-1, held.weights.argmax(-1, keepdim=True))[:, 0]
            kept = torch.where(held.valid, entries, -torch.inf)
            found = {
                "nll": student.lse - student.gathered[:, -1],
                "log_partition": student.origin + student.lse,
                "kept_mass": (kept.logsumexp(-1) - student.lse).exp(),
                "top1_agreement": (best >= torch.maximum(kept.amax(-1), student.peak)).to(best.dtype),
            }
            for metric in self._more:
                found |= metric(student, held)
            for name in found.keys() & TEACHER_FIGURES:
                found[name] = torch.where(held.count > 0, found[name], 0.0)
            for number, (targets, target_loss) in enumerate(zip(pool.targets, target_losses, strict=True)):
                has_target = targets.count[rows] > 0
                found[of_teacher("has_target", number)] = has_target.to(student.lse.dtype)
                if target_loss is not None:
                    kl = target_loss.losses(union.view(number, whole, rows), rows)
                    if targets.sampled:
                        kl = kl - targets.require("entropy", "its kl")[rows]
                    found[of_teacher("kl", number)] = torch.where(has_target, kl, 0.0)
            self._parts.append(found)

        return look

    def values(self) -> dict[str, Tensor]:
        """`[N]` each figure; empty if no position was looked at."""
        if not self._parts:
            return {}
        return {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}


def of_teacher(figure: str, number: int) -> str:
    """The name of a figure of a teacher of a pool, counted from 0: `kl` of the first, `kl/2` of the second."""
    return figure if number == 0 else f"{figure}/{number + 1}"


def divisor_of(figure: str) -> str | None:
    """What the mean of a figure is over: `has_target` of the same teacher, or `positions`; None for these two."""
    name, slash, number = figure.partition("/")
    if name in ("has_target", "positions"):
        return None
    return f"has_target{slash}{number}" if name in TEACHER_FIGURES else "positions"


def _kl_of(targets: SparseTargets) -> TargetLoss | None:
    """What `kl` is made of, if the targets know it."""
    if not targets.sampled:
        return OutcomeLoss.bucket(targets, find_divergence("forward-kl").function, 1.0)
    return sampled_loss(targets) if targets.sample_temperature == 1 and targets.entropy is not None else None


@torch.no_grad()
def measure(
    source: LogitSource, targets: SparseTargets | Pool, labels: Tensor, more: Sequence[TileMetric] = ()
) -> dict[str, Tensor]:
    """Figures of a student over positions that each have a label.

    Args:
        source: where its logits come from; N positions.
        targets: over the same positions; some may have none.
        labels: `[N]` true next tokens, none masked.
        more: further figures.

    Returns:
        `[N]` each: the figures above, those of `more`, and `teacher_nll` of the label, absent if unknown; of the others
        `teacher_nll/2` and so on.
    """
    figures, pool = Figures(more), Pool.of(targets)
    union = Union.of(pool.targets, labels, source.vocab)
    fused_loss(source, [View(1.0, union.ids, union.kept, look=figures.over(pool, union))])
    nll = {
        of_teacher("teacher_nll", number): torch.where(each.count > 0, -each.label_logprob, 0.0)
        for number, each in enumerate(pool.targets)
        if each.label_logprob is not None
    }
    return {**figures.values(), **nll}


@torch.no_grad()
def measure_labels(source: LogitSource, labels: Tensor, metric: TileMetric) -> dict[str, Tensor]:
    """`[N]` each: a metric that needs the labels `[N]` alone and no targets."""
    parts: list[dict[str, Tensor]] = []
    view = View(1.0, labels[:, None], look=lambda student, _rows: parts.append(metric(student, None)))
    fused_loss(source, [view])
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def measure_positions(logits: Tensor, targets: SparseTargets | Pool, labels: Tensor) -> dict[str, Tensor]:
    """`measure` for logits `[N, V]` that exist, cut to the cache's vocabulary."""
    return measure(StoredLogits(logits), targets, labels)
