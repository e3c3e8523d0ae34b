"""Zarr arrays of plain numbers: one group, every array `[row, slot, ...]` with named dimensions, for xarray and numpy.

    tokens         [row, slot] int32, -1 where padded
    segments       [row, slot] int32, the piece of each token, -1 where padded
    labels         [row, slot] int32, the true next token, -100 where there is none
    count          [row, slot] int32, entries in use; 0 where a slot has no target
    ids            [row, slot, entry] int32, -1 past `count`
    logprobs, weights   [row, slot, entry] float32, NaN past `count`
    log_tail, log_partition   [row, slot, temperature] float32, NaN where there is no target
    entropy, label_logprob    [row, slot] float32, the same; where the cache knows them

The attributes of the group are what a table says of its numbers (`row_table.description`).
Cost: one pass over the cache; in memory one block of rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from kdcache.cache import Cache, Row
from kdcache.interop.row_table import description
from kdcache.interop.tables import OnRow, publish
from kdcache.store.atomic_files import NewFolder

_BLOCK_BYTES = 8 << 20
"""Bytes of a block of rows in the largest array, which is a chunk of it."""


def write(cache: Cache, out: Path, on_row: OnRow) -> None:
    """Write a group into a folder; see the module."""
    rows = len(cache)
    with NewFolder(out) as folder:
        group = zarr.create_group(str(folder.place), zarr_format=3, attributes=description(cache.manifest))
        arrays: dict[str, Any] = {}
        block: list[dict[str, NDArray[Any]]] = []
        size = 1
        for number in range(rows):
            block.append(_arrays(cache[number]))
            if not arrays:
                largest = max(values.nbytes for values in block[0].values())
                size = max(1, min(rows, _BLOCK_BYTES // largest))
                arrays = {name: _create(group, name, values, rows, size) for name, values in block[0].items()}
            if len(block) == size or number == rows - 1:
                start = number + 1 - len(block)
                for name, array in arrays.items():
                    array[start : number + 1] = np.stack([each[name] for each in block])
                block = []
            on_row(number + 1)
        publish(folder, out)


def _create(group: zarr.Group, name: str, values: NDArray[Any], rows: int, block: int) -> Any:
    third = {"log_tail": "temperature", "log_partition": "temperature"}.get(name, "entry")
    return group.create_array(
        name, shape=(rows, *values.shape), dtype=values.dtype, chunks=(block, *values.shape),
        dimension_names=("row", "slot", third)[: values.ndim + 1],
        fill_value=np.nan if values.dtype.kind == "f" else -1,
    )  # fmt: skip


def _arrays(row: Row) -> dict[str, NDArray[Any]]:
    """The arrays of one row, `[L, ...]`."""
    targets, padded = row.targets, row.segments < 0
    carries = targets.count > 0
    found = {
        "tokens": row.tokens.masked_fill(padded, -1).int(),
        "segments": row.segments.int(),
        "labels": row.labels.int(),
        "count": targets.count.int(),
        "ids": targets.ids.int().masked_fill(~targets.valid, -1),
    }
    for name in ("logprobs", "weights"):
        found[name] = getattr(targets, name).float().masked_fill(~targets.valid, np.nan)
    for name in ("log_tail", "log_partition", "entropy", "label_logprob"):
        values = getattr(targets, name)
        if values is not None:
            missing = ~carries if values.ndim == 1 else ~carries[:, None]
            found[name] = values.float().masked_fill(missing, np.nan)
    return {name: values.numpy() for name, values in found.items()}
