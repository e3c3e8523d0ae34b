"""Megatron: the cached logits of its offline distillation, tar files of top-k log-probabilities.

    dp0__{I}.tar      data-parallel rank 0, up to iteration I (in older ones cp0_dp0__{I}.tar)
      _meta.json      first: {"hash", "identifiers", "saver": {k, p, min_k, save_dtype, mbs_save, dp_size_save, ...}}
      {i}.pt.zst      iteration i: torch.save of a dict, zstd-compressed

The dict of format version 2 holds `values [L, samples, K]` (log p), `indices_low [L, samples, K]` uint16 and `bit_17`
bool: id = bit << 16 | low. In version 1 each is a list of microbatches. -1 as id and a value of -1e3 or less mark an
entry that is not there. Slot t of a sample is the distribution after its tokens 0 to t. Sample x of an iteration is row
r of rank d, where x = ((r // mbs) * D + d) * mbs + r % mbs for D ranks and microbatches of `mbs` samples.

The tars hold no tokens: Megatron's student reads the data set again. An export therefore writes `tokens.parquet` beside
them, which Megatron does not look at, and a reader takes that or any other file of `input_ids` in the order of the
samples. Rows may have one token more than slots, as Megatron's samples do.

Source: NVIDIA/Megatron-LM, `megatron/training/distillation/logits_saver.py`, `utils.py`, `cached_logits_loss.py`.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from kdcache.cache import Cache
from kdcache.codec.streams import deflate, inflate
from kdcache.errors import ConfigError, CorpusError, CorruptCacheError, one_line
from kdcache.interop.foreign_row import ForeignRow
from kdcache.interop.formats import ForeignCache
from kdcache.interop.pieces import entry_values, sampled_lost, slots_with_targets
from kdcache.interop.row_table import lost as table_lost
from kdcache.interop.tables import OnRow, RowGroups, publish
from kdcache.interop.token_rows import TokenRow, read_token_rows
from kdcache.interop.torch_file import read_torch
from kdcache.rows import PackedRow
from kdcache.store.atomic_files import NewFolder
from kdcache.store.manifest import Manifest
from kdcache.targets import SparseTargets

TOKENS = "tokens.parquet"
META = "_meta.json"
_NAME = re.compile(r"(?:cp(?P<cp>\d+)_)?dp(?P<dp>\d+)__(?P<last>\d+)\.tar")
_MEMBER = re.compile(r"(\d+)\.pt\.zst")
_MOST_MEMBER = 1 << 34
_LEAST_VALUE = -999.0
_ABSENT_VALUE, _ABSENT_ID = -1e3, -1
_MOST_VOCABULARY = 1 << 17
_BATCH = 8
"""Samples of an iteration that is written; a student's batch must be a multiple or a part of it."""
_ITERATIONS = 128
"""Iterations of a tar that is written."""
_TOKENS_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("piece_lengths", pa.list_(pa.int32()))])


