"""Data: rows of caches as batches, the order of a run, and the rows held out.

The order of a run is one flat sequence of rows, a pure function of (rows, seed, weights): see `student.mixture`.
Optimiser step s takes the s-th slice of it, however many ranks and micro-batches share the slice, so resuming is
skipping, also on another number of ranks. Nothing here takes memory that grows by more than two bits a row.

Shapes: R rows, L slots (`seq_len`; where rows are not packed, the tokens of the longest of a batch), M positions with a
target among the R x L.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, Sampler

from kdcache.alignment import AlignedRows
from kdcache.errors import ConfigError, TargetError
from kdcache.losses import Pool
from kdcache.rows import IGNORE, PackedRow
from kdcache.student.mixture import Mixture
from kdcache.student.multi_teacher import RowReader
from kdcache.student.permutation import Permutation
from kdcache.student.row_set import RowSet, set_bits
from kdcache.targets import SparseTargets

Rows = Sequence[int] | NDArray[np.int64] | RowSet

_BLOCK = 1 << 16
_HELDOUT = 0
"""The seed of the choice of held-out rows; a run's own seed has no part in it."""


class Item(NamedTuple):
    """One row, its targets, and where it was read: which cache of the run, and which row of it."""

    row: PackedRow
    targets: SparseTargets | Pool
    cache: int
    number: int


class RowDataset(Dataset[Item]):
    """Some rows of one cache or several, numbered through: those of the second follow those of the first."""

    def __init__(self, caches: Sequence[RowReader], rows: Sequence[Rows]) -> None:
        self.caches, self.rows = caches, rows
        self._ends = list(itertools.accumulate(len(chosen) for chosen in rows))

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, index: int) -> tuple[int, int]:
        cache = bisect.bisect_right(self._ends, index)
        return cache, int(self.rows[cache][index - (self._ends[cache - 1] if cache else 0)])

    def __getitem__(self, index: int) -> Item:
        cache, number = self._place(index)
        return Item(*self.caches[cache].read_packed(number), cache, number)

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """The items of one batch; DataLoader asks for them by this name."""
        places = [self._place(index) for index in indices]
        found = {
            cache: self.caches[cache].read_rows([number for owner, number in places if owner == cache])
            for cache in dict.fromkeys(owner for owner, _ in places)
        }
        return [Item(*next(found[cache]), cache, number) for cache, number in places]


class Collator:
    """Rows to the batch that `packed_forward` and the losses take.

    `input_ids`, `position_ids` and `labels` are `[R, L]`; labels are already shifted, -100
    where nothing counts, and `shift_labels` is the same tensor under the name by which Trainer
    counts the positions of an optimiser step. `targets` holds the M labelled positions, in order, as wide as the
    widest cache's; a `Pool` if they are those of several teachers. `rows` `[R, 2]` says where each row was read: which
    cache, and which row of it. `extras`, `{name: [R, L, width]}` float32, holds the extras that all caches have
    with one width, NaN where a slot has none; a batch without any has no such key.
    """

    def __init__(self, caches: Sequence[RowReader]) -> None:
        self.spec = caches[0].row_spec
        self.width = max(cache.manifest.width for cache in caches)
        specs = [cache.manifest.extra_specs for cache in caches]
        self.extras = [
            name
            for name, spec in specs[0].items()
            if all(name in other and (other[name].width, other[name].per) == (spec.width, spec.per) for other in specs)
        ]
        if any(isinstance(cache, AlignedRows) for cache in caches):  # whose tokens are others
            self.extras = []

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Make one batch of rows and their targets."""
        rows = [item.row for item in items]
        length = self.spec.length(rows)
        extras = self._extras(rows, length)
        segments = np.stack([row.segments(length) for row in rows])
        labels = torch.from_numpy(np.stack([row.labels(length) for row in rows]))
        return {
            "input_ids": torch.from_numpy(np.stack([row.padded_tokens(length) for row in rows])),
            "position_ids": torch.from_numpy(self.spec.position_ids(segments)),
            "labels": labels,
            "shift_labels": labels,
            "targets": self._join([item.targets for item in items]),
            "rows": torch.tensor([(item.cache, item.number) for item in items]),
            **({"extras": extras} if extras else {}),
        }

    def _extras(self, rows: Sequence[PackedRow], length: int) -> dict[str, torch.Tensor]:
        padded = [row.padded_extras(length) for row in rows] if self.extras else []
        return {name: torch.from_numpy(np.stack([one[name] for one in padded])) for name in self.extras}

    def _join(self, each: Sequence[SparseTargets | Pool]) -> SparseTargets | Pool:
        pools = [targets for targets in each if isinstance(targets, Pool)]
        if pools:  # a pool's rows are all of one cache
            return Pool.cat(pools)
        return SparseTargets.cat([targets.widen(self.width) for targets in each if isinstance(targets, SparseTargets)])


def batches(cache: RowReader, rows: Rows, batch_rows: int) -> Iterator[dict[str, Any]]:
    """Rows of a cache as batches, in order."""
    collate = Collator([cache])
    found = zip(cache.read_rows(map(int, rows)), map(int, rows), strict=True)
    items = (Item(*row, 0, number) for row, number in found)
    while batch := list(itertools.islice(items, batch_rows)):
        yield collate(batch)


class RunOrder(Sampler[int | None]):
    """The rows of a whole run, in order: `total` of them, of which the first `done` are not looked up but None.

    Trainer skips what a resumed run has done by taking it from here, batch by batch, and dropping it.
    """

    def __init__(self, mixture: Mixture, total: int, done: int = 0) -> None:
        self.mixture, self.total, self.done = mixture, total, done

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int | None]:
        yield from itertools.repeat(None, min(self.done, self.total))
        for start in range(self.done, self.total, _BLOCK):
            yield from self.mixture.rows(start, min(start + _BLOCK, self.total)).tolist()


def split_heldout(rows: int, share: float) -> tuple[RowSet, RowSet]:
    """`(training rows, held-out rows)`, each in cache order.

    Held out are the first rows of a permutation that depends on their number alone.

    The choice depends on nothing but the two numbers, so every run over a cache, with any seed,
    measures on the same rows.

    Raises:
        ConfigError: fewer than two rows.
    """
    if rows < 2:
        raise ConfigError(f"the cache has {rows} row(s), but training needs one to learn from and one to hold out")
    count = min(rows - 1, max(1, round(rows * share)))
    order, held = Permutation(rows, (_HELDOUT,)), np.zeros(-(-rows // 8), np.uint8)
    for start in range(0, count, _BLOCK):
        set_bits(held, order(np.arange(start, min(start + _BLOCK, count))))
    rest = ~held
    if rows % 8:
        rest[-1] &= (1 << rows % 8) - 1
    return RowSet(rows, rest), RowSet(rows, held)


def labelled(batch: dict[str, Any]) -> torch.Tensor:
    """`[R, L]` bool: the slots that carry a label, in the order of `targets`."""
    mask: torch.Tensor = batch["labels"] != IGNORE
    return mask


def extra_of_labels(batch: dict[str, Any], name: str) -> torch.Tensor:
    """`[M]` an extra of width 1 that tokens have, at the tokens that are labels: each is one slot further on.

    Raises:
        TargetError: the batch has no such extra, or a label has none.
    """
    values = batch.get("extras", {}).get(name)
    if values is None:
        raise TargetError(f"the batch has no {name}, one number a token, which this loss needs")
    found: torch.Tensor = values[..., 0].roll(-1, 1)[labelled(batch)]
    if found.isnan().any():
        raise TargetError(f"a token that is a label has no {name}, which this loss needs")
    return found
