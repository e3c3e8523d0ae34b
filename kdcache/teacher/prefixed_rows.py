"""Prefixed rows: the rows that a teacher is given where it reads more than its student.

Each piece becomes what the teacher reads of it: its prefix, and behind that the piece without the tokens that the
prefix replaces. These are packed into rows of the teacher's own length, in order; the labelled slots are those of the
student, in the same order, and keep the places that they have in the shard, from which sampled selections draw. So an
engine is given ordinary rows, and what it gives is what the student's rows ask for.

Guarantee: as many labelled slots as the student's rows have, with the same labels.
Cost: one copy of the tokens. At the end of a row, room of less than the next piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kdcache.rows import PackedRow, RowSpec, join_rows, labelled_tokens
from kdcache.teacher.engines.batch import Batch

_Read = tuple[PackedRow, NDArray[np.int64]]
"""What a teacher reads of one piece, and `[n, 2]` the row of the shard and the slot there of each of its tokens."""


def teacher_batches(batch: Batch, spec: RowSpec, batch_rows: int) -> list[Batch]:
    """The batches that a teacher is given for one of its student's rows; that batch itself where no row has a prefix.

    Args:
        batch: rows of the student.
        spec: of the teacher's rows; what it reads of a piece fits into one.
        batch_rows: rows of a batch, at most.
    """
    if all(row.prefixes is None for row in batch.rows):
        return [batch]
    rows = list(_packed(batch, spec))
    return [_joined(rows[start : start + batch_rows], batch, spec) for start in range(0, len(rows), batch_rows)]


def _joined(rows: Sequence[Sequence[_Read]], batch: Batch, spec: RowSpec) -> Batch:
    return Batch(
        [join_rows([piece for piece, _ in row]) for row in rows],
        spec,
        batch.shard,
        places=[np.concatenate([places for _, places in row]) for row in rows],
    )


def _packed(batch: Batch, spec: RowSpec) -> Iterator[list[_Read]]:
    """What the teacher reads, in rows."""
    row: list[_Read] = []
    filled = 0
    for number, student in enumerate(batch.rows):
        for piece, places in _pieces(student, batch.places_of(number)):
            if row and (filled + len(piece.tokens) > spec.seq_len or not spec.packed):
                yield row
                row, filled = [], 0
            row.append((piece, places))
            filled += len(piece.tokens)
    yield row


def _pieces(row: PackedRow, places: NDArray[np.int64]) -> Iterator[_Read]:
    """What the teacher reads of each piece of a row."""
    is_label = np.zeros(len(row.tokens), bool)  # [n] whether the slot before it is labelled
    is_label[1:] = labelled_tokens(row)[:-1]
    start = 0
    for number, length in enumerate(row.piece_lengths.tolist()):
        prefix, end = row.prefix(number), start + length
        common, before = slice(start + prefix.replaced, end), len(prefix.tokens)
        tokens = np.concatenate([prefix.tokens, row.tokens[common]])
        last = places[max(start, start + prefix.replaced - 1)]  # the slot that the end of the prefix stands for
        yield (
            PackedRow(
                tokens=tokens.astype(np.int32),
                piece_lengths=np.array([len(tokens)], np.int32),
                piece_documents=row.piece_documents[number : number + 1],
                supervised=np.concatenate([np.zeros(before, bool), is_label[common]]),
            ),
            np.concatenate([np.repeat(last[None], before, 0), places[common]]),
        )
        start = end
