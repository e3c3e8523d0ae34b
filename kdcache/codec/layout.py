"""Codec: what a store may ask of one.

Sampled: what `sample` and `ipps` store, and the weights that follow.

An entry of a sampled target is heavy or light. Heavies have a probability of their own: those above tau of `ipps`, and
the forced label of `sample`. Lights share what the heavies leave: equally in `ipps`, by how often they were drawn in
`sample`. So a position needs the log-odds of the lights' mass, and neither tau nor the lights' values.

Where one of the two classes is empty the other has all the mass, and the log-odds say nothing.

Shapes: n positions, K entries.

Layout: what a manifest says of targets before any of them is read, and what follows from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.codec.streams import Floats, Ids, Ints, Shapes, Streams
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


def light_odds(weights: NDArray[np.float64], light: NDArray[np.bool_]) -> NDArray[np.float64]:
    """`[n]` log-odds of the lights' mass; both masses summed directly, for one minus the other would cancel."""
    with np.errstate(divide="ignore", invalid="ignore"):
        odds = np.log((weights * light).sum(-1)) - np.log((weights * ~light).sum(-1))
    return np.where(np.isnan(odds), -np.inf, odds)


def multiplicities(layout: Layout, weights: NDArray[np.float64], light: NDArray[np.bool_]) -> Ints:
    """`[n, K]` how often each light of `sample` was drawn, 0 for others.

    Raises:
        TargetError: weights that are no counts of N draws.
    """
    draws = layout.draws or 0
    mass = (weights * light).sum(-1, keepdims=True)
    share = np.divide(weights * draws, mass, out=np.zeros_like(weights), where=light)
    counts: Ints = np.rint(share).astype(np.int64)
    drawn = counts.sum(-1)
    if (np.abs(share - counts) > 1e-3 * np.maximum(counts, 1)).any() or ((drawn != draws) & light.any(-1)).any():
        raise TargetError(f"a target's weights are not the counts of {draws} draws")
    return counts


def renyi(layout: Layout, targets: SparseTargets, column: int) -> NDArray[np.float64]:
    """`[n]` Rényi entropy of order 1/T: log sum p^(1/T) over 1 - 1/T; from 0 to log V at every T."""
    t = layout.temperatures[column]
    return np.asarray(targets.log_partition[:, column].double().numpy() / (1 - 1 / t), np.float64)


class Codec(Protocol):
    """SparseTargets of a row to named streams of numbers, and back."""

    @property
    def layout(self) -> Layout:
        """What the targets are, whatever their precision."""

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """Of a stored token id."""

    @property
    def orders_ids(self) -> bool:
        """Whether an order of ids by frequency makes the streams smaller."""

    @property
    def error_bound(self) -> dict[str, float]:
        """The most by which each stored number is off, by name: what the manifest promises."""

    def streams(self, positions: int) -> Shapes:
        """Little-endian type and largest shape of each stream of a row with so many positions.

        Names and their order depend on the codec alone; a stream may be shorter than its shape.
        """

    def encode(self, targets: SparseTargets) -> Streams:
        """Pack the targets of one row's n positions into one-dimensional contiguous arrays.

        Raises:
            TargetError: targets that are not what this codec was made for.
        """

    def decode(self, streams: Mapping[str, NDArray[Any]], positions: int) -> SparseTargets:
        """Unpack the targets of a row that has `positions` of them; nothing in `streams` is trusted.

        Raises:
            CorruptCacheError: a stream whose length or numbers cannot be what was encoded.
        """
