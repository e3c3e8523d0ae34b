"""Truncated: topk, topp and full keep the teacher's own probabilities; the rest is a tail of known mass.

Shapes: n positions, W head, n_T temperatures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.selection.rule import Selection
from kdcache.selection.scan import Scan
from kdcache.targets import SparseTargets


def truncate(seen: Scan, rule: Selection, temperatures: tuple[float, ...]) -> SparseTargets:
    """Keep a prefix of the head; a forced label takes the place of the smallest entry."""
    total = seen.log_total(1.0)
    count = prefix(seen.head - total[:, None], rule)
    ids, logits, masses = seen.ids, seen.head, [seen.rest_at(t) for t in temperatures]
    if rule.kind == "topp" or rule.force_label:  # else the head is kept whole
        ids, logits, tail = keep(ids, logits, count, (seen.labels, seen.label, seen.column, seen.forced))
        unkept = torch.where(tail, seen.head, -torch.inf)
        masses = [torch.logaddexp(m, (unkept / t).logsumexp(-1)) for t, m in zip(temperatures, masses, strict=True)]
    log_tail = [mass - seen.log_total(t) for t, mass in zip(temperatures, masses, strict=True)]
    logprobs = (logits - total[:, None]).float()
    return SparseTargets(
        ids=ids,
        logprobs=logprobs,
        weights=logprobs.exp(),  # as a codec makes them again
        count=count,
        log_tail=torch.stack(log_tail, -1).float(),
        **seen.scalars(temperatures),
        temperatures=temperatures,
        kind=rule.kind,
    )


def prefix(logp: Tensor, rule: Selection) -> Tensor:
    """How many of the largest a truncated rule keeps.

    Args:
        logp: `[n, W]` float64 log-probabilities, falling; -inf where there is no entry.
        rule: `topk`, `topp` or `full`.

    Returns:
        `[n]` counts, at most W.
    """
    width = logp.shape[-1]
    if rule.kind != "topp":
        return torch.full_like(logp[:, 0], min(width, rule.k) if rule.kind == "topk" else width, dtype=torch.int64)
    assert rule.top_p is not None  # checked when built
    short = logp.exp().cumsum(-1) < rule.top_p
    return (short.sum(-1) + 1).clamp(rule.min_k, min(width, rule.k))


def keep(
    ids: Tensor, values: Tensor, count: Tensor, label: tuple[Tensor, Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Keep a prefix of falling values; a forced label outside it takes the place of its last.

    Args:
        ids: `[n, W]`.
        values: `[n, W]` log-probabilities, up to a constant.
        count: `[n]` length of the prefix.
        label: `[n]` id, value, column (W if it has none) and whether it is forced.

    Returns:
        `[n, W]` ids, 0 past the prefix; `[n, W]` values, -inf past it; `[n, W]` which columns joined the tail.
    """
    label_id, value, own_column, forced = label
    column = torch.arange(ids.shape[-1], device=ids.device)
    kept = column < count[:, None]
    last = (forced & (own_column >= count))[:, None] & (column == count[:, None] - 1)
    tail = (~kept | last) & ~(forced[:, None] & (column == own_column[:, None]))
    ids = torch.where(last, label_id[:, None], torch.where(kept, ids, 0))
    return ids, torch.where(last, value[:, None], torch.where(kept, values, -torch.inf)), tail
