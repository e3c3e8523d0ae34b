"""Row views: the rows of a cache as a data set of torch or of `datasets`, read when they are asked for.

Both give a row as one flat dict of tensors of fixed shapes, so that any collator stacks rows into batches:

    tokens, labels, segments   [L]
    ids, logprobs, weights     [L, K] the entries; 0, -inf and 0 past `count`
    count                      [L] entries in use, 0 where a slot has no target
    log_partition, log_tail    [L, n_T]; `log_tail` of truncated kinds
    entropy, label_logprob     [L], where the cache knows them
    extra.NAME                 [L, width] of each extra

Guarantee: nothing is read before a row is asked for; rows are found by index; both may be sent to worker processes.
Cost: one row a row.

Shapes: L slots a row, K entries, n_T temperatures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from kdcache.targets import SparseTargets


class RowLike(Protocol):
    """A row of a cache."""

    tokens: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor
    targets: SparseTargets
    extras: dict[str, torch.Tensor]


class RowSource(Protocol):
    """What rows are read from: a cache."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any:
        """A `RowLike`."""


def row_tensors(row: RowLike) -> dict[str, torch.Tensor]:
    """A row as one dict of tensors; see the module."""
    found = {"tokens": row.tokens, "labels": row.labels, "segments": row.segments}
    for field in dataclasses.fields(row.targets):
        value = getattr(row.targets, field.name)
        if isinstance(value, torch.Tensor):
            found[field.name] = value
    return {**found, **{f"extra.{name}": values for name, values in row.extras.items()}}


class TorchRows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The rows of a cache for `torch.utils.data.DataLoader`, whose own collator stacks them."""

    def __init__(self, source: RowSource) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return row_tensors(self._source[index])


class ReadRows:
    """Turns numbers of rows into their contents, for `datasets.Dataset.with_transform`."""

    def __init__(self, source: RowSource) -> None:
        self._source = source

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
        """The columns of the rows that a batch numbers."""
        rows = [row_tensors(self._source[int(index)]) for index in batch["row"]]
        return {
            "row": list(batch["row"]),
            **{name: [each[name] for each in rows] for name in (rows[0] if rows else ())},
        }


def datasets_view(source: RowSource) -> Any:
    """A `datasets.Dataset` whose rows are read as they are asked for."""
    import datasets
    import pyarrow as pa

    table = pa.table({"row": np.arange(len(source))})
    return datasets.Dataset(datasets.table.InMemoryTable(table)).with_transform(ReadRows(source))
