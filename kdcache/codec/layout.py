"""Layout: what a manifest says of targets before any of them is read, and what follows from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.codec.arrays import Floats, Ids, Ints
from kdcache.errors import ConfigError, TargetError
from kdcache.targets import SAMPLED_KINDS, TRUNCATED_KINDS, SparseTargets


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The targets of one cache.

    Attributes:
        kind: the selection.
        width: K, the most entries of a position.
        vocab_size: ids lie below it.
        temperatures: T of each stored partition and tail; 1 among them.
        draws: N of `sample`.
        force_label: whether `sample` keeps the label apart from its draws.
        sample_temperature: T of the p_T that sampled weights estimate, one of `temperatures`.

    Raises:
        ConfigError: settings that no selection has.
    """

    kind: str
    width: int
    vocab_size: int
    temperatures: tuple[float, ...]
    draws: int | None = None
    force_label: bool = False
    sample_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in (*TRUNCATED_KINDS, *SAMPLED_KINDS):
            raise ConfigError(f"--select {self.kind} is not a kind that can be stored")
        if not 1 <= self.vocab_size < 1 << 31:
            raise ConfigError(f"a vocabulary of {self.vocab_size} tokens is outside 1 to 2^31 - 1")
        if not 1 <= self.width <= self.vocab_size or (self.kind == "full" and self.width != self.vocab_size):
            raise ConfigError(f"targets of {self.width} entries do not fit --select {self.kind} of {self.vocab_size}")
        if 1.0 not in self.temperatures:
            raise ConfigError("a cache must store temperature 1")
        if self.sampled and self.sample_temperature not in self.temperatures:
            raise ConfigError(f"--sample-temperature {self.sample_temperature:g} is not among the temperatures")
        if self.kind != "sample":
            if self.draws is not None:
                raise ConfigError(f"--draws is {self.draws}, but only --select sample has it, not {self.kind}")
        elif self.draws is None or not 1 <= self.draws < 1 << 16:
            raise ConfigError(f"--draws is {self.draws}, outside 1 to 65535")

    @property
    def sampled(self) -> bool:
        """Whether weights are estimates; then there is no tail."""
        return self.kind in SAMPLED_KINDS

    @property
    def ragged(self) -> bool:
        """Whether positions may differ in their number of entries."""
        return self.kind not in ("topk", "full")

    @property
    def named_ids(self) -> bool:
        """Whether ids are stored; `full` has every id, in order."""
        return self.kind != "full"

    @property
    def heavies(self) -> bool:
        """Whether some entries of a sampled kind have a probability of their own; the others are the lights."""
        return self.kind == "ipps" or (self.kind == "sample" and self.force_label)

    @property
    def own_temperature(self) -> float:
        """T of the weights: 1 for truncated kinds."""
        return self.sample_temperature if self.sampled else 1.0

    @cached_property
    def others(self) -> list[int]:
        """Columns of the temperatures other than 1, whose partition is not 0."""
        return [column for column, t in enumerate(self.temperatures) if t != 1]

    @property
    def multiplicity_dtype(self) -> np.dtype[Any]:
        """Of a number of draws."""
        return np.dtype("<u1" if self.draws is not None and self.draws < 256 else "<u2")

    def counts(self, targets: SparseTargets) -> Ints:
        """`[n]` entries of each position.

        Raises:
            TargetError: targets of another layout, or a position without entries.
        """
        if targets.ids.shape[1:] != (self.width,) or targets.temperatures != self.temperatures:
            raise TargetError(
                f"targets of {tuple(targets.ids.shape)} entries at temperatures {targets.temperatures} are not "
                f"[n, {self.width}] at {self.temperatures}"
            )
        counts: Ints = targets.count.numpy().astype(np.int64)
        if ((counts < 1) | (counts > self.width)).any() or (not self.ragged and (counts != self.width).any()):
            raise TargetError(f"a position has more or fewer entries than --select {self.kind} keeps")
        return counts

    def targets(
        self,
        *,
        ids: Ids,
        logprobs: Floats,
        weights: Floats,
        counts: NDArray[np.int32],
        log_partition: Floats,
        log_tail: Floats,
        entropy: Floats,
        label_logprob: Floats,
    ) -> SparseTargets:
        """Targets of decoded arrays, which they share; per-temperature ones come as `[n, n_T]`."""
        return SparseTargets(
            ids=torch.from_numpy(ids),
            logprobs=torch.from_numpy(logprobs),
            weights=torch.from_numpy(weights),
            count=torch.from_numpy(counts),
            log_partition=torch.from_numpy(log_partition),
            log_tail=torch.from_numpy(log_tail),
            entropy=torch.from_numpy(entropy),
            label_logprob=torch.from_numpy(label_logprob),
            temperatures=self.temperatures,
            kind=self.kind,
            sample_temperature=self.own_temperature,
        )
