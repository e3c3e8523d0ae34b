"""Packing: the documents of one shard into rows of at most `seq_len` tokens.

Guarantee: a document that fits in a row is never cut, and nothing but the shard's own documents decides where it goes.
Of a longer one `overlong` decides (`kdcache.corpus.rules`); what was cut, truncated or left out is counted.
`best-fit`: documents come in order; each goes to the open row with the least room that still holds it, or opens a new
row, so rows stay close to corpus order (compare Ding et al. 2024, "Fewer Truncations Improve Language Modeling",
arXiv 2404.10830). `none`: each piece is a row of its own; the longest come first, so that rows of similar length lie
side by side and a batch of them holds little padding.
Cost: O(1) big-integer operations a piece, or one sort. Memory: 4 bytes a token, 28 a piece; a row is made when it is
asked for.

A piece of one token has no next token to predict and is left out.

Shapes: P pieces of a shard, R rows.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import groupby
from operator import attrgetter
from typing import overload

import numpy as np
from numpy.typing import NDArray

from kdcache.extras import WRITER_LOGP
from kdcache.rows import Ints, PackedRow


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A tokenised document, or one of several sequences that it became.

    Attributes:
        document: its index in the corpus.
        ids: `[n]` int32.
        supervised: `[n]` bool, whether each token may be a label; None when all may.
        whole: whether it is of no use in pieces: an answer must not be taught without its question.
        writer_logp: `[n]` float32, see `TokenIds`; None where the corpus does not say.
    """

    document: int
    ids: Ints
    supervised: NDArray[np.bool_] | None = None
    whole: bool = False
    writer_logp: NDArray[np.float32] | None = None


class PackedRows(Sequence[PackedRow]):
    """The rows of one shard, each made when it is asked for.

    Args:
        tokens: int32, of all pieces, one behind the other.
        supervised: a flag for each of them; empty when all may be labels.
        writer_logp: a number for each of them; empty where the corpus has none.
        lengths: `[P]` tokens of each piece.
        documents: `[P]` document of each piece.
        rows: `[P]` row of each piece.
    """

    def __init__(
        self,
        tokens: array[int],
        supervised: bytearray,
        writer_logp: array[float],
        lengths: Ints,
        documents: Ints,
        rows: Ints,
    ) -> None:
        self._tokens, self._supervised = np.frombuffer(tokens, np.int32), np.frombuffer(supervised, np.bool_)
        self._writer_logp = np.frombuffer(writer_logp, np.float32)
        self._lengths, self._documents, self._starts = lengths, documents, np.cumsum(lengths) - lengths
        self._order = np.argsort(rows, kind="stable")  # pieces of a row stay in the order of their documents
        self._edges = np.concatenate([[0], np.cumsum(np.bincount(rows))])

    def __len__(self) -> int:
        return len(self._edges) - 1

    @overload
    def __getitem__(self, index: int) -> PackedRow: ...

    @overload
    def __getitem__(self, index: slice) -> list[PackedRow]: ...

    def __getitem__(self, index: int | slice) -> PackedRow | list[PackedRow]:
        if isinstance(index, slice):
            return [self._row(i) for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} rows")
        return self._row(index % len(self))

    def _row(self, row: int) -> PackedRow:
        pieces = self._order[self._edges[row] : self._edges[row + 1]]
        places = [slice(self._starts[p], self._starts[p] + self._lengths[p]) for p in pieces]
        supervised = None
        if len(self._supervised):
            supervised = np.concatenate([self._supervised[place] for place in places])
        extras = {}
        if len(self._writer_logp):
            logp = np.concatenate([self._writer_logp[place] for place in places])
            extras = {WRITER_LOGP: np.nan_to_num(logp, nan=0.0)[:, None]}
        return PackedRow(
            tokens=np.concatenate([self._tokens[place] for place in places]),
            piece_lengths=self._lengths[pieces],
            piece_documents=self._documents[pieces],
            supervised=None if supervised is None or supervised.all() else supervised,
            extras=extras,
        )

    def batches(self, size: int) -> Batches:
        """The rows, so many at a time."""
        return Batches(self, size)


