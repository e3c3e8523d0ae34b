"""Checks of what a caller gives the losses by hand: ids and labels that the vocabulary does not have, ids twice.

Targets of a cache were checked when they were written, and the labels of its rows are its tokens, so training does not
come here. Without these checks an id twice would count twice in the teacher and once in the student, and an id that
does not exist would end in an error of torch.

Cost: a sort of the ids.

Shapes: N positions, K entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.errors import TargetError
from kdcache.losses.pool import Pool
from kdcache.rows import IGNORE


def require_sound(pool: Pool, labels: Tensor | None, vocab: int) -> None:
    """Refuse targets and labels that no vocabulary of V ids has.

    Args:
        pool: the targets `[N, K]`.
        labels: `[N]`.
        vocab: V.

    Raises:
        TargetError: an id or a label outside [0, V), other than a label of -100; or an id twice at a position.
    """
    if labels is not None:
        wrong = (labels != IGNORE) & ((labels < 0) | (labels >= vocab))
        _refuse(wrong, labels, f"the label {{}} is outside the vocabulary of {vocab} ids, and is not {IGNORE}")
    for targets in pool.targets:
        wrong = targets.valid & ((targets.ids < 0) | (targets.ids >= vocab))
        _refuse(wrong, targets.ids, f"the targets name the id {{}}, which is outside the vocabulary of {vocab} ids")
        place = torch.arange(targets.ids.shape[-1], device=targets.ids.device)
        ordered = torch.where(targets.valid, targets.ids.long(), -1 - place).sort(-1).values
        twice = ordered[:, 1:] == ordered[:, :-1]
        _refuse(twice, ordered[:, 1:], "the targets name the id {} twice")


def _refuse(wrong: Tensor, values: Tensor, text: str) -> None:
    """Name the first position and value that are wrong, if any is."""
    if wrong.any():
        first = wrong.nonzero()[0]
        raise TargetError(f"{text.format(int(values[tuple(first)]))}, at position {int(first[0])}")
