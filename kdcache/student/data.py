"""Data: rows of a cache as batches, the order of a run, and the rows held out.

The order of a run is one flat sequence of rows, a pure function of (rows, seed): epoch after
epoch, each a permutation of its own. Optimiser step s takes the s-th slice of it, however
many ranks and micro-batches share the slice, so resuming is skipping.

Shapes: R rows, L slots, M positions with a target among the R x L.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from kdcache.cache import Cache
from kdcache.errors import ConfigError
from kdcache.rows import IGNORE, PackedRow, position_ids
from kdcache.targets import SparseTargets

Item = tuple[PackedRow, SparseTargets]


class RowDataset(Dataset[Item]):
    """Chosen rows of a cache, by position in `rows`."""

    def __init__(self, cache: Cache, rows: Sequence[int]) -> None:
        self.cache, self.rows = cache, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        return self.cache.read_packed(self.rows[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        """The items of one batch; DataLoader asks for them by this name."""
        return list(self.cache.read_rows(self.rows[i] for i in indices))


class Collator:
    """Rows to the batch that `packed_forward` and the losses take.

    `input_ids`, `position_ids` and `labels` are `[R, L]`; labels are already shifted, -100
    where nothing counts, and `shift_labels` is the same tensor under the name by which Trainer
    counts the positions of an optimiser step. `targets` holds the M labelled positions, in order.
    """

    def __init__(self, cache: Cache) -> None:
        self.seq_len, self.isolate = cache.manifest.seq_len, cache.manifest.isolate

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        """Make one batch of rows and their targets."""
        rows = [row for row, _ in items]
        segments = np.stack([row.segments(self.seq_len) for row in rows])
        labels = torch.from_numpy(np.stack([row.labels(self.seq_len) for row in rows]))
        return {
            "input_ids": torch.from_numpy(np.stack([row.padded_tokens(self.seq_len) for row in rows])),
            "position_ids": torch.from_numpy(position_ids(segments if self.isolate else np.zeros_like(segments))),
            "labels": labels,
            "shift_labels": labels,
            "targets": SparseTargets.cat([targets for _, targets in items]),
        }


def batches(cache: Cache, rows: Sequence[int], batch_rows: int) -> Iterator[dict[str, Any]]:
    """Rows of a cache as batches, in order."""
    items, collate = cache.read_rows(rows), Collator(cache)
    while batch := list(itertools.islice(items, batch_rows)):
        yield collate(batch)


class RunOrder(Sampler[int]):
    """The rows of a whole run, in order: `total` of them, epoch after epoch."""

    def __init__(self, rows: int, total: int, seed: int) -> None:
        self.rows, self.total, self.seed = rows, total, seed

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[int]:
        left = self.total
        epoch = 0
        while left > 0:
            order = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
            yield from order[:left].tolist()
            left -= self.rows
            epoch += 1


def split_heldout(rows: int, share: float) -> tuple[list[int], list[int]]:
    """`(training rows, held-out rows)`, each in cache order.

    The choice depends on nothing but the two numbers, so every run over a cache, with any seed,
    measures on the same rows.

    Raises:
        ConfigError: fewer than two rows.
    """
    if rows < 2:
        raise ConfigError(f"the cache has {rows} row(s), but training needs one to learn from and one to hold out")
    count = min(rows - 1, max(1, round(rows * share)))
    chosen = set(np.random.default_rng(0).permutation(rows)[:count].tolist())
    return [r for r in range(rows) if r not in chosen], sorted(chosen)


def labelled(batch: dict[str, Any]) -> torch.Tensor:
    """`[R, L]` bool: the slots that carry a label, in the order of `targets`."""
    mask: torch.Tensor = batch["labels"] != IGNORE
    return mask
