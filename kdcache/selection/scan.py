"""Scan: what one pass over a tile of logits tells: its head, and the mass of the complement at each temperature.

Guarantee: the complement is summed directly, around its own largest logit, in blocks of 64 that are added
up in float64: a tail of 1e-30 is as exact as one of a half. Everything else is float64 over the head alone.
Cost: a pass for the blocks' maxima, then five passes over a few rows at a time, which stay in a core's own cache, and
three more for each temperature that is not 1; no `[n, V]` tensor is kept.

Shapes: n positions, V vocabulary, W head, B blocks, n_T temperatures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kdcache.rows import IGNORE
from kdcache.selection.largest import largest

BLOCK = 64
"""Ids whose exponentials are summed in float32, before float64 takes over."""

_CACHE_ELEMENTS = 1 << 17
"""Logits of one inner step: two float32 buffers of this size stay in a core's own cache."""

_NOTHING = -1e5
"""A logit so low that its exponential is 0 at every temperature, and 0 times it is 0."""


@dataclass(frozen=True)
class Scan:
    """A tile, seen from each position's largest logit: it is subtracted from every logit below; float64.

    Attributes:
        finite: `[n]` whether every logit is finite.
        head: `[n, W]` the largest logits, falling.
        ids: `[n, W]` theirs.
        labels: `[n]` true next tokens, -100 where unknown.
        label: `[n]` the label's logit; NaN where there is no label.
        column: `[n]` where the forced label stands in the head; W if it does not.
        apart: `[n]` the forced label's logit where it is not in the head, else -inf.
        centre: `[n]` a logit that no other of the complement exceeds.
        rest: `[n, n_T]` log of the complement's mass at each temperature: everything but head and `apart`;
            -inf where there is nothing.
        surprise: `[n]` sum over the complement of exp(x) (-x), at T = 1.
        blocks: `[n, B]` float32 mass of each block of ids inside the complement, at the sampling temperature and in
            units of exp(centre / T).
        temperatures: of the columns of `rest`.
    """

    finite: Tensor
    head: Tensor
    ids: Tensor
    labels: Tensor
    label: Tensor
    column: Tensor
    apart: Tensor
    centre: Tensor
    rest: Tensor
    surprise: Tensor
    blocks: Tensor
    temperatures: tuple[float, ...]

    @property
    def forced(self) -> Tensor:
        """`[n]` whether a label must be among the entries."""
        return (self.column < self.head.shape[-1]) | (self.apart > -torch.inf)

    def rest_at(self, temperature: float) -> Tensor:
        """`[n]` log of the complement's mass at a temperature of the scan."""
        return self.rest[:, self.temperatures.index(temperature)]

    def log_total(self, temperature: float) -> Tensor:
        """`[n]` log of the mass of everything at a temperature; exact to its last digits where it is near 0."""
        return self._log_totals[:, self.temperatures.index(temperature)]

    @cached_property
    def _log_totals(self) -> Tensor:
        others = torch.cat([self.head[:, 1:], self.apart[:, None]], -1)
        masses = [(others if t == 1 else others / t).exp().sum(-1) for t in self.temperatures]
        return torch.log1p(torch.stack(masses, -1) + self.rest.exp())  # the largest itself has mass 1

    def entropy(self) -> Tensor:
        """`[n]` entropy at T = 1, nats: log Z + sum p (-x), two terms that are never negative."""
        near = torch.cat([self.head[:, 1:], self.apart[:, None]], -1)
        nearby = (near.exp() * -near.clamp(min=-1e4)).sum(-1)  # where p is 0, so is p log p
        total = self.log_total(1.0)
        return total + (nearby + self.surprise) / total.exp()

    def scalars(self, temperatures: tuple[float, ...]) -> dict[str, Any]:
        """The fields of SparseTargets that do not depend on which entries are kept, float32."""
        total = self.log_total(1.0)
        partitions = [self.log_total(t) - total / t for t in temperatures]  # exactly 0 at T = 1
        return {
            "log_partition": torch.stack(partitions, -1).float(),
            "entropy": self.entropy().float(),
            "label_logprob": (self.label - total).float(),
        }


