"""Entries: how those of several sources are joined, and which of them are kept.

Guarantee: entries are padded at the end, ids by 0, weights by 0 and log-probabilities by -inf; ties go by id.

Shapes: n positions, M candidates, K width of the targets, N draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcache.errors import TargetError
from kdcache.lazy_torch import torch
from kdcache.rows import IGNORE
from kdcache.targets import SparseTargets

if TYPE_CHECKING:
    from torch import Tensor


def scatter_entries(places: Tensor, values: Tensor, width: int, fill: float) -> Tensor:
    """`[n, K]` the `[n, M]` values at their places; a place of K is left out."""
    out = values.new_full((len(values), width + 1), fill)
    return out.scatter_(-1, places, values)[:, :width]


def count_draws(drawn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count how often each id was drawn.

    Args:
        drawn: `[n, N]` ids.

    Returns:
        `[n, N]` the distinct ids, rising; `[n, N]` how often each was drawn; `[n]` how many there are. Past
        that number, ids and counts are 0.
    """
    ordered = drawn.sort(-1).values
    new = torch.ones_like(ordered)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    slot = new.cumsum(-1) - 1
    distinct = torch.zeros_like(ordered).scatter_(-1, slot, ordered)
    counts = torch.zeros_like(ordered).scatter_add_(-1, slot, torch.ones_like(slot))
    return distinct, counts, new.sum(-1)


@dataclass(frozen=True)
class Label:
    """The true next token of each position, all `[n]`.

    Attributes:
        ids: -100 where unknown.
        logprobs: log-probability, up to a constant.
        column: its place among the entries; their number if it is not there.
        forced: whether it must be among them.
    """

    ids: Tensor
    logprobs: Tensor
    column: Tensor
    forced: Tensor


def keep_prefix(ids: Tensor, values: Tensor, count: Tensor, label: Label) -> tuple[Tensor, Tensor, Tensor]:
    """Keep a prefix of falling values; a forced label outside it takes the place of its last.

    Args:
        ids: `[n, K]`.
        values: `[n, K]` log-probabilities, up to a constant.
        count: `[n]` length of the prefix.
        label: of the positions, its log-probability up to the same constant.

    Returns:
        `[n, K]` ids, 0 past the prefix; `[n, K]` values, -inf past it; `[n, K]` which columns joined the tail.
    """
    column = torch.arange(ids.shape[-1], device=ids.device)
    kept = column < count[:, None]
    last = (label.forced & (label.column >= count))[:, None] & (column == count[:, None] - 1)
    tail = (~kept | last) & ~(label.forced[:, None] & (column == label.column[:, None]))
    ids = torch.where(last, label.ids[:, None], torch.where(kept, ids, 0))
    return ids, torch.where(last, label.logprobs[:, None], torch.where(kept, values, -torch.inf)), tail


@dataclass(frozen=True)
class Heavies:
    """Entries with a probability of their own, by falling weight.

    Attributes:
        ids, logprobs, weights: `[n, K]`.
        count: `[n]` how many of them count.
    """

    ids: Tensor
    logprobs: Tensor
    weights: Tensor
    count: Tensor


@dataclass(frozen=True)
class Lights:
    """Entries that share one weight a position.

    Attributes:
        ids: `[n, K]`.
        weight: `[n]` of each.
        count: `[n]` how many of them count.
    """

    ids: Tensor
    weight: Tensor
    count: Tensor


