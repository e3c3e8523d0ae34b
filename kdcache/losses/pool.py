"""Pool: targets of several teachers over the same positions, and the weight of each.

The pool of distributions p_m is sum_m w_m p_m, each softened first. What its teachers keep decides how near a loss
comes to it:

    everything   the pool is made, and any divergence is exact
    samples      weights are an unbiased estimate of p_m, so pooled weights are one of the pool
    truncated    the losses to each are summed; where their entries differ, the optimum is not the pool

A teacher without a target at a position is left out there, and the others get none of its weight: the position counts
as much as the weights of those that have one. docs/mathematics.md derives all of this.

Shapes: N positions, V vocabulary, K entries.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.errors import TargetError
from kdcache.targets import SparseTargets


@dataclass(frozen=True)
class Pool:
    """What one or several teachers say of the same positions.

    Attributes:
        targets: of each teacher; all over N positions, all sampled or all truncated.
        weights: of each teacher, positive; they are made to sum to 1.

    Raises:
        TargetError: no teacher, a weight that is not positive, or targets that cannot be pooled.
    """

    targets: tuple[SparseTargets, ...]
    weights: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if not self.targets or len(self.targets) != len(self.weights):
            raise TargetError(f"a pool has {len(self.targets)} teacher(s), but {len(self.weights)} weight(s)")
        for weight in self.weights:
            if not 0 < weight < math.inf:
                raise TargetError(f"the weight of a teacher is {weight:g}, but must be positive")
        first = self.targets[0]
        for other in self.targets[1:]:
            if other.count.shape != first.count.shape:
                raise TargetError(
                    f"targets of shape {tuple(first.count.shape)} and {tuple(other.count.shape)} cannot be pooled"
                )
            require_alike((first.kind, first.sampled), (other.kind, other.sampled))
        total = math.fsum(self.weights)
        if abs(total - 1) < 1e-12:  # a pool made again of its own weights keeps them to the last bit
            total = 1.0
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "weights", tuple(weight / total for weight in self.weights))

    @staticmethod
    def of(targets: SparseTargets | Pool) -> Pool:
        """A pool as it is; other targets as a pool of one."""
        return targets if isinstance(targets, Pool) else Pool((targets,))

    def map(self, f: Callable[[SparseTargets], SparseTargets]) -> Pool:
        """The same pool of other targets."""
        return dataclasses.replace(self, targets=tuple(f(targets) for targets in self.targets))

    def __getitem__(self, index: slice | Tensor) -> Pool:
        return self.map(lambda targets: targets[index])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Pool:
        """The same pool on another device."""
        return self.map(lambda targets: targets.to(device, non_blocking))

    def pin_memory(self) -> Pool:
        """The same pool in page-locked memory."""
        return self.map(SparseTargets.pin_memory)

    @staticmethod
    def cat(parts: Sequence[Pool]) -> Pool:
        """Join pools of the same teachers along the first axis."""
        columns = zip(*(part.targets for part in parts), strict=True)
        return dataclasses.replace(parts[0], targets=tuple(SparseTargets.cat(list(column)) for column in columns))

    @property
    def count(self) -> Tensor:
        """`[N]` entries of the teacher that has most; 0 where none has a target."""
        return torch.stack([targets.count for targets in self.targets]).amax(0)

    @property
    def has_target(self) -> Tensor:
        """`[N]` bool: where at least one of them has a target."""
        return torch.stack([targets.has_target for targets in self.targets]).any(0)

    @property
    def present(self) -> Tensor:
        """`[teachers, N]` weight of each teacher at each position, 0 where it has no target."""
        weights = zip(self.weights, self.targets, strict=True)
        return torch.stack([(targets.count > 0).to(targets.weights.dtype) * weight for weight, targets in weights])

    @property
    def entropy(self) -> Tensor | None:
        """`[N]` mean entropy of the teachers that have a target, see `require`; None where one does not know it."""
        known = all(targets.entropy is not None for targets in self.targets)
        return self.require("entropy", "a pool") if known else None

    def require(self, field: str, what: str) -> Tensor:
        """`[N]` mean entropy, or mean log p of the label, of the teachers that have a target, by their weights.

        The mean of the entropies is at most the entropy of the pool.

        Args:
            field: `entropy` or `label_logprob`.
            what: what needs it, as the subject of a sentence.

        Raises:
            TargetError: a teacher does not know it.
        """
        weights = self.present
        total = (weights * torch.stack([targets.require(field, what) for targets in self.targets])).sum(0)
        return total / weights.sum(0).clamp(min=torch.finfo(total.dtype).tiny)

    def keeps_everything(self, vocab: int) -> bool:
        """Whether all teachers keep all of a vocabulary, so that p itself can be pooled."""
        return all(
            targets.log_tail is not None
            and targets.ids.shape[-1] == vocab
            and bool(torch.isneginf(targets.log_tail[..., 0][targets.count > 0]).all())
            for targets in self.targets
        )

    def dense(self, temperature: float, vocab: int) -> tuple[SparseTargets, Tensor]:
        """The pool itself, of teachers that keep everything.

        Returns:
            Targets at T = 1, ids in order; and `[N, V]` log of the pool of what they are at T, which is
            not what the pool at T = 1 would be softened to.
        """
        present = self.present
        share = (present / present.sum(0).clamp(min=torch.finfo(present.dtype).tiny)).log()  # [teachers, N]
        plain, soft = (  # [N, V] each
            _mixture(torch.stack([_in_order(targets, t, vocab) for targets in self.targets]), share[..., None])
            for t in (1.0, temperature)
        )
        first = self.targets[0]
        labels = [targets.label_logprob for targets in self.targets if targets.label_logprob is not None]
        partition = torch.zeros_like(first.log_partition[..., :1])
        targets = SparseTargets(
            ids=torch.arange(vocab, device=plain.device).expand_as(plain),
            logprobs=plain,
            weights=plain.exp(),
            count=self.count.clamp(max=1) * vocab,
            log_partition=partition,
            log_tail=torch.full_like(partition, -torch.inf),
            entropy=torch.special.entr(plain.exp()).sum(-1),
            label_logprob=_mixture(torch.stack(labels), share) if len(labels) == len(self.targets) else None,
            kind=first.kind,
        )
        return targets, soft


def require_alike(one: tuple[str, bool], other: tuple[str, bool]) -> None:
    """Refuse to pool samples with anything else.

    Args:
        one, other: name of a kind, and whether its targets are sampled.

    Raises:
        TargetError: one kind is sampled and the other is not.
    """
    if one[1] != other[1]:
        raise TargetError(f"{one[0]} and {other[0]} targets cannot be pooled: one kind is sampled and the other is not")


def _mixture(log_p: Tensor, log_share: Tensor) -> Tensor:
    """`[...]` log of the mean of distributions `[teachers, ...]`."""
    return (log_p + log_share).logsumexp(0)


def _in_order(targets: SparseTargets, temperature: float, vocab: int) -> Tensor:
    """`[N, V]` log p_T in the order of ids; -inf where there is no target."""
    log_p, _ = targets.at_temperature(temperature)
    ids = torch.where(targets.valid, targets.ids.long(), vocab)  # what is past `count` goes into a column of its own
    found = log_p.new_full((len(log_p), vocab + 1), -torch.inf)
    return found.scatter(-1, ids, log_p)[:, :vocab]
