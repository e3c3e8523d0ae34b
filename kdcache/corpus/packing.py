"""Packing: the pieces of one shard into rows of at most `seq_len` tokens.

Guarantee: a document that fits in a row is never cut, and nothing but the shard's own documents decides where it goes.
A longer one is cut into pieces at row edges.
Method: best fit, online. Documents come in order; each goes to the open row with the least room that still holds it,
or opens a new row, so rows stay close to corpus order (compare Ding et al. 2024, "Fewer Truncations Improve Language
Modeling", arXiv 2404.10830).
Cost: O(1) big-integer operations a piece. Memory: 4 bytes a token, 28 a piece; a row is made when it is asked for.

A piece of one token has no next token to predict and is left out.

Shapes: P pieces of a shard, R rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
from numpy.typing import NDArray

from kdcache.rows import Ints, PackedRow


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """A tokenised document.

    Attributes:
        document: its index in the corpus.
        ids: `[n]` int32.
        supervised: `[n]` bool, whether each token may be a label; None when all may.
    """

    document: int
    ids: Ints
    supervised: NDArray[np.bool_] | None = None


class PackedRows(Sequence[PackedRow]):
    """The rows of one shard, each made when it is asked for.

    Args:
        tokens: int32, of all pieces, one behind the other.
        supervised: a flag for each of them; empty when all may be labels.
        lengths: `[P]` tokens of each piece.
        documents: `[P]` document of each piece.
        rows: `[P]` row of each piece.
    """

    def __init__(self, tokens: array[int], supervised: bytearray, lengths: Ints, documents: Ints, rows: Ints) -> None:
        self._tokens, self._supervised = np.frombuffer(tokens, np.int32), np.frombuffer(supervised, np.bool_)
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
        return PackedRow(
            tokens=np.concatenate([self._tokens[place] for place in places]),
            piece_lengths=self._lengths[pieces],
            piece_documents=self._documents[pieces],
            supervised=None if supervised is None or supervised.all() else supervised,
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


def pack(documents: Iterable[Tokens], seq_len: int) -> PackedRows:
    """Pack documents, in order, into rows of at most `seq_len` tokens."""
    tokens, lengths, numbers, rows = array("i"), array("i"), array("q"), array("q")
    supervised = bytearray()
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows with that much room, newest last
    rooms = 0  # bit r is set when by_room[r] is not empty
    opened = 0
    for piece in _pieces(documents, seq_len):
        need = len(piece.ids)
        fitting = rooms >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row, opened = seq_len, opened, opened + 1
        by_room[room - need].append(row)
        rooms |= 1 << (room - need)
        if piece.supervised is not None and not supervised:
            supervised.extend(b"\1" * len(tokens))
        if supervised or piece.supervised is not None:
            supervised.extend(b"\1" * need if piece.supervised is None else piece.supervised.tobytes())
        tokens.frombytes(piece.ids.astype(np.int32, copy=False).tobytes())
        lengths.append(need)
        numbers.append(piece.document)
        rows.append(row)
    return PackedRows(
        tokens, supervised, np.array(lengths, np.int32), np.array(numbers, np.int64), np.array(rows, np.int64)
    )  # fmt: skip


def _pieces(documents: Iterable[Tokens], seq_len: int) -> Iterator[Tokens]:
    for doc in documents:
        for start in range(0, len(doc.ids), seq_len):
            ids = doc.ids[start : start + seq_len]
            if len(ids) > 1:
                mask = None if doc.supervised is None else doc.supervised[start : start + seq_len]
                yield Tokens(document=doc.document, ids=ids, supervised=mask)
