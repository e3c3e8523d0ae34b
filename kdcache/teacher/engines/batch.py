"""A batch of packed rows as an engine is given it: padded rows, or one piece at a time.

Everything follows from the rows, so engines cannot disagree on which slots are labelled, in which order, or on the keys
of their random numbers. Nothing is computed before it is asked for.

Shapes: R rows, L slots a row, N labelled slots of the batch, n tokens of a piece, m of its slots that are labelled.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdcache.rows import IGNORE, PackedRow, RowSpec


@dataclass(frozen=True, eq=False)
class Piece:
    """One context of a batch: tokens that see each other and nothing else.

    Attributes:
        tokens: `[n]` int64.
        slots: `[m]` int64, those of its tokens that are labelled: what is wanted is the distribution after each.
        first: index, among the labelled slots of the batch, of the first of them; the others follow it.
    """

    tokens: Tensor
    slots: Tensor
    first: int


@dataclass(frozen=True, eq=False)
class Batch:
    """Packed rows of one shard.

    Attributes:
        rows: the rows.
        spec: their common shape.
        shard: theirs.
        first_row: number of the first of them in the shard.
        places: `[n, 2]` of each row, the row of the shard and the slot there that each of its tokens belongs to, where
            these rows are not those of the shard; None where they are.
        every_slot: take every token's slot for labelled; `labels` is then -100 where there is none.
    """

    rows: Sequence[PackedRow]
    spec: RowSpec
    shard: int = 0
    first_row: int = 0
    places: Sequence[NDArray[np.int64]] | None = None
    every_slot: bool = False

    @cached_property
    def length(self) -> int:
        """L, the slots of each row: `seq_len`, or where rows are not packed or not of a shard the longest's tokens."""
        return self.spec.length(self.rows) if self.places is None else max(len(row.tokens) for row in self.rows)

    @cached_property
    def tokens(self) -> Tensor:
        """`[R, L]` int64, 0 where padded."""
        return torch.from_numpy(np.stack([row.padded_tokens(self.length) for row in self.rows]))

    @cached_property
    def segments(self) -> Tensor:
        """`[R, L]` int64, the piece of each token, -1 where padded."""
        return torch.from_numpy(np.stack([row.segments(self.length) for row in self.rows]))

    @cached_property
    def position_ids(self) -> Tensor:
        """`[R, L]` int64, restarting where a context begins: at each piece, or once a row if rows are not isolated."""
        return torch.from_numpy(self.spec.position_ids(self.segments.numpy()))

    @cached_property
    def _labels(self) -> Tensor:
        return torch.from_numpy(np.stack([row.labels(self.length) for row in self.rows]))  # [R, L]

    @cached_property
    def _wanted(self) -> Tensor:
        return self.segments >= 0 if self.every_slot else self._labels != IGNORE  # [R, L]

    @cached_property
    def slots(self) -> Tensor:
        """`[N, 2]` int64, row and slot of each labelled slot, row after row."""
        return self._wanted.nonzero()

    @cached_property
    def labels(self) -> Tensor:
        """`[N]` int64, the true next token at each."""
        return self._labels[self._wanted]

    @cached_property
    def keys(self) -> Tensor:
        """`[N, 3]` int64, shard, row and slot of each, which its random numbers are drawn from."""
        slots = self.slots
        places = slots + torch.tensor([self.first_row, 0])
        if self.places is not None:
            wanted = [mask[: len(row.tokens)] for mask, row in zip(self._wanted, self.rows, strict=True)]
            places = torch.from_numpy(np.concatenate(self.places))[torch.cat(wanted)]
        return torch.cat([torch.full_like(slots[:, :1], self.shard), places], -1)

    def places_of(self, number: int) -> NDArray[np.int64]:
        """`[n, 2]` the row of the shard and the slot there that each token of a row belongs to."""
        if self.places is not None:
            return self.places[number]
        slots = np.arange(len(self.rows[number].tokens), dtype=np.int64)
        return np.stack([np.full_like(slots, self.first_row + number), slots], -1)

    @cached_property
    def counts(self) -> list[int]:
        """Labelled slots of each row."""
        return [int(count) for count in self._wanted.sum(-1)]

    @cached_property
    def token_counts(self) -> list[int]:
        """Tokens of each row."""
        return [len(row.tokens) for row in self.rows]

    def pieces(self, *, every: bool = False) -> Iterator[Piece]:
        """The contexts in order; their slots together are the batch's.

        Args:
            every: also those without a labelled slot, which are left out otherwise.
        """
        first = 0
        for row, wanted in zip(self.rows, self._wanted, strict=True):
            for context in self.spec.contexts(row):
                slots = wanted[context].nonzero()[:, 0]
                if every or len(slots):
                    tokens = torch.from_numpy(row.tokens[context].astype(np.int64))
                    yield Piece(tokens=tokens, slots=slots, first=first)
                first += len(slots)


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A copy on a device; the copying may still be under way."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
