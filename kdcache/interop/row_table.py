"""RowTable: one record for each row of a cache, in plain numbers, as `parquet`, `arrow` and `jsonl` hold it.

    shard, row      where the row is in the cache
    tokens          [n] token ids
    piece_lengths   [P] tokens of each piece
    documents       [P] number of the document that each piece is of
    slots           [m] slots that carry a target: it is of what follows the tokens 0 to slot, inside the piece
    labels          [m] the true next token
    ids             [m][k] token ids of the entries
    logprobs        [m][k] log p at T = 1 over the whole vocabulary, nats; of sampled entries null where it is not kept
    weights         [m][k] target weights
    log_tail        [m][n_T] log of the mass of everything else, at each temperature; of truncated kinds
    log_partition   [m][n_T] log sum p^(1/T)
    entropy         [m] nats; where the cache knows it
    label_logprob   [m] log p of the true next token; where the cache knows it

Shapes: n tokens of a row, P pieces, m positions, k entries of a position, n_T temperatures.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from kdcache.cache import Cache
from kdcache.rows import IGNORE, PackedRow
from kdcache.store.manifest import Manifest
from kdcache.targets import SparseTargets

_LISTS = {"entries": ("ids", "logprobs", "weights"), "temperatures": ("log_tail", "log_partition")}


@dataclass(frozen=True, kw_only=True)
class RowTable:
    """The columns of one row; see the module. `count` and the two-dimensional arrays `[m, K]` are as in SparseTargets.

    Attributes:
        shard, row: its place.
        columns: the columns of one or two dimensions, by name, without those that the cache does not know.
        count: `[m]` entries in use.
    """

    shard: int
    row: int
    columns: dict[str, NDArray[Any]]
    count: NDArray[np.int64]

    def lists(self) -> dict[str, Any]:
        """The record as lists of numbers, null where there is none; entries that are not in use are left out."""
        found: dict[str, Any] = {"shard": self.shard, "row": self.row}
        for name, values in self.columns.items():
            if name in _LISTS["entries"]:
                found[name] = [row[:count].tolist() for row, count in zip(values, self.count.tolist(), strict=True)]
            else:
                found[name] = values.tolist()
        return found


def row_table(packed: PackedRow, targets: SparseTargets, shard: int, row: int) -> RowTable:
    """The record of a row, of its labelled slots that carry a target.

    Args:
        packed: the row.
        targets: of its labelled slots, in order.
        shard, row: its place.
    """
    labels = packed.labels(len(packed.tokens))
    carries = (targets.count > 0).numpy()
    slots = np.flatnonzero(labels != IGNORE)[carries]
    kept = targets[torch.from_numpy(carries)]
    columns: dict[str, NDArray[Any]] = {
        "tokens": packed.tokens.astype(np.int32),
        "piece_lengths": packed.piece_lengths.astype(np.int32),
        "documents": packed.piece_documents.astype(np.int64),
        "slots": slots.astype(np.int32),
        "labels": labels[slots].astype(np.int32),
        "ids": kept.ids.numpy().astype(np.int32),
    }
    for name in ("logprobs", "weights", "log_tail", "log_partition", "entropy", "label_logprob"):
        values = getattr(kept, name)
        if values is not None:
            columns[name] = values.numpy().astype(np.float32)
    return RowTable(shard=shard, row=row, columns=columns, count=kept.count.numpy().astype(np.int64))


def row_tables(cache: Cache) -> Iterator[RowTable]:
    """The record of every row of a cache, one at a time."""
    for index, (packed, targets) in enumerate(cache.read_rows(range(len(cache)))):
        yield row_table(packed, targets, *cache.locate(index))


def schema_of(manifest: Manifest) -> pa.Schema:
    """The Arrow schema of a cache's records; its metadata says what the numbers are, under `kdcache`."""
    number, integer = pa.list_(pa.float32()), pa.list_(pa.int32())
    known, temperatures = manifest.known, pa.list_(pa.list_(pa.float32(), len(manifest.temperatures)))
    fields = [
        ("shard", pa.int32()), ("row", pa.int32()), ("tokens", integer), ("piece_lengths", integer),
        ("documents", pa.list_(pa.int64())), ("slots", integer), ("labels", integer), ("ids", pa.list_(integer)),
        ("logprobs", pa.list_(number)), ("weights", pa.list_(number)),
        *([("log_tail", temperatures)] if known.tails else []), ("log_partition", temperatures),
        *([("entropy", number)] if known.entropy else []),
        *([("label_logprob", number)] if known.label_logprob else []),
    ]  # fmt: skip
    return pa.schema(fields, metadata={"kdcache": json.dumps(description(manifest))})


def description(manifest: Manifest) -> dict[str, Any]:
    """What a table says of its numbers: those fields of the manifest that a reader of numbers needs."""
    return {
        "vocab_size": manifest.vocab_size, "seq_len": manifest.seq_len, "temperatures": list(manifest.temperatures),
        "selection": manifest.selection, "known": manifest.known.to_fields(), "isolate": manifest.isolate,
        "teacher_sha256": manifest.teacher_sha256, "tokenizer_sha256": manifest.tokenizer_sha256,
        "corpus_sha256": manifest.corpus_sha256, "cache_sha256": manifest.sha256,
    }  # fmt: skip


def record_batch(record: RowTable, schema: pa.Schema) -> pa.RecordBatch:
    """A record as an Arrow batch of one row; no number becomes a Python object."""
    arrays = []
    for field in schema:
        if field.name in ("shard", "row"):
            arrays.append(pa.array([getattr(record, field.name)], field.type))
            continue
        values = record.columns[field.name]
        if values.ndim == 1:
            inner = pa.array(values)
        elif field.name in _LISTS["entries"]:
            used = np.arange(values.shape[1]) < record.count[:, None]
            offsets = np.concatenate([[0], np.cumsum(record.count)]).astype(np.int32)
            flat = values[used]
            inner = pa.ListArray.from_arrays(
                pa.array(offsets), pa.array(flat, mask=np.isnan(flat) if flat.dtype.kind == "f" else None)
            )
        else:
            inner = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
        arrays.append(pa.ListArray.from_arrays(pa.array([0, len(inner)], pa.int32()), inner).cast(field.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def lost(manifest: Manifest) -> list[str]:
    """What a table of plain numbers does not hold of a cache."""
    found = ["checksums, commits and the seal", "the plan, and which documents were dropped and why"]
    if manifest.tokenizer_files:
        found.append("the tokenizer")
    if manifest.extras:
        found.append(f"the extras ({', '.join(sorted(manifest.extras))})")
    if manifest.teacher_context:
        found.append("what the teacher read in front of a piece")
    return found
