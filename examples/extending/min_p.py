"""A kind of selection outside the package: tokens with at least a given share of the largest probability."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch

from kdcache.entry_form import EntryForm
from kdcache.selection import Selection, TruncatedSelection, register_kind, setting


@register_kind
@dataclasses.dataclass(frozen=True, kw_only=True)
class MinP(TruncatedSelection):
    """Tokens with p of at least `base` times the largest p, `k` at most."""

    kind: ClassVar[str] = "minp"

    k: int = setting(16, least=1, always=True)
    base: float = setting(above=0, most=1)

    @property
    def form(self) -> EntryForm:
        return EntryForm(ragged=True)

    def width(self, vocab_size: int) -> int:
        return min(self.k, vocab_size)

    def prefix(self, logp: torch.Tensor) -> torch.Tensor:
        kept = (logp >= logp[:, :1] + math.log(self.base)).sum(-1)
        return kept.clamp(1, min(self.k, logp.shape[-1]))

    def fewer(self, k: int) -> Selection:
        return dataclasses.replace(self, k=k)

    def limits(self, old: Selection, width: int) -> dict[str, float]:
        return {"k": width}
