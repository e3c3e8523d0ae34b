"""Figures: how a student does at each position, at T = 1, from the same tiles as its loss.

    nll             of the true next token, nats
    log_partition   log sum_v e^(z_v) of the student's logits: it drifts before a training diverges
    kept_mass       the student's mass on the entries; the teacher's is one minus its tail
    top1_agreement  1 where the teacher's most likely entry is the student's most likely token
    kl              forward KL with the tail as one bucket, a lower bound; for targets sampled at T = 1 an unbiased
                    estimate, which may be negative; absent if they were sampled at another temperature
    has_target      1 where there is a target; `TEACHER_FIGURES` are 0 where there is none

Guarantee: no gradient, nothing averaged: sums over positions add up across micro-batches and ranks.
Cost: operations on `[n, K]`, where the loss is at T = 1 or has a label term; else one more exponential of each tile.

Shapes: N positions, n positions of a tile, V vocabulary, K entries.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdcache.losses.aims import Aim, BucketAim, sampled_aim
from kdcache.losses.divergences import find_divergence
from kdcache.losses.heads import Source, StoredLogits
from kdcache.losses.primitive import View, fused_loss
from kdcache.losses.tile import Student
from kdcache.targets import SAMPLED_KINDS, SparseTargets

TEACHER_FIGURES = ("kept_mass", "top1_agreement", "kl", "teacher_nll")
"""Those that compare with a target: their mean is over the positions that have one."""


class Figures:
    """A collector of figures, position by position, in order."""

    def __init__(self) -> None:
        self._parts: list[dict[str, Tensor]] = []

    def over(self, targets: SparseTargets) -> Callable[[Student, slice], None]:
        """What a view over these positions calls on each tile; the last id it gathers is the label."""
        aim: Aim | None = None
        if targets.kind not in SAMPLED_KINDS:
            aim = BucketAim.of(targets, find_divergence("forward-kl"), 1.0)
        elif targets.sample_temperature == 1:
            aim = sampled_aim(targets)

        def look(student: Student, rows: slice) -> None:
            held = targets[rows]
            entries = student.gathered[:, : held.ids.shape[-1]]
            best = entries.gather(-1, held.weights.argmax(-1, keepdim=True))[:, 0]
            kept = torch.where(held.valid, entries, -torch.inf)
            found = {
                "nll": student.lse - student.gathered[:, -1],
                "log_partition": student.origin + student.lse,
                "kept_mass": (kept.logsumexp(-1) - student.lse).exp(),
                "top1_agreement": (best >= torch.maximum(kept.amax(-1), student.peak)).to(best.dtype),
            }
            if aim is not None:
                found["kl"] = aim.losses(student, rows)
                if targets.kind in SAMPLED_KINDS:
                    found["kl"] = found["kl"] - held.entropy
            has_target = held.count > 0
            for name in found.keys() & TEACHER_FIGURES:
                found[name] = torch.where(has_target, found[name], 0.0)
            self._parts.append({**found, "has_target": has_target.to(student.lse.dtype)})

        return look

    def values(self) -> dict[str, Tensor]:
        """`[N]` each figure; empty if no position was looked at."""
        if not self._parts:
            return {}
        return {name: torch.cat([part[name] for part in self._parts]) for name in self._parts[0]}


def label_view(targets: SparseTargets, labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """`[N, K (+ 1)]` ids to gather, the label last if it is known, and which of them a tile takes for entries.

    The first column always counts as an entry: a position without one has no loss that could notice.
    """
    ids, kept = targets.ids.long(), targets.valid.clone()
    kept[:, 0] = True
    if labels is None:
        return ids, kept
    return torch.cat([ids, labels[:, None].long()], -1), torch.nn.functional.pad(kept, (0, 1))


@torch.no_grad()
def measure(source: Source, targets: SparseTargets, labels: Tensor) -> dict[str, Tensor]:
    """Figures of a student over positions that each have a label.

    Args:
        source: where its logits come from; N positions.
        targets: over the same positions; some may have none.
        labels: `[N]` true next tokens, none masked.

    Returns:
        `[N]` each: the figures above, and `teacher_nll` of the label.
    """
    figures = Figures()
    fused_loss(source, [View(1.0, *label_view(targets, labels), look=figures.over(targets))])
    return {**figures.values(), "teacher_nll": torch.where(targets.count > 0, -targets.label_logprob, 0.0)}


def measure_positions(logits: Tensor, targets: SparseTargets, labels: Tensor) -> dict[str, Tensor]:
    """`measure` for logits `[N, V]` that exist, cut to the cache's vocabulary."""
    return measure(StoredLogits(logits), targets, labels)
