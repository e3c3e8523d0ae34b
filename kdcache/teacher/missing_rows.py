"""Missing rows: what a teacher must still run of a shard, of which some contexts are known.

Rows of which nothing is known are run as they are. Contexts that are missing in other rows are put one behind the
other into rows of their own: pieces do not see each other, so their neighbours do not matter. Each keeps the place that
it has in the shard, from which sampled selections draw.

Guarantee: rows come in the order in which the shard's rows need them, so what was computed waits for little.
Cost: one copy of the tokens that are run; at the end of a row, room of less than the next context.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.corpus.packing import PackedRows
from kdcache.prefixes import Prefixes
from kdcache.rows import PackedRow, RowSpec, join_rows, labelled_tokens
from kdcache.targets import SparseTargets
from kdcache.teacher.engines.base import TargetRequest
from kdcache.teacher.engines.batch import Batch
from kdcache.teacher.opened_teacher import OpenedTeacher

Place = tuple[int, int]
"""The row of a context in the shard, and its number in that row."""


@dataclass(frozen=True, kw_only=True)
class Computed:
    """What a teacher gave for one context.

    Attributes:
        row: a row of it alone.
        targets: of its labelled slots.
        extras: `[n, width]` by name.
    """

    row: PackedRow
    targets: SparseTargets
    extras: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class _Context:
    """One context: its place, its first slot in the row of the shard, and a row of it alone."""

    place: Place
    start: int
    row: PackedRow

    @property
    def places(self) -> NDArray[np.int64]:
        """`[n, 2]` the row of the shard and the slot there of each of its tokens."""
        slots = self.start + np.arange(len(self.row.tokens), dtype=np.int64)
        return np.stack([np.full_like(slots, self.place[0]), slots], -1)


def compute(
    rows: PackedRows, known: Sequence[NDArray[np.bool_]], teacher: OpenedTeacher, request: TargetRequest, shard: int
) -> Iterator[tuple[Place, Computed]]:
    """Targets of the contexts of a shard that are not known, in the order of their rows.

    Args:
        rows: of the shard.
        known: for each row, which of its contexts are known.
        teacher: whose targets.
        request: what is asked of it.
        shard: its number.
    """
    waiting: list[list[_Context]] = []  # the contexts of each row that was given to the teacher

    def batches() -> Iterator[Batch]:
        some: list[list[_Context]] = []
        for contexts in _runs(rows, known, teacher.rows):
            some.append(contexts)
            if len(some) == teacher.batch_rows:
                waiting.extend(some)
                yield _batch(some, teacher.rows, shard)
                some = []
        if some:
            waiting.extend(some)
            yield _batch(some, teacher.rows, shard)

    for found in teacher.targets_of_batches(batches(), request):
        token = label = 0
        for contexts in [waiting.pop(0) for _ in found.counts]:
            for context in contexts:
                tokens = slice(token, token + len(context.row.tokens))
                labels = slice(label, label + int(labelled_tokens(context.row).sum()))
                extras = {name: values[tokens] for name, values in found.extras.items()}
                yield context.place, Computed(row=context.row, targets=found.targets[labels], extras=extras)
                token, label = tokens.stop, labels.stop


def _runs(rows: PackedRows, known: Sequence[NDArray[np.bool_]], spec: RowSpec) -> Iterator[list[_Context]]:
    """The contexts of each row that is to be run."""
    filled: list[_Context] = []
    for number, there in enumerate(known):
        if there.all():
            continue
        contexts = _missing(rows[number], number, there, spec)
        if not there.any():
            yield contexts
            continue
        for context in contexts:
            if sum(len(c.row.tokens) for c in (*filled, context)) > spec.seq_len:
                yield filled
                filled = []
            filled.append(context)
    if filled:
        yield filled


def _missing(row: PackedRow, number: int, known: NDArray[np.bool_], spec: RowSpec) -> list[_Context]:
    """The contexts of a row that are not known."""
    found, pieces = [], np.cumsum(row.piece_lengths)
    for index, tokens in enumerate(spec.contexts(row)):
        if not known[index]:
            first, last = np.searchsorted(pieces, [tokens.start + 1, tokens.stop])
            inside = slice(first, last + 1)
            alone = PackedRow(
                tokens=row.tokens[tokens],
                piece_lengths=row.piece_lengths[inside],
                piece_documents=row.piece_documents[inside],
                supervised=None if row.supervised is None else row.supervised[tokens],
                prefixes=None if row.prefixes is None else Prefixes.of(row.prefixes[i] for i in range(first, last + 1)),
            )
            found.append(_Context(place=(number, index), start=tokens.start, row=alone))
    return found


def _batch(rows: Sequence[Sequence[_Context]], spec: RowSpec, shard: int) -> Batch:
    places = [np.concatenate([context.places for context in row]) for row in rows]
    return Batch([join_rows([context.row for context in row]) for row in rows], spec, shard, places=places)
