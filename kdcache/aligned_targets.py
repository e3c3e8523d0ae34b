"""AlignedTargets: sparse targets in the ids of a student whose tokenizer is not the teacher's.

Both tokenisations of one text are cut at the bytes where both have a boundary, into chunks: runs of tokens that begin
and end at the same byte on either side. Where a chunk begins, both models have read the same text, and the position
carries a target: the teacher's entries that are tokens of the student, too, under the student's ids; those that are
not; and the log-likelihood that the teacher gave the text of the chunk.

Guarantee: an entry that the student has no token for is in the tail at every stored temperature, so `logprobs` and
`log_tail` are exact, as of any truncated target.

Shapes: N positions of the student, K entries, n_T temperatures, V ids of the student.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import TargetError
from kdcache.lazy_torch import torch
from kdcache.targets import SparseTargets

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Overlap:
    """What two vocabularies share.

    Attributes:
        common: `[V]` the student's ids of tokens that the teacher has, too.
        share: of the teacher's tokens, those that the student has, too.
    """

    common: NDArray[np.bool_]
    share: float
    _masks: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)

    def mask(self, device: torch.device) -> Tensor:
        """`[V]` bool: `common`, on a device."""
        if device not in self._masks:
            self._masks[device] = torch.from_numpy(self.common).to(device)
        return self._masks[device]

    def __reduce__(self) -> tuple[type[Overlap], tuple[Any, ...]]:
        return Overlap, (self.common, self.share)


@dataclass(frozen=True, kw_only=True)
class AlignedTargets(SparseTargets):
    """Targets of the positions of a student with another tokenizer.

    `label_logprob` is None unless the vocabularies differ in their ids only: a label of the student is most often no
    token of the teacher's.

    Attributes:
        foreign: `[N, K]` log p at T = 1 of the entries that are no tokens of the student, falling; -inf past the last.
        unkept: `[N, n_T]` log of the mass of what the teacher did not keep: the tail without those entries.
        chunk_length: `[N]` tokens of the student in the chunk that begins at a position; 0 where none does.
        chunk_logprob: `[N]` log-likelihood that the teacher gave the chunk's text; 0 where none begins, and NaN where
            the cache does not know it.
        chunk_bytes: `[N]` bytes of that text.
        label_bytes: `[N]` bytes of the label's text.
        overlap: of the two vocabularies.
    """

    foreign: Tensor
    unkept: Tensor | None
    chunk_length: Tensor
    chunk_logprob: Tensor
    chunk_bytes: Tensor
    label_bytes: Tensor
    overlap: Overlap = field(compare=False)

    @property
    def has_target(self) -> Tensor:
        """`[N]` bool: where a chunk begins."""
        return self.chunk_length > 0

    @property
    def inside(self) -> Tensor:
        """`[N]` bool: which positions belong to the chunk of an earlier one."""
        place = torch.arange(len(self.chunk_length), device=self.chunk_length.device)
        reach = torch.where(self.has_target, place + self.chunk_length, 0).cummax(0).values
        return (place < reach) & ~self.has_target

    def widen(self, width: int) -> AlignedTargets:
        """The same targets with room for `width` entries a position."""
        more = width - self.ids.shape[-1]
        found: AlignedTargets = super().widen(width)  # type: ignore[assignment]
        return dataclasses.replace(found, foreign=torch.nn.functional.pad(self.foreign, (0, more), value=-torch.inf))

    def foreign_at(self, temperature: float) -> Tensor:
        """`[N, K]` log p_T of the entries that are no tokens of the student, falling.

        Raises:
            TargetError: T was not stored.
        """
        if temperature not in self.temperatures:
            raise self._not_exact(temperature)
        column = self.temperatures.index(temperature)
        return self.foreign / temperature - self.log_partition[..., column, None]

    def unkept_at(self, temperature: float) -> Tensor:
        """`[N]` log of the mass at T of what the teacher did not keep.

        Raises:
            TargetError: T was not stored, or the targets are sampled.
        """
        if self.unkept is None:
            raise TargetError(f"{self.kind} targets have weights, but no log-probability of each entry")
        if temperature not in self.temperatures:
            raise self._not_exact(temperature)
        return self.unkept[..., self.temperatures.index(temperature)]


def map_entries(targets: SparseTargets, ids: Tensor) -> tuple[SparseTargets, Tensor]:
    """Targets in the ids of another vocabulary; those of sampled kinds must have all their entries in it.

    Args:
        targets: at n positions, in the teacher's ids.
        ids: `[ids of the teacher]` the student's id of each, -1 where it has none.

    Returns:
        The targets, and `[n, K]` log p of the entries that the student has not, falling; -inf past the last.
    """
    new = torch.where(targets.valid, ids[targets.ids.long()], -1)  # [n, K]
    kept = new >= 0
    order = (~kept).to(torch.int8).argsort(dim=-1, stable=True)
    count = kept.sum(-1).to(targets.count.dtype)
    there = torch.arange(new.shape[-1]) < count[:, None]
    lost = targets.valid & ~kept
    tail = targets.log_tail
    if tail is not None and bool(lost.any()):
        partition = targets.log_partition[:, None, :]  # [n, 1, n_T]
        soft = targets.logprobs[..., None] / torch.tensor(targets.temperatures, dtype=partition.dtype) - partition
        gone = torch.where(lost[..., None], soft, -torch.inf).logsumexp(1)  # [n, n_T]
        tail = torch.where(lost.any(-1)[:, None], torch.logaddexp(tail, gone.to(tail.dtype)), tail)
    mapped = dataclasses.replace(
        targets,
        ids=torch.where(there, new.gather(-1, order), 0).to(targets.ids.dtype),
        logprobs=torch.where(there, targets.logprobs.gather(-1, order), -torch.inf),
        weights=torch.where(there, targets.weights.gather(-1, order), 0),
        count=count,
        log_tail=tail,
    )
    return mapped, torch.where(lost, targets.logprobs, -torch.inf).sort(-1, descending=True).values
