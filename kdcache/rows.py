"""PackedRow: one row of tokens, and everything that follows from where its pieces are.

A row of `seq_len` slots is packed from pieces, each a run of one document, followed by
padding. Labels, segments and position ids are derived here and nowhere else, so teacher and
student cannot disagree about them. Cost: a few vectorised passes over one row.

Shapes: L slots a row (`seq_len`), n <= L tokens in it, P pieces.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.prefixes import NO_PREFIX, Prefix, Prefixes

IGNORE = -100
"""The label of a slot that carries no target, as in PyTorch and transformers."""

Ints = NDArray[np.integer[Any]]


@dataclass(frozen=True, kw_only=True)
class RowSpec:
    """The shape of the rows that a cache holds and a model is given.

    Attributes:
        vocab_size: token ids lie below it.
        seq_len: slots a row.
        isolate: whether the packed pieces of a row are kept from seeing each other.
        packed: whether rows hold several pieces. Otherwise each is one, so that there is nothing to isolate, and a
            batch of them is padded to its longest only.
        ragged: whether rows of several pieces, too, are padded to the longest of a batch only: those of a student whose
            tokens are more, or fewer, than the cache's.
    """

    vocab_size: int
    seq_len: int
    isolate: bool = True
    packed: bool = True
    ragged: bool = False

    def length(self, rows: Sequence[PackedRow]) -> int:
        """L, the slots of each row in a batch of these."""
        return self.seq_len if self.packed and not self.ragged else max(len(row.tokens) for row in rows)

    def contexts(self, row: PackedRow) -> list[slice]:
        """The tokens of each context of a row: those that a teacher sees together, and no others."""
        if not self.isolate:
            return [slice(0, len(row.tokens))]
        ends = np.cumsum(row.piece_lengths).tolist()
        return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]

    def position_ids(self, segments: NDArray[np.int64]) -> NDArray[np.int64]:
        """`[..., L]` restarting where a context begins: at each piece, or once a row where rows are not isolated."""
        return position_ids(segments if self.isolate else np.zeros_like(segments))


@dataclass(frozen=True, kw_only=True)
class PackedRow:
    """Tokens of one row and the pieces they belong to.

    Attributes:
        tokens: `[n]` int32, without padding.
        piece_lengths: `[P]` int32, summing to n.
        piece_documents: `[P]` int64, index of each piece's document in the corpus.
        supervised: `[n]` bool, whether each token may be a label; None when all may.
        extras: `[n, width]` float32 of each extra of the cache that the row is read from, by name; NaN where a token
            has none. In a row that is not read from a cache, those that its corpus brings.
        prefixes: what the teacher reads in front of each piece; None where it reads what its student does. Nothing of
            it is in `tokens`, and no student is given it.
    """

    tokens: Ints
    piece_lengths: Ints
    piece_documents: Ints
    supervised: NDArray[np.bool_] | None = None
    extras: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    prefixes: Prefixes | None = None

    def segments(self, seq_len: int) -> NDArray[np.int64]:
        """`[L]` the piece of each token, -1 where padded."""
        out = np.full(seq_len, -1, np.int64)
        out[: len(self.tokens)] = np.repeat(np.arange(len(self.piece_lengths)), self.piece_lengths)
        return out

    def padded_tokens(self, seq_len: int) -> NDArray[np.int64]:
        """`[L]` token ids, 0 where padded."""
        out = np.zeros(seq_len, np.int64)
        out[: len(self.tokens)] = self.tokens
        return out

    def padded_extras(self, seq_len: int) -> dict[str, NDArray[np.float32]]:
        """`[L, width]` of each extra, NaN where padded."""
        out = {}
        for name, values in self.extras.items():
            out[name] = np.full((seq_len, values.shape[1]), np.nan, np.float32)
            out[name][: len(values)] = values
        return out

    def labels(self, seq_len: int) -> NDArray[np.int64]:
        """`[L]` labels[t] = tokens[t+1] where both lie in one piece and t+1 is supervised, else -100."""
        out = np.full(seq_len, IGNORE, np.int64)
        n = len(self.tokens)
        if n > 1:
            segments = self.segments(seq_len)[:n]
            keep = segments[:-1] == segments[1:]
            if self.supervised is not None:
                keep &= self.supervised[1:]
            out[: n - 1][keep] = self.tokens[1:][keep]
        return out

    def prefix(self, piece: int) -> Prefix:
        """What the teacher reads in front of a piece."""
        return NO_PREFIX if self.prefixes is None else self.prefixes[piece]

    def locate(self, slot: int) -> tuple[int, int]:
        """The document that slot `slot` belongs to, and the token's offset inside its piece."""
        starts = np.cumsum(self.piece_lengths) - self.piece_lengths
        piece = int(np.searchsorted(starts, slot, side="right")) - 1
        return int(self.piece_documents[piece]), int(slot - starts[piece])


class Numbers(Protocol):
    """Numbers by place."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int, /) -> Any: ...


def spread_rows(rows: Numbers, count: int) -> list[int]:
    """At most so many of some rows, evenly spread."""
    count = min(count, len(rows))
    return [int(rows[number * len(rows) // count]) for number in range(count)]


def labelled_tokens(row: PackedRow) -> NDArray[np.bool_]:
    """`[n]` which tokens of a row are in labelled slots."""
    return np.asarray(row.labels(len(row.tokens)) != IGNORE)


def taught_unread(row: PackedRow) -> NDArray[np.int64]:
    """The pieces with a label where the teacher has read nothing: among the tokens that its prefix replaces."""
    if row.prefixes is None:
        return np.zeros(0, np.int64)
    _, lengths, replaced = row.prefixes.places.T
    before, begins = np.cumsum(labelled_tokens(row)), np.cumsum(row.piece_lengths) - row.piece_lengths
    unread = replaced - (lengths > 0)  # slots of a piece that have no place in what the teacher reads
    return np.array(
        [
            piece
            for piece, (begin, count) in enumerate(zip(begins.tolist(), unread.tolist(), strict=True))
            if count > 0 and before[begin + count - 1] > (before[begin - 1] if begin else 0)
        ],
        np.int64,
    )


def join_rows(rows: Sequence[PackedRow]) -> PackedRow:
    """One row of the pieces of several, which need not fit into `seq_len`; without extras."""
    masks = [np.ones(len(row.tokens), bool) if row.supervised is None else row.supervised for row in rows]
    return PackedRow(
        tokens=np.concatenate([row.tokens for row in rows]),
        piece_lengths=np.concatenate([row.piece_lengths for row in rows]),
        piece_documents=np.concatenate([row.piece_documents for row in rows]),
        supervised=np.concatenate(masks),
        prefixes=Prefixes.joined([row.prefixes for row in rows], [len(row.piece_lengths) for row in rows]),
    )


def position_ids(segments: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[..., L]` position of each slot inside its piece; padding counts as a piece of its own.

    Position ids that restart show a model where one piece ends and the next begins.
    """
    slots = np.broadcast_to(np.arange(segments.shape[-1]), segments.shape)
    new = np.ones(segments.shape, bool)
    new[..., 1:] = segments[..., 1:] != segments[..., :-1]
    return slots - np.maximum.accumulate(np.where(new, slots, 0), axis=-1)
