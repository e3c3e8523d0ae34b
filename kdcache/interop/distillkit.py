"""DistillKit: folders of Parquet files with compressed log-probabilities, as its `sample_logits_vllm` writes them.

    compression_config.yaml   how the bytes are made (`distillkit_codec`)
    data_0.parquet, ...       a record a sequence: input_ids [n], and for each slot but the last
                              compressed_logprobs [n - 1][bytes] and bytepacked_indices [n - 1][bytes]

A list at slot t is the distribution after the tokens 0 to t. Records of `token_ids` and `top_values`, uncompressed, are
read, too; those of the older codec (`packed_indices`, `exact_values`, `coeffs`) are refused.

Written are all k log-probabilities as float32, without differences or a fit, so nothing is lost of them: a piece of a
row becomes a record, since DistillKit knows no pieces.

Sources: arcee-ai/DistillKit, `distillkit/sample_logits_vllm.py`, `distillkit/sample_common.py`,
`distillkit/signals/offline.py`, `README.md`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from numpy.typing import NDArray

from kdcache.cache import Cache
from kdcache.errors import CorpusError, one_line
from kdcache.interop.distillkit_codec import Compression
from kdcache.interop.foreign_row import ForeignRow
from kdcache.interop.formats import ForeignCache
from kdcache.interop.pieces import ABSENT, Piece, filled, pieces_of, sampled_lost
from kdcache.interop.row_table import lost as table_lost
from kdcache.interop.tables import OnRow, RowGroups, publish
from kdcache.store.atomic_files import NewFolder
from kdcache.store.manifest import Manifest

CONFIG = "compression_config.yaml"
_MOST_CONFIG = 1 << 20
_FILE_RECORDS = 4096
_GROUP_RECORDS = 64
_BYTES = pa.list_(pa.list_(pa.uint8()))
_SCHEMA = pa.schema(
    [("input_ids", pa.list_(pa.uint64())), ("compressed_logprobs", _BYTES), ("bytepacked_indices", _BYTES)]
)


class DistillKitCache(ForeignCache):
    """A folder that DistillKit's capture wrote. A part is a row group of a file."""

    format = "distillkit"

    def __init__(self, path: str, tokens: str | None = None) -> None:  # noqa: ARG002 - it has its own
        import pyarrow.parquet as parquet

        folder = Path(path)
        self._files = sorted(folder.glob("*.parquet"), key=_number)
        if not self._files:
            raise CorpusError(f"{path} holds no data_*.parquet files of DistillKit")
        try:
            self._opened = [parquet.ParquetFile(file) for file in self._files]
        except (OSError, pa.ArrowException) as error:
            raise CorpusError(f"{path} cannot be read: {one_line(error)}") from None
        self._names = set(self._opened[0].schema_arrow.names)
        if "packed_indices" in self._names:
            raise CorpusError(f"{path} is of DistillKit's older codec (packed_indices), which is not read")
        self._compression = _read_config(folder / CONFIG) if "compressed_logprobs" in self._names else None
        if self._compression is None and not {"token_ids", "top_values"} <= self._names:
            raise CorpusError(f"{path} has neither compressed_logprobs nor token_ids with top_values")
        self.vocab_size = self._compression.d if self._compression else None

    def parts(self) -> Sequence[Any]:
        """A file and a row group of it."""
        return [(i, group) for i, file in enumerate(self._opened) for group in range(file.num_row_groups)]

    def read(self, part: Any) -> Iterator[ForeignRow]:
        """The records of a row group."""
        number, group = part
        where, columns = f"{self._files[number]}, row group {group}", ["input_ids", "labels", *self._columns]
        there = [name for name in columns if name in self._names]
        try:
            for batch in self._opened[number].iter_batches(_GROUP_RECORDS, row_groups=[group], columns=there):
                for row in range(len(batch)):
                    yield self._row({name: batch.column(name)[row] for name in there}, f"{where}, record {row}")
        except (OSError, pa.ArrowException) as error:
            raise CorpusError(f"{where} cannot be read: {one_line(error)}") from None

    @property
    def _columns(self) -> tuple[str, str]:
        return ("bytepacked_indices", "compressed_logprobs") if self._compression else ("token_ids", "top_values")

    def _row(self, record: dict[str, Any], where: str) -> ForeignRow:
        tokens = record["input_ids"].values.to_numpy(zero_copy_only=False).astype(np.int64)
        first, second = (_matrix(record[name], where) for name in self._columns)
        if len(first) != len(second) or len(first) not in (len(tokens), len(tokens) - 1):
            raise CorpusError(f"{where} has {len(first)} lists of entries for {len(tokens)} tokens")
        if self._compression:
            ids = self._compression.read_ids(first.astype(np.uint8), where)
            values = self._compression.read_values(second.astype(np.uint8), where)
        else:
            ids, values = first.astype(np.int64), second.astype(np.float64)
        used = values > ABSENT / 2
        order = np.argsort(~used, axis=-1, kind="stable")  # what is absent goes behind
        return ForeignRow(
            tokens=tokens, slots=np.arange(len(ids)), ids=np.take_along_axis(ids, order, -1),
            values=np.take_along_axis(np.where(used, values, -np.inf), order, -1), count=used.sum(-1), where=where,
        )  # fmt: skip