class MegatronCache(ForeignCache):
    """A folder of tars. A part is an iteration of one rank."""

    format = "megatron"

    def __init__(self, path: str, tokens: str | None = None) -> None:
        folder = Path(path)
        found = [(name, file) for file in folder.glob("*.tar") if (name := _NAME.fullmatch(file.name))]
        if not found:
            raise CorpusError(f"{path} holds no dpN__I.tar files of Megatron")
        if any(int(name["cp"] or 0) for name, _ in found):
            raise CorpusError(f"{path} has tars of several context-parallel ranks, which Megatron itself refuses")
        if tokens is None and not (folder / TOKENS).is_file():
            raise ConfigError(
                f"tokens is not given, but Megatron's cached logits hold no tokens and {path} has no {TOKENS}; name a "
                "file of input_ids, one record a sample, in the order of training"
            )
        self._rows: list[TokenRow] = read_token_rows(tokens or str(folder / TOKENS))
        self._ranks = 1 + max(int(name["dp"]) for name, _ in found)
        self._members, meta = _index(sorted((int(name["dp"]), file) for name, file in found))
        saver = meta.get("saver")
        self._micro = int(saver.get("mbs_save") or 0) if isinstance(saver, dict) else 0
        self._first = min(iteration for iteration, _, _, _ in self._members)
        self._widths: dict[int, int] = {}

    def parts(self) -> Sequence[Any]:
        """Iterations, rank after rank in each."""
        return self._members

    def read(self, part: Any) -> Iterator[ForeignRow]:
        """The samples of an iteration of a rank."""
        iteration, rank, file, member = part
        where = f"{file}, iteration {iteration}"
        with tarfile.open(file, "r:") as archive:
            data = archive.extractfile(member)
            raw = b"" if data is None else data.read()
        try:
            content = read_torch(bytes(inflate(raw, _MOST_MEMBER)), where)
        except CorruptCacheError as error:
            raise CorpusError(f"{where} cannot be read: {error}") from None
        values, ids, micro = _tensors(content, where)
        micro = self._micro or micro
        samples = values.shape[1]
        start = (iteration - self._first) * samples * self._ranks
        for row in range(samples):
            index = start + ((row // micro) * self._ranks + rank) * micro + row % micro
            if index < len(self._rows):  # else it was added to fill the last batch
                yield self._row(self._rows[index], values[:, row], ids[:, row], f"{where}, sample {index}")

    def _row(self, tokens: TokenRow, values: NDArray[np.float64], ids: NDArray[np.int64], where: str) -> ForeignRow:
        length = min(len(values), len(tokens.tokens))
        used = (ids[:length] >= 0) & (values[:length] > _LEAST_VALUE) & (ids[:length] < _MOST_VOCABULARY - 1)
        order = np.argsort(~used, axis=-1, kind="stable")
        return ForeignRow(
            tokens=tokens.tokens, slots=np.arange(length), ids=np.take_along_axis(ids[:length], order, -1),
            values=np.take_along_axis(np.where(used, values[:length], -np.inf), order, -1), count=used.sum(-1),
            piece_lengths=tokens.piece_lengths, where=where,
        ).take(np.flatnonzero(used.any(-1)))  # fmt: skip


def _index(files: Sequence[tuple[int, Path]]) -> tuple[list[tuple[int, int, Path, tarfile.TarInfo]], dict[str, Any]]:
    """The iterations of all tars, in order, and what the first says of itself."""
    members: list[tuple[int, int, Path, tarfile.TarInfo]] = []
    meta: Any = {}
    for rank, file in files:
        try:
            with tarfile.open(file, "r:") as archive:
                for member in archive:
                    if member.name == META and member.isreg() and not meta and member.size < 1 << 20:
                        content = archive.extractfile(member)
                        meta = json.loads(content.read()) if content else {}
                    elif (name := _MEMBER.fullmatch(member.name)) and member.isreg():
                        members.append((int(name[1]), rank, file, member))
        except (tarfile.TarError, OSError, ValueError) as error:
            raise CorpusError(f"{file} cannot be read: {one_line(error)}") from None
    if not members:
        raise CorpusError(f"{files[0][1]} holds no iterations")
    return sorted(members, key=lambda each: each[:2]), meta if isinstance(meta, dict) else {}


def _tensors(content: Any, where: str) -> tuple[NDArray[np.float64], NDArray[np.int64], int]:
    """Values and ids `[L, samples, K]`, and the samples of a microbatch where the iteration is a list of these."""
    try:
        parts = [content[name] for name in ("values", "indices_low", "bit_17")]
        micro = parts[0][0].shape[1] if isinstance(parts[0], list) else parts[0].shape[1]
        if isinstance(parts[0], list):
            width = max(each.shape[-1] for each in parts[0])
            fills = (_ABSENT_VALUE, 0xFFFF, True)
            parts = [_joined(each, width, fill) for each, fill in zip(parts, fills, strict=True)]
        values, low, bit = (
            part.to(kind) for part, kind in zip(parts, (torch.float64, torch.int64, torch.int64), strict=True)
        )
        if values.ndim != 3 or low.shape != values.shape or bit.shape != values.shape:
            raise CorpusError(f"{where} has values and ids of different shapes")
    except (KeyError, TypeError, IndexError, AttributeError, RuntimeError):
        raise CorpusError(f"{where} does not hold values, indices_low and bit_17") from None
    ids = (bit << 16 | low).numpy()
    return values.numpy(), np.where(ids == _MOST_VOCABULARY - 1, _ABSENT_ID, ids), max(1, int(micro))


def _joined(parts: Sequence[torch.Tensor], width: int, fill: Any) -> torch.Tensor:
    """Microbatches behind each other, each as wide as the widest."""
    padded = [
        torch.nn.functional.pad(part.to(torch.float64), (0, width - part.shape[-1]), value=fill) for part in parts
    ]
    return torch.cat(padded, 1)


def write(cache: Cache, out: Path, on_row: OnRow) -> None:
    """Write a folder of tars of format version 2, and the tokens beside them."""
    import pyarrow.parquet as parquet

    manifest = cache.manifest
    meta = {
        "hash": "", "identifiers": {"kdcache": manifest.sha256},
        "saver": {
            "k": manifest.width, "p": None, "min_k": 1, "save_dtype": "fp32", "mbs_save": 1, "dp_size_save": 1,
            "gbs_save": _BATCH, "format_version": 2,
        },
    }  # fmt: skip
    with NewFolder(out) as folder:
        with (
            parquet.ParquetWriter(folder.place / TOKENS, _TOKENS_SCHEMA, compression="zstd") as tokens,
            _Tars(folder.place, -(-len(cache) // _BATCH), json.dumps(meta, separators=(",", ":")).encode()) as tars,
        ):
            batch, groups = [], RowGroups(tokens, _TOKENS_SCHEMA)
            for number, (packed, targets) in enumerate(cache.read_rows(range(len(cache))), 1):
                groups.add(_tokens_of(packed))
                batch.append(_sample(packed, targets, manifest))
                if len(batch) == _BATCH or number == len(cache):
                    tars.add(_iteration(batch))
                    batch = []
                on_row(number)
            groups.flush()
        publish(folder, out)


class _Tars:
    """The tars of a folder, each of so many iterations, written one iteration after the other."""

    def __init__(self, folder: Path, iterations: int, meta: bytes) -> None:
        self._folder, self._iterations, self._meta = folder, iterations, meta
        self._next = 0
        self._open: tarfile.TarFile | None = None

    def add(self, payload: bytes) -> None:
        """Write an iteration."""
        if self._open is None:
            last = min(self._next + _ITERATIONS, self._iterations) - 1
            self._open = tarfile.TarFile(self._folder / f"dp0__{last}.tar", "w")
            _add(self._open, META, self._meta)
        _add(self._open, f"{self._next}.pt.zst", payload)
        self._next += 1
        if self._next % _ITERATIONS == 0:
            self.__exit__()

    def __enter__(self) -> _Tars:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None


def _sample(packed: PackedRow, targets: SparseTargets, manifest: Manifest) -> tuple[NDArray[Any], NDArray[Any]]:
    """Values and ids `[L, K]` of a row."""
    values = np.full((manifest.seq_len, manifest.width), _ABSENT_VALUE, np.float32)
    ids = np.full((manifest.seq_len, manifest.width), _ABSENT_ID, np.int64)
    slots, kept = slots_with_targets(packed, targets)
    used = kept.valid.numpy()
    values[slots] = np.where(used, entry_values(kept), _ABSENT_VALUE)
    ids[slots] = np.where(used, kept.ids.numpy(), _ABSENT_ID)
    order = np.argsort(-values, axis=-1, kind="stable")
    return np.take_along_axis(values, order, -1), np.take_along_axis(ids, order, -1)


def _iteration(batch: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> bytes:
    """The payload of an iteration; samples that are missing have no entries."""
    values, ids = (np.stack([sample[i] for sample in batch], 1) for i in (0, 1))  # [L, samples, K]
    missing = ((0, 0), (0, _BATCH - len(batch)), (0, 0))
    values = np.pad(values, missing, constant_values=_ABSENT_VALUE)
    ids = np.pad(ids, missing, constant_values=_ABSENT_ID)
    buffer = io.BytesIO()
    content = {
        "values": torch.from_numpy(values), "indices_low": torch.from_numpy((ids & 0xFFFF).astype(np.uint16)),
        "bit_17": torch.from_numpy((ids >> 16) & 1 != 0), "format_version": 2,
    }  # fmt: skip
    torch.save(content, buffer)
    return deflate(np.frombuffer(buffer.getvalue(), np.uint8))


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.addfile(info, io.BytesIO(data))


def _tokens_of(packed: PackedRow) -> pa.RecordBatch:
    columns = [
        pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), pa.array(values.astype(np.int32)))
        for values in (packed.tokens, packed.piece_lengths)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=_TOKENS_SCHEMA)


def lost(manifest: Manifest) -> list[str]:
    """What Megatron cannot hold of a cache.

    Raises:
        ConfigError: its vocabulary is larger than Megatron's ids, which have 17 bits.
    """
    if manifest.vocab_size >= _MOST_VOCABULARY:
        raise ConfigError(
            f"as_ is megatron, whose ids have 17 bits, but the cache has a vocabulary of {manifest.vocab_size:,} tokens"
        )
    return [
        *table_lost(manifest), "the exact tail, the partitions and the entropy",
        "the hash of Megatron's data set, which a cache cannot know: run the student without its check",
        f"rows apart from Megatron's own data set: its samples must be those of {TOKENS}, in that order",
        *sampled_lost(manifest),
    ]  # fmt: skip
