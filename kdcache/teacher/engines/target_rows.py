"""Target rows: sparse targets as one float32 array, which is what leaves a process that selects by itself.

A row holds a position's ids, log-probabilities and weights, its count, log-partitions, log-tails, entropy and label
log-probability where the targets have them, and whether its logits were finite. float32 holds every id below 2^24
exactly, and log-probabilities are float32 already, so nothing is rounded.

Shapes: N positions, W numbers of a row, K entries, n_T temperatures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.selection import Selection
from kdcache.targets import SparseTargets

MOST_IDS = 1 << 24
"""float32 holds whole numbers below this exactly."""

_WHOLE = ("ids", "count")


def columns(
    selection: Selection, temperatures: tuple[float, ...], vocab_size: int, *, labelled: bool
) -> dict[str, int]:
    """Width of each field of a row, in order.

    Args:
        selection: which the targets follow.
        temperatures: of partitions and tails.
        vocab_size: of the vocabulary that is selected from.
        labelled: whether they know log p of the labels.
    """
    k, n = selection.width(vocab_size), len(temperatures)
    tail = {} if selection.sampled else {"log_tail": n}
    label = {"label_logprob": 1} if labelled else {}
    return {"ids": k, "logprobs": k, "weights": k, "count": 1, "log_partition": n, **tail, "entropy": 1, **label}


def pack_targets(targets: SparseTargets, finite: Tensor) -> Tensor:
    """`[N, W]` float32 of targets and of `[N]`, whether the logits of each were finite."""
    names = ("ids", "logprobs", "weights", "count", "log_partition", "log_tail", "entropy", "label_logprob")
    fields = [getattr(targets, name) for name in names]
    known = [field.float().reshape(len(finite), -1) for field in (*fields, finite) if field is not None]
    return torch.cat(known, -1)


def unpack_targets(
    rows: Tensor, selection: Selection, temperatures: tuple[float, ...], vocab_size: int
) -> tuple[SparseTargets, Tensor]:
    """Targets of `[N, W]` rows with labels, and `[N]` whether the logits of each were finite.

    The shape must be right; what the numbers say is for `find_fault` to check.
    """
    widths = columns(selection, temperatures, vocab_size, labelled=True)
    *parts, finite = torch.split(rows, [*widths.values(), 1], -1)
    fields = dict(zip(widths, parts, strict=True))
    per_entry = {"ids", "logprobs", "weights", "log_partition", "log_tail"}
    values = {name: part if name in per_entry else part[:, 0] for name, part in fields.items()}
    whole = {name: values[name].nan_to_num(-1).long() for name in _WHOLE}
    targets = SparseTargets(
        **{**values, **whole}, temperatures=temperatures, kind=selection.kind,
        sample_temperature=selection.target_temperature,
    )  # fmt: skip
    return targets, finite[:, 0] == 1
