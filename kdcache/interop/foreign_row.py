"""ForeignRow: one sequence of another tool's cache, with the entries that the cache keeps of its teacher.

Every reader gives these, so an import and an audit do not know formats. Guarantee: a row that was built is consistent:
lengths agree, slots rise and lie inside the sequence, ids are not negative. Whether its numbers are those of a teacher
is for `kdcache audit` to find out.

Shapes: n tokens, m targets, K entries a target, P pieces.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.errors import CorpusError
from kdcache.targets import SparseTargets

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_MASS_ROUNDING = 1e-6
"""By how much a mass in float64 may exceed 1 before it is scaled."""

_MOST_MASS = 1.5
"""A mass above it comes of no rounding."""


@dataclass(frozen=True, kw_only=True)
class ForeignRow:
    """One sequence, and targets at some of its slots.

    Attributes:
        tokens: `[n]` token ids.
        slots: `[m]` slots with a target, rising: target i is of what follows the tokens 0 to slots[i].
        ids: `[m, K]` token ids of the entries; anything past `count`.
        values: `[m, K]` what the cache keeps of each entry: see `ForeignCache.values`. -inf, or 0 of weights, past
            `count`.
        count: `[m]` entries in use.
        label_logprob: `[m]` log p of the token that follows; None where the cache does not say it.
        log_tail: `[m]` log of the mass that was not kept, where the cache says it; None where it is what the entries
            lack to 1.
        piece_lengths: `[P]` tokens of each piece of the sequence; None where the cache does not say where pieces begin.
        where: its place in the cache, for messages.

    Raises:
        CorpusError: lengths that do not agree, or a slot or id that cannot be.
    """

    tokens: Ints
    slots: Ints
    ids: Ints
    values: Floats
    count: Ints
    label_logprob: Floats | None = None
    log_tail: Floats | None = None
    piece_lengths: Ints | None = None
    where: str = "a row"

    def __post_init__(self) -> None:
        n, m = len(self.tokens), len(self.slots)
        if not n:
            raise CorpusError(f"{self.where} has no tokens")
        if self.tokens.ndim != 1 or self.ids.shape != self.values.shape or self.ids.ndim != 2:
            raise CorpusError(
                f"{self.where} has tokens {self.tokens.shape}, ids {self.ids.shape} and values {self.values.shape}, "
                "which do not fit"
            )
        if len(self.ids) != m or self.count.shape != (m,):
            raise CorpusError(f"{self.where} has {len(self.ids)} lists of entries for {m} slots")
        if m and (self.slots[0] < 0 or self.slots[-1] >= n or (np.diff(self.slots) < 1).any()):
            raise CorpusError(f"{self.where} has targets at slots that its {n} tokens do not have")
        if m and (self.count.min() < 0 or self.count.max() > self.ids.shape[1]):
            raise CorpusError(f"{self.where} has more entries at a slot than it has room for")
        used = self.used
        if self.tokens.min() < 0 or (self.ids[used] < 0).any():
            raise CorpusError(f"{self.where} has a negative token id")
        if np.isnan(self.values[used]).any():
            raise CorpusError(f"{self.where} has a value that is not a number")
        pieces = self.piece_lengths
        if pieces is not None and (len(pieces) == 0 or pieces.min() < 1 or pieces.sum() != n):
            raise CorpusError(f"{self.where} has pieces of {pieces.sum()} tokens together, but {n} tokens")

    @property
    def used(self) -> NDArray[np.bool_]:
        """`[m, K]` which entries are in use."""
        return np.arange(self.ids.shape[1]) < self.count[:, None]

    @property
    def mass(self) -> Floats:
        """`[m]` what the entries add up to, of values that are log-probabilities."""
        mass: Floats = np.where(self.used, np.exp(self.values), 0).sum(-1)
        return mass

    def take(self, which: NDArray[Any]) -> ForeignRow:
        """The same sequence with some of its targets only."""
        changes: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[which]
            for name in ("slots", "ids", "values", "count", "label_logprob", "log_tail")
        }
        return dataclasses.replace(self, **changes)

    def with_labels(self) -> ForeignRow:
        """Only the targets of slots that have a next token in the same piece, and at least one entry."""
        inside = np.ones(len(self.tokens), bool)
        inside[-1] = False
        if self.piece_lengths is not None:
            inside[np.cumsum(self.piece_lengths) - 1] = False
        return self.take(inside[self.slots] & (self.count > 0))


def supervised_tokens(row: ForeignRow) -> NDArray[np.bool_]:
    """`[n]` which tokens are labels, so that exactly the slots of a row (`with_labels`) are labelled."""
    mask = np.zeros(len(row.tokens), bool)
    mask[row.slots + 1] = True
    return mask


@dataclass
class Scaled:
    """What became of masses above 1.

    Attributes:
        positions: targets whose entries were scaled to a mass of 1.
        most: the largest mass that any had.
    """

    positions: int = 0
    most: float = 1.0


def to_targets(row: ForeignRow, width: int, kind: str, scaled: Scaled) -> SparseTargets:
    """Targets `[m]` of a row whose values are log-probabilities.

    Entries whose rounded log-probabilities add up to more than 1 are scaled to 1, and counted.

    Args:
        row: targets of labelled slots only.
        width: entries that there is room for; a position with more keeps the largest.
        kind: `topk`, where all positions have `width` entries, or `topp`.
        scaled: counts the positions that were scaled.

    Raises:
        CorpusError: a mass that comes of no rounding, or an infinite log-probability.
        TargetError: an id twice at a position.
    """
    used, most = row.used, float(row.mass.max(initial=0))
    if most > _MOST_MASS:
        raise CorpusError(f"{row.where} has entries of a mass of {most:.2f}, so its values are no log-probabilities")
    if not np.isfinite(row.values[used]).all():
        raise CorpusError(f"{row.where} has an entry whose probability is 0 or infinite")
    above = np.where(row.mass > 1 + _MASS_ROUNDING, np.log(np.maximum(row.mass, 1)), 0)
    scaled.positions, scaled.most = scaled.positions + int((above > 0).sum()), max(scaled.most, most)
    logprobs = np.minimum(row.values - above[:, None], 0)
    order = np.argsort(np.where(used, -logprobs, np.inf), axis=-1, kind="stable")[:, :width]
    ids, logprobs = np.take_along_axis(row.ids, order, -1), np.take_along_axis(logprobs, order, -1)
    counts = np.minimum(row.count, width)
    label = None if row.label_logprob is None else np.minimum(row.label_logprob, 0)
    parts, places = [], []
    for count in np.unique(counts):
        here = np.flatnonzero(counts == count)
        targets = SparseTargets.from_topk(
            torch.from_numpy(ids[here, :count]), torch.from_numpy(logprobs[here, :count]),
            label_logprob=None if label is None else torch.from_numpy(label[here]),
        )  # fmt: skip
        parts.append(dataclasses.replace(targets.widen(width), kind=kind))
        places.append(here)
    if not parts:
        empty = SparseTargets.from_topk(
            torch.zeros(0, width, dtype=torch.int64), torch.zeros(0, width),
            label_logprob=None if label is None else torch.zeros(0),
        )  # fmt: skip
        return dataclasses.replace(empty, kind=kind)
    return SparseTargets.cat(parts)[torch.from_numpy(np.argsort(np.concatenate(places)))]
