"""Compared rows: what a teacher gives at the slots of another tool's targets, and one before and after them.

A row is run in one or two contexts: each piece alone, and, where it has several, all of it together. Of every context
the log-probabilities of the stored ids are kept at the slot before, at and after each target, so that each assumption
about how the cache was made is compared on the same positions.

Cost: a forward pass a context; in memory a tile of logits, and of each row the entries of its targets.

Shapes: n tokens of a row, m targets, K entries, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.interop.foreign_row import ForeignRow
from kdcache.rows import IGNORE, PackedRow
from kdcache.selection import Selection, select
from kdcache.teacher.opened_teacher import OpenedTeacher

SHIFTS = (-1, 0, 1)
"""Slots by which a cache may be off: a target at slot t that belongs to slot t + shift."""

Pieces = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a teacher gives in one context.

    Attributes:
        logp: by shift, `[m, K]` log p of the stored ids at the slot of each target plus the shift.
        overlap: by shift, `[m]` share of the stored entries that are among the teacher's most likely, as many.
        label_logp: `[m]` log p of the next token of the row; NaN where there is none.
        control: `[m]` of weights: how far a fresh draw of the same kind lies from the teacher; NaN elsewhere.
    """

    logp: dict[int, Tensor]
    overlap: dict[int, Tensor]
    label_logp: Tensor
    control: Tensor


@dataclass(frozen=True, kw_only=True)
class ComparedRow:
    """A row, of the targets that have a slot before and behind them.

    Attributes:
        row: its stored targets.
        shares: `[m, K]` what is stored of the entries, scaled to a sum of 1; 0 past `count`.
        alone: each piece seen alone.
        together: the row seen as one; `alone` where it has one piece.
        later: `[m]` whether the target lies in a piece behind the first.
    """

    row: ForeignRow
    shares: Tensor
    alone: Context
    together: Context
    later: Tensor


def compare(
    row: ForeignRow,
    teacher: OpenedTeacher,
    split: Callable[[ForeignRow], Pieces],
    weights: Selection | None,
    logs: bool,
) -> ComparedRow | None:
    """Run a teacher over a row; None if no target has a slot before and behind it.

    Args:
        row: its tokens and ids lie below the teacher's vocabulary.
        teacher: open, for rows of this length.
        split: gives the pieces of a row.
        weights: how weights were drawn; None where values are log-probabilities or logits.
        logs: whether values are logarithms.
    """
    n = len(row.tokens)
    row = row.take((row.slots > 0) & (row.slots < n - 1) & (row.count > 0))
    if not len(row.slots):
        return None
    used = torch.from_numpy(row.used)
    values = torch.from_numpy(row.values)
    shares = values.masked_fill(~used, -torch.inf).softmax(-1) if logs else values.masked_fill(~used, 0)
    shares = shares / shares.sum(-1, keepdim=True).clamp(min=1e-300)
    pieces = split(row)
    alone = _context(row, teacher, pieces, weights)
    together = alone if len(pieces) == 1 else _context(row, teacher, np.array([n]), None)
    return ComparedRow(
        row=row, shares=shares, alone=alone, together=together, later=torch.from_numpy(row.slots >= pieces[0])
    )


def distance(shares: Tensor, logp: Tensor) -> Tensor:
    """`[m]` total variation between shares `[m, K]` and the teacher: 1 - sum min(share, p).

    Of true entries of a truncated target it is the mass of the tail; a target of another slot lies near 1.
    """
    return 1 - torch.minimum(shares, logp.exp()).sum(-1)


def _context(row: ForeignRow, teacher: OpenedTeacher, pieces: Pieces, weights: Selection | None) -> Context:
    packed = PackedRow(
        tokens=row.tokens.astype(np.int32), piece_lengths=pieces.astype(np.int32),
        piece_documents=np.zeros(len(pieces), np.int64),
    )  # fmt: skip
    m, width = row.ids.shape
    ids, slots, count = (torch.from_numpy(each) for each in (row.ids * row.used, row.slots, row.count))
    logp = {shift: torch.full((m, width), -torch.inf, dtype=torch.float64) for shift in SHIFTS}
    overlap = {shift: torch.zeros(m, dtype=torch.float64) for shift in SHIFTS}
    labels = torch.from_numpy(packed.labels(len(row.tokens)))
    label_logp, control = (torch.full((m,), torch.nan, dtype=torch.float64) for _ in range(2))
    used, start = torch.from_numpy(row.used), 0
    for tile in teacher.logits([packed], every_slot=True):  # [t, V]
        tile = tile.float().cpu()
        whole = tile.double().log_softmax(-1)
        best = whole.topk(min(width, whole.shape[-1]), -1).indices
        for shift in SHIFTS:
            here = ((slots + shift >= start) & (slots + shift < start + len(tile))).nonzero()[:, 0]
            at = slots[here] + shift - start
            logp[shift][here] = whole[at].gather(-1, ids[here])
            among = (ids[here][:, :, None] == best[at][:, None, :]) & (
                torch.arange(best.shape[-1]) < count[here][:, None, None]
            )
            overlap[shift][here] = (among.any(-1) & used[here]).sum(-1).double() / count[here]
            if shift == 0:
                known = labels[slots[here]] != IGNORE
                label_logp[here[known]] = whole[at[known]].gather(-1, labels[slots[here[known]]][:, None])[:, 0]
                if weights is not None and known.any():
                    control[here[known]] = _drawn(
                        tile[at[known]], whole[at[known]], weights, labels, slots[here[known]]
                    )
        start += len(tile)
    return Context(logp=logp, overlap=overlap, label_logp=label_logp, control=control)


def _drawn(logits: Tensor, logp: Tensor, rule: Selection, labels: Tensor, slots: Tensor) -> Tensor:
    """`[m]` how far a fresh draw of a kind lies from the teacher that it is drawn from, at some slots of a row."""
    keys = torch.stack([torch.zeros_like(slots), torch.zeros_like(slots), slots], -1)
    drawn = select(logits, rule, labels=labels[slots], seed=1, keys=keys)
    shares = drawn.weights.double().masked_fill(~drawn.valid, 0)
    return distance(shares / shares.sum(-1, keepdim=True), logp.gather(-1, drawn.ids.long()))
