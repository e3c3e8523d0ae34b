"""A sampled kind outside the package: each token is kept by a coin of its own (Poisson sampling).

The likeliest is always kept. The others are kept with probability min(1, p / tau), and weigh p over that.
The head is the whole vocabulary, so the weights have no bias.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from kdcache.entry_form import EntryForm
from kdcache.selection import Scan, Selection, register_kind, setting
from kdcache.targets import SparseTargets


@register_kind
@dataclasses.dataclass(frozen=True, kw_only=True)
class Poisson(Selection):
    """Independent coins over the whole vocabulary; `tau` is the weight of a token that is kept by chance."""

    kind: ClassVar[str] = "poisson"
    precision: ClassVar[str] = "float32"

    tau: float = setting(above=0, most=1)
    vocabulary: int = setting(least=1)

    @property
    def form(self) -> EntryForm:
        return EntryForm(sampled=True, ragged=True, free_weights=True)

    def width(self, vocab_size: int) -> int:
        return vocab_size

    @property
    def random_shape(self) -> tuple[int, ...]:
        return (self.vocabulary,)

    def entries(
        self, x: torch.Tensor, tile: Scan, temperatures: tuple[float, ...], uniform: torch.Tensor | None
    ) -> SparseTargets:
        assert uniform is not None
        p = (tile.head - tile.log_total(1.0)[:, None]).exp()  # [n, V], falling
        chance = (p / self.tau).clamp(max=1)
        chance[:, 0] = 1.0
        kept = uniform < chance
        order = (~kept).long().argsort(dim=-1, stable=True)
        weights = torch.where(kept, p / chance, 0.0).gather(-1, order).float()
        logprobs = torch.where(kept, torch.nan, -torch.inf).gather(-1, order)
        return SparseTargets(
            ids=torch.where(kept, tile.ids, 0).gather(-1, order), weights=weights, logprobs=logprobs.float(),
            count=kept.sum(-1), **tile.scalars(temperatures), temperatures=temperatures, kind=self.kind,
        )  # fmt: skip
