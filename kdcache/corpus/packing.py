"""Packing: the pieces of one shard into rows of at most `seq_len` tokens.

Guarantee: a document that fits in a row is never cut, and nothing but the shard's own
documents decides where it goes. A longer one is cut into pieces at row edges.
Method: best fit, online. Documents come in order; each goes to the open row with the least
room that still holds it, or opens a new row, so rows stay close to corpus order
(compare Ding et al. 2024, "Fewer Truncations Improve Language Modeling", arXiv 2404.10830).
Cost: O(1) big-integer operations a piece; the tokens of one shard in memory.

A piece of one token has no next token to predict and is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

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


@dataclass
class _OpenRow:
    pieces: list[Tokens] = field(default_factory=list)

    def close(self) -> PackedRow:
        masks = [p.supervised for p in self.pieces]
        partly = any(mask is not None and not mask.all() for mask in masks)
        return PackedRow(
            tokens=np.concatenate([p.ids for p in self.pieces]).astype(np.int32),
            piece_lengths=np.array([len(p.ids) for p in self.pieces], np.int32),
            piece_documents=np.array([p.document for p in self.pieces], np.int64),
            supervised=np.concatenate([np.ones(len(p.ids), bool) if p.supervised is None else p.supervised
                                       for p in self.pieces]) if partly else None,
        )  # fmt: skip


def pack(documents: Iterable[Tokens], seq_len: int) -> list[PackedRow]:
    """Pack documents, in order, into rows of at most `seq_len` tokens."""
    rows: list[_OpenRow] = []
    by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]  # rows with that much room, newest last
    rooms = 0  # bit r is set when by_room[r] is not empty
    for piece in _pieces(documents, seq_len):
        need = len(piece.ids)
        fitting = rooms >> need
        if fitting:
            room = need + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = seq_len, len(rows)
            rows.append(_OpenRow())
        rows[row].pieces.append(piece)
        by_room[room - need].append(row)
        rooms |= 1 << (room - need)
    return [row.close() for row in rows]


def _pieces(documents: Iterable[Tokens], seq_len: int) -> Iterator[Tokens]:
    for doc in documents:
        for start in range(0, len(doc.ids), seq_len):
            ids = doc.ids[start : start + seq_len]
            if len(ids) > 1:
                mask = None if doc.supervised is None else doc.supervised[start : start + seq_len]
                yield Tokens(document=doc.document, ids=ids, supervised=mask)