def scan(
    x: Tensor,
    width: int,
    temperatures: tuple[float, ...],
    labels: Tensor | None,
    force_label: bool = False,
    sample_temperature: float = 1.0,
) -> Scan:
    """Scan a tile.

    Args:
        x: `[n, V]` float32.
        width: W, at least 1.
        temperatures: T at which the complement is weighed; 1 is always among those of the result.
        labels: `[n]`, -100 where unknown.
        force_label: keep the label out of the complement.
        sample_temperature: T of `blocks`, one of the temperatures.
    """
    vocab = x.shape[-1]
    values, ids = largest(x, min(width + 1, vocab))
    if labels is None:
        labels = torch.full_like(ids[:, 0], IGNORE)
    labels = labels.long()
    known = labels != IGNORE
    label_values = x.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
    head, head_ids = values[:, :width], ids[:, :width]
    forced = known if force_label else torch.zeros_like(known)
    found = (head_ids == labels[:, None]) & forced[:, None]  # [n, W]
    column = torch.where(found.any(-1), found.long().argmax(-1), width)
    top = values[:, 0].double()
    outside = torch.where(forced, labels, vocab)  # column V of the buffers stands for nobody
    skip = torch.cat([head_ids, outside[:, None]], -1)
    sums, surprise = _weigh(x, values[:, -1:], skip, temperatures) if width < vocab else _empty(x, temperatures)
    centre = values[:, -1].double() - top
    if width == vocab:
        centre = torch.zeros_like(centre)
    totals = {t: s.double().sum(-1) for t, s in sums.items()}
    # Weighed around the centre, it is sum e (-d); around the largest logit, x = d + centre.
    moved = (surprise.double().sum(-1) - centre * totals[1.0]) * centre.exp()
    return Scan(
        finite=torch.isfinite(values).all(-1) & torch.isfinite(moved) & torch.isfinite(label_values),
        head=head.double() - top[:, None],
        ids=head_ids,
        labels=labels,
        label=torch.where(known, label_values.double() - top, torch.nan),
        column=column,
        apart=torch.where(forced & (column == width), label_values.double() - top, -torch.inf),
        centre=centre,
        rest=torch.stack([total.log() + centre / t for t, total in totals.items()], -1),
        surprise=moved,
        blocks=sums[sample_temperature],
        temperatures=tuple(totals),
    )


def _weigh(
    x: Tensor, centre: Tensor, skip: Tensor, temperatures: tuple[float, ...]
) -> tuple[dict[float, Tensor], Tensor]:
    """Block sums of e = exp((x - centre) / T) for each T, and of -e log e at T = 1, without the ids in `skip`."""
    n, vocab = x.shape
    blocks = vocab // BLOCK + 1  # at least one column beyond the vocabulary
    rows = min(n, max(1, _CACHE_ELEMENTS // vocab)) if x.device.type == "cpu" else n
    d, e = x.new_empty(2, rows, blocks * BLOCK)
    d[:, vocab:] = _NOTHING
    order = [t for t in temperatures if t != 1] + [1.0]  # T = 1 last: it uses d up
    sums = {t: x.new_empty(n, blocks) for t in order}
    surprise = x.new_empty(n, blocks)
    for start in range(0, n, max(1, rows)):
        s = slice(start, min(start + rows, n))
        below, exps = d[: s.stop - start], e[: s.stop - start]
        torch.sub(x[s], centre[s], out=below[:, :vocab])
        below.scatter_(-1, skip[s], _NOTHING)
        for t in order:
            torch.exp(below if t == 1 else torch.div(below, t, out=exps), out=exps)
            torch.sum(exps.view(-1, blocks, BLOCK), -1, out=sums[t][s])
        exps.mul_(below)
        torch.sum(exps.view(-1, blocks, BLOCK), -1, out=surprise[s])
    return sums, surprise.neg_()


def _empty(x: Tensor, temperatures: tuple[float, ...]) -> tuple[dict[float, Tensor], Tensor]:
    """The same for a head that is the whole vocabulary."""
    nothing = x.new_zeros(len(x), x.shape[-1] // BLOCK + 1)
    return dict.fromkeys((*(t for t in temperatures if t != 1), 1.0), nothing), nothing
