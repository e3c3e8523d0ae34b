"""Scan: what one pass over a tile of logits gives: its head, and the mass of the complement at each temperature.

The complement is every id but the head and a forced label that is not in it.

Guarantee: what is summed over the complement is summed in blocks of 64 that are added up in float64; everything else
is float64 over the head alone.
Cost: that of one pass over the logits (scan_dispatch.py), and about 60 operations on `[n, W]`. Nothing waits for the
device.

Shapes: n positions, V vocabulary, W head, B blocks, n_T temperatures.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kdcache.lazy_torch import torch
from kdcache.rows import IGNORE
from kdcache.selection.entries import Label
from kdcache.selection.scan_dispatch import scan_rows

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Scan:
    """A scanned tile. Logits are float64 and relative to the largest of their position, but for `values`.

    Attributes:
        values: `[n, S]` the largest logits as they are, float32, falling; S is W + 1, or V if W is.
        order: `[n, S]` their ids.
        finite: `[n]` whether every logit is finite.
        head: `[n, W]` the largest logits, falling.
        label: the true next tokens: their logits (NaN where unknown), and the column of the head where a forced one
            stands.
        outside_label: `[n]` the forced label's logit where it is not in the head, else -inf.
        centre: `[n]` a logit that no other of the complement exceeds.
        rest: `[n, n_T]` log of the complement's mass at each temperature: -inf where there is
            nothing.
        entropy_terms: `[n]` sum over the complement of exp(x) (-x), at T = 1.
        blocks: `[n, B]` float32 mass of each block of ids inside the complement, at the sampling temperature and in
            units of exp(centre / T).
        temperatures: of the columns of `rest`.
    """

    values: Tensor
    order: Tensor
    finite: Tensor
    head: Tensor
    label: Label
    outside_label: Tensor
    centre: Tensor
    rest: Tensor
    entropy_terms: Tensor
    blocks: Tensor
    temperatures: tuple[float, ...]

    @property
    def ids(self) -> Tensor:
        """`[n, W]` those of the head."""
        return self.order[:, : self.head.shape[-1]]

    @property
    def forced(self) -> Tensor:
        """`[n]` whether a label must be among the entries."""
        return self.label.forced

    def rest_at(self, temperature: float) -> Tensor:
        """`[n]` log of the complement's mass at a temperature of the scan."""
        return self.rest[:, self.temperatures.index(temperature)]

    def log_total(self, temperature: float) -> Tensor:
        """`[n]` log of the mass of everything at a temperature; exact to its last digits where it is near 0."""
        return self._log_totals[:, self.temperatures.index(temperature)]

    @cached_property
    def _others(self) -> Tensor:
        """`[n, W]` logits excluded from the complement, but the largest: the rest of the head, and an outside label."""
        return torch.cat([self.head[:, 1:], self.outside_label[:, None]], -1)

    @cached_property
    def _log_totals(self) -> Tensor:
        masses = [(self._others if t == 1 else self._others / t).exp().sum(-1) for t in self.temperatures]
        return torch.log1p(torch.stack(masses, -1) + self.rest.exp())  # the largest itself has mass 1

    def entropy(self) -> Tensor:
        """`[n]` entropy at T = 1, nats: log Z + sum p (-x), two terms that are never negative."""
        nearby = (self._others.exp() * -self._others.clamp(min=-1e4)).sum(-1)  # where p is 0, so is p log p
        total = self.log_total(1.0)
        return total + (nearby + self.entropy_terms) / total.exp()

    def scalars(self, temperatures: tuple[float, ...]) -> dict[str, Any]:
        """The fields of SparseTargets that do not depend on which entries are kept, float32.

        `label_logprob` is NaN at a position without a label.
        """
        total = self.log_total(1.0)
        partitions = [self.log_total(t) - total / t for t in temperatures]  # exactly 0 at T = 1
        return {
            "log_partition": torch.stack(partitions, -1).float(),
            "entropy": self.entropy().float(),
            "label_logprob": (self.label.logprobs - total).float(),
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
        x: `[n, V]`, of any floating dtype, taken as float32.
        width: W, at least 1.
        temperatures: T at which the complement is weighed; 1 is always among those of the result.
        labels: `[n]`, -100 where unknown.
        force_label: keep the label out of the complement.
        sample_temperature: T of `blocks`, one of the temperatures.
    """
    vocab = x.shape[-1]
    labels = x.new_full((len(x),), IGNORE, dtype=torch.int64) if labels is None else labels.long()
    known = labels != IGNORE
    label_values = x.gather(-1, torch.where(known, labels, 0)[:, None])[:, 0].float()
    forced = known if force_label else torch.zeros_like(known)
    weighed = [*(t for t in temperatures if t != 1), 1.0]
    values, order, sums, entropy_terms = scan_rows(x, width, torch.where(forced, labels, vocab), weighed)
    head = values[:, :width]
    found = (order[:, :width] == labels[:, None]) & forced[:, None]  # [n, W]
    column = torch.where(found.any(-1), found.long().argmax(-1), width)
    top = values[:, 0].double()
    centre = values[:, width].double() - top if width < vocab else torch.zeros_like(top)
    totals = sums.sum(-1, dtype=torch.float64)  # [n, n_T]
    # Weighed around the centre, it is sum e (-d); around the largest logit, x = d + centre.
    moved = (entropy_terms.sum(-1, dtype=torch.float64) - centre * totals[:, -1]) * centre.exp()
    label = torch.where(known, label_values.double() - top, torch.nan)
    outside_label = torch.where(forced & (column == width), label, -torch.inf)
    return Scan(
        values=values,
        order=order,
        finite=torch.isfinite(values.sum(-1, dtype=torch.float64) + moved + label_values),
        head=head.double() - top[:, None],
        label=Label(labels, label, column, (column < width) | (outside_label > -torch.inf)),
        outside_label=outside_label,
        centre=centre,
        rest=totals.log() + torch.stack([centre / t for t in weighed], -1),
        entropy_terms=moved,
        blocks=sums[:, weighed.index(sample_temperature)],
        temperatures=tuple(weighed),
    )
