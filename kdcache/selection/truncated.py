"""Truncated selections: they keep the teacher's own probabilities, and the rest is a tail of known mass.

What `topk`, `topp`, `full`, and other kinds that only differ in how many of the largest they keep, have in common.

Guarantee: the tail at each temperature is summed over the complement itself; narrowing moves entries into every stored
tail exactly.

Shapes: n positions, W head, K width of the targets, n_T temperatures.
"""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import TYPE_CHECKING

from kdcache.errors import ConfigError
from kdcache.lazy_torch import torch
from kdcache.selection.entries import Entries, keep_prefix
from kdcache.selection.kind import Selection, Uniforms
from kdcache.selection.scan import Scan
from kdcache.targets import SparseTargets

if TYPE_CHECKING:
    from torch import Tensor

_ANY_VOCABULARY = (1 << 31) - 1


class TruncatedSelection(Selection):
    """A kind that keeps some of the largest probabilities; a forced label takes the place of the smallest of them."""

    @abstractmethod
    def prefix(self, logp: Tensor) -> Tensor:
        """How many of the largest are kept.

        Args:
            logp: `[n, W]` float64 log-probabilities, falling; -inf where there is no entry.

        Returns:
            `[n]` int64 counts, 1 to W.
        """

    def entries(self, x: Tensor, tile: Scan, temperatures: tuple[float, ...], uniform: Tensor | None) -> SparseTargets:
        """The targets of a tile; see `Selection.entries`."""
        total = tile.log_total(1.0)
        count = self.prefix(tile.head - total[:, None])
        ids, logits, masses = tile.ids, tile.head, [tile.rest_at(t) for t in temperatures]
        if self.form.ragged or self.labelled:  # else the head is kept whole
            ids, logits, left = keep_prefix(ids, logits, count, tile.label)
            unkept = torch.where(left, tile.head, -torch.inf)
            masses = [torch.logaddexp(m, (unkept / t).logsumexp(-1)) for t, m in zip(temperatures, masses, strict=True)]
        log_tail = [mass - tile.log_total(t) for t, mass in zip(temperatures, masses, strict=True)]
        logprobs = (logits - total[:, None]).float()
        return SparseTargets(
            ids=ids,
            logprobs=logprobs,
            weights=logprobs.exp(),  # as a codec makes them again
            count=count,
            log_tail=torch.stack(log_tail, -1).float(),
            **tile.scalars(temperatures),
            temperatures=temperatures,
            kind=self.kind,
        )

    def narrow(self, targets: SparseTargets, entries: Entries, old: Selection, uniforms: Uniforms) -> SparseTargets:
        """Keep the largest, and move the others into every tail; see `Selection.narrow`."""
        assert targets.log_tail is not None  # truncated targets are made of truncated ones
        ranked = entries.take(entries.logprobs.argsort(dim=-1, descending=True, stable=True))
        count = self.prefix(ranked.logprobs).minimum(targets.count)
        ids, logprobs, moved = keep_prefix(ranked.ids, ranked.logprobs, count, ranked.label)
        left = torch.where(moved, ranked.logprobs, -torch.inf)
        joining = torch.stack([(left / t).logsumexp(-1) for t in targets.temperatures], -1)  # [n, n_T]
        width = min(ids.shape[-1], self.width(_ANY_VOCABULARY))
        return dataclasses.replace(
            targets,
            ids=ids[:, :width],
            logprobs=logprobs[:, :width].float(),
            weights=logprobs[:, :width].float().exp(),
            count=count,
            log_tail=torch.logaddexp(targets.log_tail.double(), joining - targets.log_partition).float(),
            kind=self.kind,
        )


def require_k(k: int, vocab_size: int) -> int:
    """k, where a vocabulary has so many tokens.

    Raises:
        ConfigError: it does not.
    """
    if k > vocab_size:
        raise ConfigError(f"k is {k}, above the vocabulary of {vocab_size} tokens")
    return k
