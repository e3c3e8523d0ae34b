"""Topp: the smallest set with a given mass."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kdcache.entry_form import EntryForm
from kdcache.errors import ConfigError
from kdcache.selection.kind import Selection, register_kind, setting
from kdcache.selection.truncated import TruncatedSelection, require_k

if TYPE_CHECKING:
    from torch import Tensor


@register_kind
@dataclass(frozen=True, kw_only=True)
class TopP(TruncatedSelection):
    """The smallest set of the largest with mass `top_p`.

    Attributes:
        k: the most entries of a position.
        top_p: the mass.
        min_k: the fewest entries.
        force_label: the true next token is always among them.
    """

    kind: ClassVar[str] = "topp"

    k: int = setting(64, least=1, always=True)
    top_p: float = setting(above=0, most=1)
    min_k: int = setting(1, least=1)
    force_label: bool = False

    def check(self) -> None:
        """Refuse bounds that leave no number of entries."""
        if self.min_k > self.k:
            raise ConfigError(f"min_k is {self.min_k}, above k, which is {self.k}")

    @property
    def form(self) -> EntryForm:
        """More entries at positions where the teacher is unsure."""
        return EntryForm(ragged=True)

    def width(self, vocab_size: int) -> int:
        """k."""
        return require_k(self.k, vocab_size)

    def prefix(self, logp: Tensor) -> Tensor:
        """The fewest whose mass reaches `top_p`, within the bounds."""
        short = logp.exp().cumsum(-1) < self.top_p
        return (short.sum(-1) + 1).clamp(self.min_k, min(logp.shape[-1], self.k))

    def fewer(self, k: int) -> Selection:
        """The same mass, in at most k entries."""
        return dataclasses.replace(self, k=k, min_k=min(self.min_k, k))

    def made_from(self, old: Selection) -> bool:
        """Of any kind that keeps the largest: `topp` itself, a fixed number of them, or all."""
        return isinstance(old, TopP) or (not old.sampled and not old.form.ragged)

    def limits(self, old: Selection, width: int) -> dict[str, float]:
        """No more than are there."""
        if isinstance(old, TopP):
            return {"k": old.k, "top_p": old.top_p, "min_k": old.min_k}
        return {"k": width}
