"""Packing: the documents of one shard into rows of at most `seq_len` tokens.

Guarantee: a document that fits in a row is never cut, and nothing but the shard's own documents decides where it goes.
Of a longer one `overlong` decides (`kdcache.corpus.rules`); what was cut, truncated or left out is counted.
`best-fit`: documents come in order; each goes to the open row with the least room that still holds it, or opens a new
row, so rows stay close to corpus order (compare Ding et al. 2024, "Fewer Truncations Improve Language Modeling",
arXiv 2404.10830). `none`: each piece is a row of its own; the longest come first, so that rows of similar length lie
side by side and a batch of them holds little padding.
Cost: O(1) big-integer operations a piece, or one sort. Memory: 2 bytes a token (4 if any id is above 65,535), 28 a
piece; a row is made when it is asked for. Where a teacher reads more, each different prefix once, and some 200 bytes a
piece.

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
from kdcache.prefixes import NO_PREFIX, PREFIXES_A_ROW, Prefix, Prefixes
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
        prefix: what the teacher reads before it; None where that is nothing.
    """

    document: int
    ids: Ints
    supervised: NDArray[np.bool_] | None = None
    whole: bool = False
    writer_logp: NDArray[np.float32] | None = None
    prefix: Prefix | None = None


class PackedRows(Sequence[PackedRow]):
    """The rows of one shard, each made when it is asked for.

    Args:
        tokens: whole numbers of 2 or 4 bytes, of all pieces, one behind the other.
        supervised: a flag for each of them; empty when all may be labels.
        writer_logp: a number for each of them; empty where the corpus has none.
        lengths: `[P]` tokens of each piece.
        documents: `[P]` document of each piece.
        rows: `[P]` row of each piece.
        prefixes: `[P]` what the teacher reads before each; None where it reads what its student does.
    """

    def __init__(
        self,
        tokens: array[int],
        supervised: bytearray,
        writer_logp: array[float],
        lengths: Ints,
        documents: Ints,
        rows: Ints,
        prefixes: Sequence[Prefix] | None = None,
    ) -> None:
        self._prefixes = prefixes
        self._tokens, self._supervised = np.frombuffer(tokens, tokens.typecode), np.frombuffer(supervised, np.bool_)
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
            tokens=np.concatenate([self._tokens[place] for place in places], dtype=np.int32),
            piece_lengths=self._lengths[pieces],
            piece_documents=self._documents[pieces],
            supervised=None if supervised is None or supervised.all() else supervised,
            extras=extras,
            prefixes=None if self._prefixes is None else Prefixes.of(self._prefixes[p] for p in pieces),
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
        dropped: documents of which nothing is left, by reason: `overlong`; `teacher-overlong` (what the teacher reads
            before them leaves them no room); or `too-short` (no token has a next one).
    """

    rows: PackedRows
    cut: int
    truncated: int
    dropped: dict[str, int]


def pack(
    documents: Iterable[Tokens],
    seq_len: int,
    *,
    pack: str = "best-fit",
    overlong: str = "auto",
    teacher_seq_len: int = 0,
) -> Packed:
    """Pack documents into rows of at most `seq_len` tokens.

    Args:
        documents: in order; the sequences of one document follow each other.
        seq_len: the most tokens of a row.
        pack: `best-fit` or `none`.
        overlong: `cut`, `truncate`, `drop` or `auto`. A document is dropped, too, if the tokens that truncation leaves
            hold no label.
        teacher_seq_len: the most tokens that a teacher reads of a piece, its prefix included: a piece is cut, truncated
            or left out so that they fit. 0 where no document has a prefix.
    """
    tokens, lengths, numbers, rows = array("H"), array("i"), array("q"), array("q")
    supervised, writer_logp = bytearray(), array("f")
    prefixes = _KnownPrefixes() if teacher_seq_len else None
    best_fit = _BestFit(seq_len, PREFIXES_A_ROW * teacher_seq_len) if pack == "best-fit" else None
    counts, limits = _Counts(), _Limits(seq_len=seq_len, overlong=overlong, teacher_seq_len=teacher_seq_len)
    for piece in _pieces(documents, limits, counts):
        need = len(piece.ids)
        prefix = None if prefixes is None else prefixes.add(piece.prefix or NO_PREFIX)
        if best_fit is not None:
            rows.append(best_fit.row(need, prefix))
        if piece.supervised is not None and not supervised:
            supervised.extend(b"\1" * len(tokens))
        if supervised or piece.supervised is not None:
            supervised.extend(b"\1" * need if piece.supervised is None else piece.supervised.tobytes())
        if piece.writer_logp is not None:
            writer_logp.frombytes(piece.writer_logp.astype(np.float32, copy=False).tobytes())
        if tokens.typecode == "H" and piece.ids.max() > np.iinfo(np.uint16).max:
            tokens = array("i", tokens)
        tokens.frombytes(piece.ids.astype(tokens.typecode, copy=False).tobytes())
        lengths.append(need)
        numbers.append(piece.document)
    sizes = np.array(lengths, np.int32)
    row_of_piece = np.array(rows, np.int64) if best_fit is not None else _longest_first(sizes)
    return Packed(
        rows=PackedRows(
            tokens,
            supervised,
            writer_logp,
            sizes,
            np.array(numbers, np.int64),
            row_of_piece,
            None if prefixes is None else prefixes.pieces,
        ),
        cut=counts.cut,
        truncated=counts.truncated,
        dropped=dict(counts.dropped),
    )


class _KnownPrefixes:
    """The prefixes of pieces; equal ones share their tokens, for many documents may stand behind one long prompt.

    Attributes:
        pieces: of each piece so far.
    """

    def __init__(self) -> None:
        self.pieces: list[Prefix] = []
        self._known: dict[bytes, NDArray[np.int32]] = {}

    def add(self, prefix: Prefix) -> Prefix:
        """Take in that of the next piece; the same, its tokens shared."""
        tokens = self._known.setdefault(prefix.tokens.tobytes(), prefix.tokens)
        self.pieces.append(Prefix(tokens=tokens, replaced=prefix.replaced))
        return self.pieces[-1]


class _BestFit:
    """The row that each piece goes to: the one with the least room that still holds it.

    Args:
        seq_len: room of a row.
        prefix_tokens: of the different prefixes of a row at most. A row that has no room for a prefix is full.
    """

    def __init__(self, seq_len: int, prefix_tokens: int = 0) -> None:
        self._seq_len, self._prefix_tokens, self._opened = seq_len, prefix_tokens, 0
        self._by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows with that much room, newest last
        self._rooms = 0  # bit r is set when _by_room[r] is not empty
        self._prefixes: dict[int, dict[int, int]] = {}  # of each row: tokens of each prefix, by its identity

    def row(self, need: int, prefix: Prefix | None = None) -> int:
        """The row of a piece of so many tokens; equal prefixes are given with the same array of tokens."""
        room, row = self._seq_len, -1
        while row < 0 and (fitting := self._rooms >> need):
            room = need + (fitting & -fitting).bit_length() - 1
            row = self._by_room[room].pop()
            if not self._by_room[room]:
                self._rooms &= ~(1 << room)
            if not self._holds(row, prefix):
                row = -1  # it takes no more pieces: the next may not fit either, and no row is looked at twice in vain
        if row < 0:
            room, row, self._opened = self._seq_len, self._opened, self._opened + 1
        self._by_room[room - need].append(row)
        self._rooms |= 1 << (room - need)
        if prefix is not None:
            self._prefixes.setdefault(row, {})[id(prefix.tokens)] = len(prefix.tokens)
        return row

    def _holds(self, row: int, prefix: Prefix | None) -> bool:
        """Whether a row has room for a prefix."""
        if prefix is None:
            return True
        there = self._prefixes.get(row, {})
        new = 0 if id(prefix.tokens) in there else len(prefix.tokens)
        return sum(there.values()) + new <= self._prefix_tokens


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
    TEACHER_OVERLONG = auto()  # nothing is left of it
    TOO_SHORT = auto()  # nothing is left of it


_GONE = {
    _Fate.OVERLONG: "overlong", _Fate.TEACHER_OVERLONG: "teacher-overlong", _Fate.TOO_SHORT: "too-short",
}  # fmt: skip
"""Why nothing is left of a document: the first of these that became of any of its sequences."""


@dataclass(frozen=True, kw_only=True)
class _Limits:
    """How long pieces may be, and what becomes of what is longer."""

    seq_len: int
    overlong: str
    teacher_seq_len: int = 0

    def room(self, prefix: Prefix | None) -> int:
        """The most tokens of a piece of which the teacher reads every one behind a prefix."""
        if prefix is None:
            return self.seq_len
        return min(self.seq_len, self.teacher_seq_len - len(prefix.tokens))

    def first_room(self, prefix: Prefix | None) -> int:
        """The same of the first piece, whose replaced tokens the teacher does not read."""
        return min(self.seq_len, self.room(prefix) + (prefix.replaced if prefix else 0))


@dataclass
class _Counts:
    cut: int = 0
    truncated: int = 0
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, fates: set[_Fate]) -> None:
        """Count a document, of whose sequences this became."""
        if fates <= set(_GONE):
            self.dropped[next(reason for fate, reason in _GONE.items() if fate in fates)] += 1
            return
        self.cut += _Fate.CUT in fates
        self.truncated += bool(fates & {_Fate.TRUNCATED, _Fate.OVERLONG, _Fate.TEACHER_OVERLONG})


def _pieces(documents: Iterable[Tokens], limits: _Limits, counts: _Counts) -> Iterator[Tokens]:
    for _, sequences in groupby(documents, key=attrgetter("document")):
        fates = set()
        for sequence in sequences:
            ends, fate = _fit(sequence, limits)
            fates.add(fate)
            for start, end in ends:
                mask = None if sequence.supervised is None else sequence.supervised[start:end]
                logp = None if sequence.writer_logp is None else sequence.writer_logp[start:end]
                yield Tokens(
                    document=sequence.document,
                    ids=sequence.ids[start:end],
                    supervised=mask,
                    writer_logp=logp,
                    prefix=_prefix(sequence.prefix, start, end),
                )
        counts.add(fates)


def _prefix(prefix: Prefix | None, start: int, end: int) -> Prefix | None:
    """What the teacher reads before a piece: all that it reads before the whole. None for one that has no label."""
    if prefix is None or prefix.replaced >= end:
        return None
    return Prefix(tokens=prefix.tokens, replaced=max(0, prefix.replaced - start))


def _fit(sequence: Tokens, limits: _Limits) -> tuple[list[tuple[int, int]], _Fate]:
    """Start and end of each piece of a sequence, and what that makes of it."""
    length, overlong = len(sequence.ids), limits.overlong
    room, later = limits.first_room(sequence.prefix), limits.room(sequence.prefix)
    gone = _Fate.OVERLONG if length > limits.seq_len else _Fate.TEACHER_OVERLONG
    if length < 2:
        return [], _Fate.TOO_SHORT
    if room < 2:  # no piece would have a label
        return [], _Fate.TEACHER_OVERLONG
    if length <= room:
        return [(0, length)], _Fate.KEPT
    if overlong == "auto":
        overlong = "truncate" if sequence.whole else "cut"
    if overlong == "cut":
        if later < 2:
            return [], _Fate.TEACHER_OVERLONG
        starts = range(0, length - 1, later)  # a last token alone has no next one
        return [(start, min(start + later, length)) for start in starts], _Fate.CUT
    if overlong == "drop" or not (sequence.supervised is None or sequence.supervised[1:room].any()):
        return [], gone
    return [(0, room)], _Fate.TRUNCATED