def _number(file: Path) -> tuple[int, str]:
    digits = "".join(c for c in file.stem if c.isdigit())
    return int(digits or 0), file.name


def _matrix(lists: Any, where: str) -> NDArray[Any]:
    """Lists of one length as an array `[m, B]`."""
    outer = lists.values
    flat = outer.flatten().to_numpy(zero_copy_only=False)
    if not len(outer):
        return np.zeros((0, 0), flat.dtype)
    width = len(flat) // len(outer)
    lengths = np.diff(outer.offsets.to_numpy())
    if (lengths != width).any():
        raise CorpusError(f"{where} has lists of different lengths")
    return np.asarray(flat).reshape(len(outer), width)


def _read_config(path: Path) -> Compression:
    try:
        if path.stat().st_size > _MOST_CONFIG:
            raise CorpusError(f"{path} is larger than a configuration can be")
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise CorpusError(f"{path} cannot be read: {one_line(error)}") from None
    return Compression.from_fields(fields, str(path))


def write(cache: Cache, out: Path, on_row: OnRow) -> None:
    """Write a folder of DistillKit; see the module."""
    manifest = cache.manifest
    width = manifest.width
    compression = Compression(
        d=manifest.vocab_size, k=width, exact_k=width, exact_dtype="float32", delta_encoding=False
    )
    with NewFolder(out) as folder:
        (folder.place / CONFIG).write_text(yaml.safe_dump(compression.fields()), encoding="utf-8")
        file: _File | None = None
        files = 0
        for number, pieces in enumerate(pieces_of(cache), 1):
            for piece in pieces:
                if file is None:
                    file, files = _File(folder.place / f"data_{files}.parquet"), files + 1
                if file.add(_record(piece, compression)) == _FILE_RECORDS:
                    file.close()
                    file = None
            on_row(number)
        if file is not None:
            file.close()
        publish(folder, out)


class _File:
    """A Parquet file of records."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as parquet

        self._writer = parquet.ParquetWriter(path, _SCHEMA, compression="zstd")
        self._groups, self._records = RowGroups(self._writer, _SCHEMA), 0

    def add(self, record: pa.RecordBatch) -> int:
        """Write a record; how many there are."""
        self._groups.add(record)
        self._records += 1
        return self._records

    def close(self) -> None:
        """Write what waits, and the footer."""
        self._groups.flush()
        self._writer.close()


def _record(piece: Piece, compression: Compression) -> pa.RecordBatch:
    ids, values = filled(piece, compression.k, compression.d)
    order = np.argsort(-values, axis=-1, kind="stable")
    ids, values = np.take_along_axis(ids, order, -1), np.take_along_axis(values, order, -1)
    columns = [_list_of(piece.tokens.astype(np.uint64))]
    columns += [_lists_of(compression.write_values(values)), _lists_of(compression.write_ids(ids))]
    return pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)


def _list_of(values: NDArray[Any]) -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), pa.array(values))


def _lists_of(values: NDArray[np.uint8]) -> pa.Array:
    """One list of the rows `[m, B]`."""
    offsets = pa.array(np.arange(len(values) + 1, dtype=np.int32) * values.shape[1])
    inner = pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)))
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), inner)


def lost(manifest: Manifest) -> list[str]:
    """What DistillKit cannot hold of a cache."""
    found = [*table_lost(manifest), "the exact tail, the partitions and the entropy: DistillKit takes 1 - sum p"]
    found.append("which tokens are supervised: a slot without a target has entries of probability 0")
    return found + sampled_lost(manifest)
