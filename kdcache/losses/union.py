"""Union: the entries of several targets, gathered from a tile once, and what each of the targets uses of them.

A tile takes the union of the entries out of its logits and sums the rest. The tail of one target is that rest and the
entries that only others have, added up: never one minus anything. What a target uses is made of differentiable
operations, so its loss reaches the tile through the union, and there is one pass over the logits for all of them.

Cost: a sort of `[N, U]` ids a step, where there are several targets, and operations on `[n, U]` for each.

Shapes: N positions, n positions of a tile, K entries of a target, U all of them, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.losses.fused_linear import StudentTile
from kdcache.targets import SparseTargets


@dataclass(frozen=True)
class Union:
    """Ids to gather for several targets, over the same positions.

    Attributes:
        members: the targets.
        ids: `[N, U (+ 1)]` the entries of each in turn, and the label last if it is known.
        kept: `[N, U (+ 1)]` which of them a tile takes for entries: each id once. The first column always counts as
            one: a position without an entry has no loss that could notice.
        others: of each member, `[N, U]` the entries in `kept` that it does not have; empty for a single one.
        vocab: V.
    """

    members: tuple[SparseTargets, ...]
    ids: Tensor
    kept: Tensor
    others: tuple[Tensor, ...]
    vocab: int

    @staticmethod
    def of(members: Sequence[SparseTargets], labels: Tensor | None, vocab: int) -> Union:
        """The union of one or several targets, with `[N]` labels if they are known."""
        ids = torch.cat([targets.ids.long() for targets in members], -1)  # [N, U]
        valid = torch.cat([targets.valid for targets in members], -1)
        kept, owned = valid.clone(), list[Tensor]()
        kept[:, 0] = True
        if len(members) > 1:
            kept, owned = _first_of_each(ids, kept, valid, [targets.ids.shape[-1] for targets in members])
        others = tuple(kept & ~own for own in owned)
        if labels is not None:
            ids = torch.cat([ids, labels[:, None].long()], -1)
            kept = torch.nn.functional.pad(kept, (0, 1))
        return Union(tuple(members), ids, kept, others, vocab)

    def view(self, member: int, student: StudentTile, rows: slice) -> StudentTile:
        """What one of the targets uses of a tile: its own entries, the label, and its own tail."""
        if not self.others:
            return student
        start = sum(targets.ids.shape[-1] for targets in self.members[:member])
        end = start + self.members[member].ids.shape[-1]
        others = self.others[member][rows]  # [n, U]
        width = others.shape[-1]
        entries = student.gathered[:, :width]
        mean = student.tail_mean
        if mean is not None:
            outside = (self.vocab - self.kept[rows].sum(-1)).to(mean.dtype)  # [n] ids in the tile's tail
            total = mean * outside + torch.where(others, entries, 0.0).sum(-1)
            mean = total / (outside + others.sum(-1)).clamp(min=1)
        unlike = torch.where(others, entries, -torch.inf)
        return StudentTile(
            lse=student.lse,
            tail=_logsumexp(torch.cat([student.tail[:, None], unlike], -1)),
            gathered=torch.cat([student.gathered[:, start:end], student.gathered[:, width:]], -1),
            tail_mean=mean,
            peak=torch.maximum(student.peak, unlike.detach().amax(-1)),
            origin=student.origin,
            entropy=student.entropy,
        )


def _first_of_each(ids: Tensor, present: Tensor, valid: Tensor, widths: list[int]) -> tuple[Tensor, list[Tensor]]:
    """`[N, U]` the first column of each id that is present; and for each of the targets, the columns of ids it has."""
    key = torch.where(present, ids, torch.iinfo(ids.dtype).max)
    order = key.argsort(dim=-1, stable=True)
    sorted_key = key.gather(-1, order)
    new = torch.ones_like(present)
    new[:, 1:] = sorted_key[:, 1:] != sorted_key[:, :-1]
    number = torch.zeros_like(ids).scatter(-1, order, new.cumsum(-1) - 1)  # [N, U] equal for equal ids
    first = torch.zeros_like(present).scatter(-1, order, new) & present
    owned = []
    for start, end in itertools.pairwise(itertools.accumulate(widths, initial=0)):
        own = torch.zeros_like(ids).scatter_add(-1, number[:, start:end], valid[:, start:end].to(ids.dtype))
        owned.append(own.gather(-1, number) > 0)
    return first, owned


def _logsumexp(values: Tensor) -> Tensor:
    """`[n]` log-sum-exp; -inf, with gradient 0, where all values are -inf."""
    peak = values.detach().amax(-1, keepdim=True)
    total = (values - torch.where(torch.isneginf(peak), 0.0, peak)).exp().sum(-1)
    return torch.where(total > 0, torch.where(total > 0, total, 1.0).log() + peak[:, 0], -torch.inf)