class Batches(Sequence[list[PackedRow]]):
    """Rows in batches, each made when it is asked for."""

    def __init__(self, rows: PackedRows, size: int) -> None:
        self._rows, self._size = rows, size

    def __len__(self) -> int:
        return -(-len(self._rows) // self._size)

    @overload
    def __getitem__(self, index: int) -> list[PackedRow]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[PackedRow]]: ...

    def __getitem__(self, index: int | slice) -> list[PackedRow] | list[list[PackedRow]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)} batches")
        return self._rows[index * self._size : (index + 1) * self._size]


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What the documents of a shard became.

    Attributes:
        rows: in the order of the shard.
        cut: documents that lie in several pieces.
        truncated: documents that lost what did not fit in a row, and of which something is left.
        dropped: documents of which nothing is left, by reason: `overlong`, or `too-short` (no token has a next one).
    """

    rows: PackedRows
    cut: int
    truncated: int
    dropped: dict[str, int]


def pack(documents: Iterable[Tokens], seq_len: int, *, pack: str = "best-fit", overlong: str = "auto") -> Packed:
    """Pack documents into rows of at most `seq_len` tokens.

    Args:
        documents: in order; the sequences of one document follow each other.
        seq_len: the most tokens of a row.
        pack: `best-fit` or `none`.
        overlong: `cut`, `truncate`, `drop` or `auto`. A document is dropped, too, if the tokens that truncation leaves
            hold no label.
    """
    tokens, lengths, numbers, rows = array("i"), array("i"), array("q"), array("q")
    supervised, writer_logp = bytearray(), array("f")
    best_fit = _BestFit(seq_len) if pack == "best-fit" else None
    counts = _Counts()
    for piece in _pieces(documents, seq_len, overlong, counts):
        need = len(piece.ids)
        if best_fit is not None:
            rows.append(best_fit.row(need))
        if piece.supervised is not None and not supervised:
            supervised.extend(b"\1" * len(tokens))
        if supervised or piece.supervised is not None:
            supervised.extend(b"\1" * need if piece.supervised is None else piece.supervised.tobytes())
        if piece.writer_logp is not None:
            writer_logp.frombytes(piece.writer_logp.astype(np.float32, copy=False).tobytes())
        tokens.frombytes(piece.ids.astype(np.int32, copy=False).tobytes())
        lengths.append(need)
        numbers.append(piece.document)
    sizes = np.array(lengths, np.int32)
    row_of_piece = np.array(rows, np.int64) if best_fit is not None else _longest_first(sizes)
    return Packed(
        rows=PackedRows(tokens, supervised, writer_logp, sizes, np.array(numbers, np.int64), row_of_piece),
        cut=counts.cut,
        truncated=counts.truncated,
        dropped=dict(counts.dropped),
    )


class _BestFit:
    """The row that each piece goes to: the one with the least room that still holds it."""

    def __init__(self, seq_len: int) -> None:
        self._seq_len, self._opened = seq_len, 0
        self._by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows with that much room, newest last
        self._rooms = 0  # bit r is set when _by_room[r] is not empty

    def row(self, need: int) -> int:
        """The row of a piece of so many tokens."""
        fitting = self._rooms >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1
            row = self._by_room[room].pop()
            if not self._by_room[room]:
                self._rooms &= ~(1 << room)
        else:
            room, row, self._opened = self._seq_len, self._opened, self._opened + 1
        self._by_room[room - need].append(row)
        self._rooms |= 1 << (room - need)
        return row


def _longest_first(lengths: Ints) -> NDArray[np.int64]:
    """`[P]` row of each piece where each has its own; of equal length they stay in order."""
    rows = np.empty(len(lengths), np.int64)
    rows[np.argsort(-lengths, kind="stable")] = np.arange(len(lengths))
    return rows


class _Fate(Enum):
    """What became of a sequence."""

    KEPT = auto()
    CUT = auto()
    TRUNCATED = auto()
    OVERLONG = auto()  # nothing is left of it
    TOO_SHORT = auto()  # nothing is left of it


@dataclass
class _Counts:
    cut: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, fates: set[_Fate]) -> None:
        """Count a document, of whose sequences this became."""
        if not fates - {_Fate.OVERLONG, _Fate.TOO_SHORT}:
            self.dropped["overlong" if _Fate.OVERLONG in fates else "too-short"] += 1
            return
        self.cut += _Fate.CUT in fates
        self.truncated += bool(fates & {_Fate.TRUNCATED, _Fate.OVERLONG})


def _pieces(documents: Iterable[Tokens], seq_len: int, overlong: str, counts: _Counts) -> Iterator[Tokens]:
    for _, sequences in groupby(documents, key=attrgetter("document")):
        fates = set()
        for sequence in sequences:
            ends, fate = _fit(sequence, seq_len, overlong)
            fates.add(fate)
            for start, end in ends:
                mask = None if sequence.supervised is None else sequence.supervised[start:end]
                logp = None if sequence.writer_logp is None else sequence.writer_logp[start:end]
                yield Tokens(document=sequence.document, ids=sequence.ids[start:end], supervised=mask, writer_logp=logp)
        counts.add(fates)


def _fit(sequence: Tokens, seq_len: int, overlong: str) -> tuple[list[tuple[int, int]], _Fate]:
    """Start and end of each piece of a sequence, and what that makes of it."""
    length = len(sequence.ids)
    if length < 2:
        return [], _Fate.TOO_SHORT
    if length <= seq_len:
        return [(0, length)], _Fate.KEPT
    if overlong == "auto":
        overlong = "truncate" if sequence.whole else "cut"
    if overlong == "cut":
        starts = range(0, length - 1, seq_len)  # a last token alone has no next one
        return [(start, min(start + seq_len, length)) for start in starts], _Fate.CUT
    if overlong == "drop" or not (sequence.supervised is None or sequence.supervised[1:seq_len].any()):
        return [], _Fate.OVERLONG
    return [(0, seq_len)], _Fate.TRUNCATED
