"""Topk: the k largest probabilities."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kdcache.entry_form import EntryForm
from kdcache.lazy_torch import torch
from kdcache.selection.kind import Selection, register_kind, setting
from kdcache.selection.truncated import TruncatedSelection, require_k

if TYPE_CHECKING:
    from torch import Tensor


@register_kind
@dataclass(frozen=True, kw_only=True)
class TopK(TruncatedSelection):
    """The k largest.

    Attributes:
        k: entries of each position.
        force_label: the true next token is always among them.
    """

    kind: ClassVar[str] = "topk"

    k: int = setting(64, least=1, always=True)
    force_label: bool = False

    @property
    def form(self) -> EntryForm:
        """As many entries at every position."""
        return EntryForm()

    @property
    def needs_vocabulary(self) -> bool:
        """Only for a forced label, which may be none of the largest."""
        return self.force_label

    def width(self, vocab_size: int) -> int:
        """k."""
        return require_k(self.k, vocab_size)

    def prefix(self, logp: Tensor) -> Tensor:
        """k, or all where there are fewer."""
        return torch.full_like(logp[:, 0], min(logp.shape[-1], self.k), dtype=torch.int64)

    def fewer(self, k: int) -> Selection:
        """The k largest."""
        return dataclasses.replace(self, k=k)

    def made_from(self, old: Selection) -> bool:
        """Of more of the largest, or of all."""
        return isinstance(old, TopK) or old.form.every_id

    def limits(self, old: Selection, width: int) -> dict[str, float]:
        """No more than are there."""
        return {"k": width}
