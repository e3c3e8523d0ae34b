"""Chunks: what lies between the places where both tokenisations of a piece have a boundary.

A chunk counts where both models have read something before it, where all of its tokens are labels on either side, and
where each of the teacher's has a target. All else is learned from labels alone.

Cost: a few passes of numpy over a row.

Shapes: n tokens of the teacher in a row, m of the student, C chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdcache.alignment.retokenise import UNKNOWN, Piece

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Chunks:
    """Chunks of a row or of a piece, in order.

    Attributes:
        teacher: `[C, 2]` first token of the teacher's, and the one behind the last.
        student: `[C, 2]` the same of the student's.
        size: `[C]` bytes of text.
    """

    teacher: Ints
    student: Ints
    size: Ints

    def take(self, which: NDArray[np.bool_]) -> Chunks:
        """Some of them."""
        return Chunks(self.teacher[which], self.student[which], self.size[which])

    def shifted(self, teacher: int, student: int) -> Chunks:
        """The same chunks of a piece that begins so many tokens into its row."""
        return Chunks(self.teacher + teacher, self.student + student, self.size)

    @staticmethod
    def joined(parts: list[Chunks]) -> Chunks:
        """Those of several pieces."""
        pairs, none = np.zeros((0, 2), np.int64), np.zeros(0, np.int64)
        return Chunks(
            np.concatenate([pairs, *(part.teacher for part in parts)]),
            np.concatenate([pairs, *(part.student for part in parts)]),
            np.concatenate([none, *(part.size for part in parts)]),
        )


def chunks_of(piece: Piece) -> Chunks:
    """All chunks of a piece before which both sides have a token."""
    ours, theirs = piece.edges, piece.teacher_edges
    common = np.intersect1d(ours[ours != UNKNOWN], theirs)
    common = common[common > max(int(theirs[0]), int(ours[0]))]
    if not len(common):
        return Chunks.joined([])
    known = np.where(ours == UNKNOWN, np.maximum.accumulate(ours), ours)  # still sorted
    at_student = np.searchsorted(known, common)
    at_teacher = np.searchsorted(theirs, common)
    before = np.concatenate([[0], np.cumsum(piece.text)])
    return Chunks(
        np.stack([at_teacher[:-1], at_teacher[1:]], -1).reshape(-1, 2),
        np.stack([at_student[:-1], at_student[1:]], -1).reshape(-1, 2),
        before[common[1:]] - before[common[:-1]],
    )


def all_within(chunks: Ints, good: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`[C]` whether every token of each chunk `[C, 2]` is good, and there is one.

    Args:
        chunks: first token, and the one behind the last.
        good: `[n]` of each token of the row.
    """
    total = np.concatenate([[0], np.cumsum(good)])
    count = chunks[:, 1] - chunks[:, 0]
    good_in: Ints = total[chunks[:, 1]] - total[chunks[:, 0]]
    return np.asarray((good_in == count) & (count > 0))
