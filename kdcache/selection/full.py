"""Full: every token of the vocabulary, the reference that the other selections are measured by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kdcache.entry_form import EntryForm
from kdcache.lazy_torch import torch
from kdcache.selection.kind import Selection, register_kind
from kdcache.selection.topk import TopK
from kdcache.selection.truncated import TruncatedSelection

if TYPE_CHECKING:
    from torch import Tensor


@register_kind
@dataclass(frozen=True, kw_only=True)
class Full(TruncatedSelection):
    """Every token; it has no settings."""

    kind: ClassVar[str] = "full"
    precision: ClassVar[str] = "8"

    @property
    def form(self) -> EntryForm:
        """Every id, in order."""
        return EntryForm(every_id=True)

    def width(self, vocab_size: int) -> int:
        """V."""
        return vocab_size

    def prefix(self, logp: Tensor) -> Tensor:
        """All."""
        return torch.full_like(logp[:, 0], logp.shape[-1], dtype=torch.int64)

    def fewer(self, k: int) -> Selection:
        """The k largest."""
        return TopK(k=k)
