"""Layout: what is known of all targets of a cache, what follows from it, and what a store may call of a codec.

An entry of a sampled target is heavy or light. Heavies have a probability of their own: those above tau of `ipps`, and
the forced label of `sample`. Lights share what the heavies leave: equally in `ipps`, by how often they were drawn in
`sample`. So a position needs the log-odds of the lights' mass, and neither tau nor the lights' values. Where one of the
two classes is empty the other has all the mass, and the log-odds have no meaning.

Shapes: n positions, K entries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.streams import Columns, Floats, Ids, Ints, Shapes, Streams
from kdcache.entry_form import EntryForm
from kdcache.errors import ConfigError, TargetError
from kdcache.known import Known
from kdcache.lazy_torch import torch
from kdcache.targets import SparseTargets


class Selected(Protocol):
    """What a codec asks of a selection."""

    @property
    def kind(self) -> str:
        """Its name."""

    @property
    def form(self) -> EntryForm:
        """Of its entries."""

    @property
    def target_temperature(self) -> float:
        """T of the p_T that sampled weights estimate."""

    def width(self, vocab_size: int) -> int:
        """K, the most entries of a position."""

    def known(self, temperatures: Sequence[float]) -> Known:
        """What its targets know that were selected from whole logits."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The targets of one cache.

    Attributes:
        kind: the selection's name.
        form: of its entries.
        width: K, the most entries of a position.
        vocab_size: ids lie below it.
        temperatures: T of each stored partition and tail; 1 among them.
        known: what the targets know; nothing else is stored.
        sample_temperature: T of the p_T that sampled weights estimate, one of `temperatures`.

    Raises:
        ConfigError: settings that no selection has.
    """

    kind: str
    form: EntryForm
    width: int
    vocab_size: int
    temperatures: tuple[float, ...]
    known: Known
    sample_temperature: float = 1.0

    @staticmethod
    def of(
        rule: Selected, vocab_size: int, temperatures: tuple[float, ...] = (1.0,), known: Known | None = None
    ) -> Layout:
        """The layout of a selection's targets over a vocabulary; by default of those selected from whole logits."""
        return Layout(
            kind=rule.kind, form=rule.form, width=rule.width(vocab_size), vocab_size=vocab_size,
            temperatures=temperatures, known=known or rule.known(temperatures),
            sample_temperature=rule.target_temperature,
        )  # fmt: skip

    def __post_init__(self) -> None:
        if not 1 <= self.vocab_size < 1 << 31:
            raise ConfigError(f"a vocabulary of {self.vocab_size} tokens is outside 1 to 2^31 - 1")
        if not 1 <= self.width <= self.vocab_size or (self.form.every_id and self.width != self.vocab_size):
            raise ConfigError(f"targets of {self.width} entries do not fit kind {self.kind} of {self.vocab_size}")
        if 1.0 not in self.temperatures:
            raise ConfigError("a cache must store temperature 1")
        if self.sampled and self.sample_temperature not in self.temperatures:
            raise ConfigError(f"sample_temperature {self.sample_temperature:g} is not among the temperatures")
        if self.draws is not None and not 1 <= self.draws < 1 << 16:
            raise ConfigError(f"draws is {self.draws}, outside 1 to 65535")
        tails = () if self.sampled else self.temperatures
        if self.known.partitions != self.temperatures or self.known.tails != tails:
            raise ConfigError(
                f"targets of kind {self.kind} at {len(self.temperatures)} temperature(s) know the partition at each of "
                f"them, and the tail at {'none' if self.sampled else 'each'}"
            )

    @property
    def sampled(self) -> bool:
        """Whether weights are estimates; then there is no tail."""
        return self.form.sampled

    @property
    def ragged(self) -> bool:
        """Whether positions may differ in their number of entries."""
        return self.form.ragged

    @property
    def named_ids(self) -> bool:
        """Whether ids are stored; else each position has every id, in order."""
        return not self.form.every_id

    @property
    def draws(self) -> int | None:
        """N where a light weighs how often it was drawn in N draws; None where all lights of a position weigh alike."""
        return None if self.form.free_weights else self.form.draws

    @property
    def most_heavies(self) -> int:
        """Of a sampled kind, the most entries of a position that have a probability of their own."""
        most = None if self.form.free_weights else self.form.most_heavies
        return self.width if most is None else most

    @property
    def heavies(self) -> bool:
        """Whether some entries of a sampled kind have a probability of their own; the others are the lights."""
        return self.sampled and self.most_heavies > 0

    @property
    def own_temperature(self) -> float:
        """T of the weights: 1 for truncated kinds."""
        return self.sample_temperature if self.sampled else 1.0

    @cached_property
    def others(self) -> list[int]:
        """Columns of the temperatures other than 1, whose partition is not 0."""
        return [column for column, t in enumerate(self.temperatures) if t != 1]

    @property
    def tails(self) -> list[int]:
        """Columns of the temperatures whose tail is stored: all, or none where there is no tail or nothing in it."""
        return list(range(len(self.temperatures))) if self.known.tails and self.named_ids else []

    @property
    def multiplicity_dtype(self) -> np.dtype[Any]:
        """Of a number of draws."""
        return np.dtype("<u1" if self.draws is not None and self.draws < 256 else "<u2")

    def counts(self, targets: SparseTargets) -> Ints:
        """`[n]` entries of each position.

        Raises:
            TargetError: targets of another layout, that know less or more, or a position without entries.
        """
        if targets.ids.shape[1:] != (self.width,) or targets.temperatures != self.temperatures:
            raise TargetError(
                f"targets of {tuple(targets.ids.shape)} entries at temperatures {targets.temperatures} are not "
                f"[n, {self.width}] at {self.temperatures}"
            )
        if targets.sampled != self.sampled:
            raise TargetError(f"targets of kind {targets.kind} do not fit kind {self.kind}")
        for name in ("entropy", "label_logprob"):
            values, known = getattr(targets, name), getattr(self.known, name)
            if values is None and known:
                raise TargetError(f"targets have no {name}, which the cache is to know")
            if values is not None and not known:
                raise TargetError(f"targets have {name}, which the cache is not to know")
            if values is not None and np.isnan(values.numpy().sum()):  # one pass; a sum with a NaN is one
                raise TargetError(f"{name} of a position is not a number")
        counts: Ints = targets.count.numpy().astype(np.int64)
        if ((counts < 1) | (counts > self.width)).any() or (not self.ragged and (counts != self.width).any()):
            raise TargetError(f"a position has more or fewer entries than kind {self.kind} keeps")
        return counts

    def targets(
        self,
        *,
        ids: Ids,
        logprobs: Floats,
        weights: Floats,
        counts: NDArray[np.int32],
        log_partition: Floats,
        log_tail: Floats | None,
        entropy: Floats | None,
        label_logprob: Floats | None,
    ) -> SparseTargets:
        """Targets of decoded arrays, which they share; per-temperature ones come as `[n, n_T]`."""
        return SparseTargets(
            ids=torch.from_numpy(ids),
            logprobs=torch.from_numpy(logprobs),
            weights=torch.from_numpy(weights),
            count=torch.from_numpy(counts),
            log_partition=torch.from_numpy(log_partition),
            log_tail=None if log_tail is None else torch.from_numpy(log_tail),
            entropy=None if entropy is None else torch.from_numpy(entropy),
            label_logprob=None if label_logprob is None else torch.from_numpy(label_logprob),
            temperatures=self.temperatures,
            kind=self.kind,
            sample_temperature=self.own_temperature,
        )


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

    def columns(self, streams: Mapping[str, NDArray[Any]], positions: int) -> Columns:
        """What streams that `decode` has accepted store of each position, by name.

        Positions of several rows can be joined, whatever the order of ids of each: nothing is rounded again.
        """

    def from_columns(self, columns: Columns) -> Streams:
        """The streams of positions; of all those of one row, taken as they are, its own streams again."""