def join_entries(heavies: Heavies, label: Label, label_weight: Tensor, lights: Lights) -> dict[str, Any]:
    """The entries of a target: heavies by falling weight, a forced label among them; then the lights.

    Args:
        heavies: without a forced label.
        label: of the positions.
        label_weight: `[n]` its weight.
        lights: the others.

    Returns:
        `ids`, `logprobs`, `weights` of width K, and `count`, as in SparseTargets.
    """
    weights, heavy, light = heavies.weights, heavies.count, lights.count
    width = weights.shape[-1]
    column = torch.arange(width, device=weights.device)
    rank = (weights >= label_weight[:, None]).sum(-1).minimum(heavy)[:, None]  # of the label among the heavies
    one = label.forced.long()[:, None]
    places = [
        torch.where(column < heavy[:, None], column + one * (column >= rank), width),
        torch.where(label.forced[:, None], rank, width),
        torch.where(column < light[:, None], column + heavy[:, None] + one, width),
    ]
    place = torch.cat(places, -1)  # [n, 2 K + 1]
    shared, unknown = lights.weight[:, None].expand(-1, width), torch.full_like(weights, torch.nan)
    ids = torch.cat([heavies.ids, label.ids[:, None], lights.ids], -1)
    logprobs = torch.cat([heavies.logprobs, label.logprobs[:, None], unknown], -1)
    weights = torch.cat([weights, label_weight[:, None], shared], -1)
    return {
        "ids": scatter_entries(place, ids, width, 0),
        "logprobs": scatter_entries(place, logprobs, width, -torch.inf).float(),
        "weights": scatter_entries(place, weights, width, 0).float(),
        "count": heavy + light + label.forced,
    }


@dataclass(frozen=True)
class Entries:
    """Entries of targets in some order, float64; unused ones weigh nothing.

    Attributes:
        ids, logprobs, weights: `[n, K]`.
        column: `[n]` place of the forced label; K for none.
        labels: `[n]` true next tokens, -100 where unknown or not forced.
    """

    ids: Tensor
    logprobs: Tensor
    weights: Tensor
    column: Tensor
    labels: Tensor

    @staticmethod
    def by_id(targets: SparseTargets, labels: Tensor | None) -> Entries:
        """The entries of targets in id order, the unused ones last, with the labels found among them.

        Raises:
            TargetError: a label is not there.
        """
        valid = targets.valid
        if labels is None:
            labels = torch.full_like(targets.count, IGNORE)
        labels = labels.to(targets.ids)
        found = (targets.ids == labels[:, None]) & valid
        missing = (labels != IGNORE) & ~found.any(-1) & (targets.count > 0)
        if missing.any():
            raise TargetError(f"the label of position {int(missing.nonzero()[0])} is not among its entries")
        weights = torch.where(valid, targets.weights, 0).double()
        column = torch.where(found.any(-1), found.long().argmax(-1), valid.shape[-1])
        given = Entries(targets.ids.long(), targets.logprobs.double(), weights, column, labels.long())
        return given.take(torch.where(valid, given.ids, torch.iinfo(torch.int64).max).argsort(dim=-1, stable=True))

    def take(self, order: Tensor) -> Entries:
        """The same entries in another order, `[n, K]` columns."""
        ids, logprobs, weights = (x.gather(-1, order) for x in (self.ids, self.logprobs, self.weights))
        at = order == self.column[:, None]
        column = torch.where(self.label.forced, at.long().argmax(-1), self.column)
        return Entries(ids, logprobs, weights, column, self.labels)

    @property
    def label(self) -> Label:
        """The forced label; its log-probability has no meaning where there is none."""
        column = self.column.clamp(max=self.ids.shape[-1] - 1)[:, None]
        forced = self.column < self.ids.shape[-1]
        return Label(self.labels, self.logprobs.gather(-1, column)[:, 0], self.column, forced)

    @property
    def label_weight(self) -> Tensor:
        """`[n]` weight of the forced label; of no meaning where there is none."""
        column = self.column.clamp(max=self.ids.shape[-1] - 1)[:, None]
        return self.weights.gather(-1, column)[:, 0]

    @property
    def others(self) -> Tensor:
        """`[n, K]` weights without the forced label's."""
        columns = torch.arange(self.ids.shape[-1], device=self.ids.device)
        return self.weights.masked_fill(columns == self.column[:, None], 0.0)
