"""Cache: rows by index, in O(1), from a folder or an object store, without the teacher.

Opening a sealed cache reads two objects, the manifest and the seal, whatever the number of shards. Opening any other
reads the manifest and one small commit a shard, and lists the objects. A row costs one or a few range reads. Memory:
some 600 bytes a shard. An open cache may be sent to worker processes: it reopens its shards there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kdcache.errors import CacheError, CorruptCacheError, IncompleteCacheError
from kdcache.known import Known
from kdcache.lazy_torch import torch
from kdcache.pretrained import load_tokenizer
from kdcache.rows import IGNORE, PackedRow, RowSpec
from kdcache.store.commits import Commits
from kdcache.store.local import LocalStorage
from kdcache.store.manifest import Manifest
from kdcache.store.open_storage import mirror, open_storage, parse_size
from kdcache.store.publish import TOKENIZER, open_shard
from kdcache.store.seal import open_commits
from kdcache.store.shards import FOLDER, Shard
from kdcache.store.storage import LastUsed, Storage
from kdcache.store.zarr_store import open_group
from kdcache.surfaces import show
from kdcache.targets import SparseTargets

if TYPE_CHECKING:
    import zarr

MOST_TOKENIZER_BYTES = 1 << 30
"""Of a file of the tokenizer, that is read at all."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a cache, padded to L = `seq_len` slots; torch tensors, positions first.

    Attributes:
        tokens: `[L]` int64, 0 where padded.
        labels: `[L]` int64, labels[t] = tokens[t+1] inside a piece, already shifted, else -100.
        segments: `[L]` int64, piece of each token, -1 where padded.
        documents: `[P]` int64, the document that each piece comes from.
        targets: SparseTargets over L slots; `count` is 0 where the label is -100, and where the position filter
            left the slot out.
        extras: `[L, width]` float32 of each extra of the cache, by name; NaN where a slot has none: padded slots, and
            slots without a label in an extra of positions.
        cache, index: where it was read, so that a notebook shows its text; None of a row that is sent to another
            process.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor
    documents: torch.Tensor
    targets: SparseTargets
    extras: dict[str, torch.Tensor] = field(default_factory=dict)
    cache: Cache | None = field(default=None, repr=False, compare=False)
    index: int | None = field(default=None, compare=False)

    def position(self, slot: int) -> Position:
        """One position of it.

        Raises:
            IndexError: no such slot.
        """
        if not 0 <= slot < len(self.tokens):
            raise IndexError(f"slot {slot} of a row of {len(self.tokens)} slots")
        return Position(row=self, slot=slot)

    def _repr_html_(self) -> str:
        return str(show("row", self))

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "cache": None}


@dataclass(frozen=True, kw_only=True)
class Position:
    """One slot of a row.

    Attributes:
        row: the row.
        slot: from 0.
    """

    row: Row
    slot: int

    @property
    def token(self) -> int:
        """The token of the slot."""
        return int(self.row.tokens[self.slot])

    @property
    def label(self) -> int:
        """The true next token; -100 where there is none."""
        return int(self.row.labels[self.slot])

    @property
    def target(self) -> SparseTargets:
        """Its target, without leading axes; `count` is 0 where it carries none."""
        return self.row.targets[self.slot]

    def _repr_html_(self) -> str:
        return str(show("position", self))


class Cache:
    """A cache of teacher targets, read by row.

    Attributes:
        storage: where it is.
        manifest: what it is.
        commits: the commit of each shard that exists.
    """

    def __init__(self, storage: Storage, manifest: Manifest, commits: Commits) -> None:
        self.storage, self.manifest, self.commits = storage, manifest, commits
        self._ends = np.cumsum(commits.column("rows"))
        self._open: LastUsed[Shard] = LastUsed(storage.open_shards)
        self._tokenizer: Path | None = None

    @property
    def known(self) -> Known:
        """What its targets know of the teacher: entropy, log p of the labels, temperatures of partitions and tails."""
        return self.manifest.known

    @property
    def row_spec(self) -> RowSpec:
        """The shape of its rows."""
        return self.manifest.row_spec

    @property
    def tokenizer_path(self) -> Path:
        """A local folder with the cache's tokenizer: the files that the manifest names, checked; fetched if remote.

        Empty if the cache was written without a tokenizer.

        Raises:
            CorruptCacheError: a file is missing, is not the one that the manifest names, or is not named by it.
        """
        if self._tokenizer is not None:
            return self._tokenizer
        files = {name: self._tokenizer_file(name) for name in self.manifest.tokenizer_files}
        if isinstance(self.storage, LocalStorage):
            unnamed = set(self.storage.names(TOKENIZER)) - {f"{TOKENIZER}/{name}" for name in files}
            if unnamed:  # the library that loads a tokenizer takes any other file in its folder
                raise CorruptCacheError(f"{self.storage.path_of(min(unnamed))} is not named by the manifest")
            if files:
                return self.storage.folder / TOKENIZER
        folder = Path(tempfile.mkdtemp(prefix="kdcache-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        self._tokenizer = folder
        return folder

    def load_tokenizer(self) -> Any:
        """The tokenizer itself.

        Raises:
            CacheError: the cache was written without one.
            CorruptCacheError: see `tokenizer_path`.
            ModelError: its files do not load.
        """
        if not self.manifest.tokenizer_files:
            raise CacheError(f"{self.storage} was written without a tokenizer, so its tokens cannot be shown as text")
        return load_tokenizer(self.tokenizer_path)

    def _tokenizer_file(self, name: str) -> bytes:
        where = self.storage.path_of(f"{TOKENIZER}/{name}")
        try:
            data = self.storage.read(f"{TOKENIZER}/{name}", MOST_TOKENIZER_BYTES)
        except FileNotFoundError:
            raise CorruptCacheError(f"{where} is missing") from None
        if hashlib.sha256(data).hexdigest() != self.manifest.tokenizer_files[name]:
            raise CorruptCacheError(f"{where} is not what the manifest names")
        return data

    def require_objects(self) -> None:
        """Check that every object of every shard is there with the size that was committed; nothing is read.

        Cost: a listing of the objects. `open_cache` does it where there is no seal; of a sealed cache an object that is
        missing is an error when it is read, unless somebody asks here first.

        Raises:
            CorruptCacheError: naming the first that is not.
        """
        sizes = self.storage.sizes(FOLDER)
        for name, size in self.commits.object_sizes():
            if sizes.get(name) != size:
                raise CorruptCacheError(
                    f"{self.storage.path_of(name)} has {sizes.get(name, 0)} bytes, not the {size} that were committed; "
                    "`kdcache verify` reports all that is wrong"
                )

    def only(self, shards: Iterable[int]) -> Cache:
        """The same cache as if only these shards were committed; their rows are numbered from 0.

        Raises:
            IncompleteCacheError: one of them is not committed.
        """
        chosen = sorted(set(shards))
        gone = [shard for shard in chosen if shard not in self.commits]
        if gone:
            raise IncompleteCacheError(f"{self.storage} has no committed shard {gone[0]}")
        return Cache(self.storage, self.manifest, self.commits.only(chosen))

    def missing(self) -> list[int]:
        """Planned shards that are not committed."""
        if len(self.commits) == self.manifest.shards:
            return []
        planned = np.arange(self.manifest.shards)
        return [int(shard) for shard in np.setdiff1d(planned, self.commits.shards)]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __iter__(self) -> Iterator[Row]:
        rows = enumerate(self.read_rows(range(len(self))))
        return (self._row(index, packed, targets) for index, (packed, targets) in rows)

    def locate(self, index: int) -> tuple[int, int]:
        """The shard of a row, and the row's number inside it.

        Raises:
            IndexError: no such row.
        """
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a cache of {len(self)} rows")
        at = int(np.searchsorted(self._ends, index, side="right"))
        return int(self.commits.shards[at]), index - (int(self._ends[at - 1]) if at else 0)

    def index(self, shard: int, row: int) -> int:
        """The cache-wide number of a shard's row.

        Raises:
            CacheError: no such shard or row.
        """
        if shard not in self.commits:
            raise CacheError(f"{self.storage} has no committed shard {shard}")
        at = int(np.searchsorted(self.commits.shards, shard))
        start = int(self._ends[at - 1]) if at else 0
        rows = int(self._ends[at]) - start
        if not 0 <= row < rows:
            raise CacheError(f"shard {shard} has rows 0 to {rows - 1}, not {row}")
        return start + row

    def __getitem__(self, index: int) -> Row:
        return self._row(index, *self.read_packed(index))

    def _row(self, index: int, packed: PackedRow, targets: SparseTargets) -> Row:
        row = unpack(packed, targets, self.manifest.seq_len)
        return dataclasses.replace(row, cache=self, index=index % len(self))

    def read_packed(self, index: int) -> tuple[PackedRow, SparseTargets]:
        """A row without padding, with its extras, and the targets of its labelled slots.

        `count` is 0 where the position filter left the slot out.
        """
        shard, row = self.locate(index)
        return self.shard(shard).read(row)

    def read_rows(self, indices: Iterable[int]) -> Iterator[tuple[PackedRow, SparseTargets]]:
        """The same of several rows, in their order; over a network they are read ahead of who iterates."""
        return self.storage.map(self.read_packed, indices)

    def shard(self, shard: int) -> Shard:
        """The reader of a committed shard."""
        return self._open.get(shard, lambda: open_shard(self.storage, self.manifest, self.commits[shard]))

    def zarr_group(self, shard: int) -> zarr.Group:
        """The zarr group of a committed shard, read-only, as zarr-python opens it: one array a stream.

        Raises:
            CacheError: the cache is not in the zarr store, or has no such shard.
        """
        if self.manifest.store != "zarr":
            raise CacheError(f"{self.storage} is in the {self.manifest.store} store and holds no zarr groups")
        if shard not in self.commits:
            raise CacheError(f"{self.storage} has no committed shard {shard}")
        return open_group(self.storage, self.shard(shard).name)

    def to_torch(self) -> torch.utils.data.Dataset[dict[str, torch.Tensor]]:
        """Its rows as a data set of torch: dicts of tensors of fixed shapes, read as they are asked for.

        `kdcache.row_views` says what is in them. A `DataLoader` stacks them with its own collator, shuffles them, and
        may send the data set to worker processes.
        """
        from kdcache.row_views import TorchRows

        return TorchRows(self)

    def to_datasets(self) -> Any:
        """Its rows as a `datasets.Dataset`: the same dicts, read as they are asked for; nothing is copied.

        It selects, shuffles, shards and iterates as any other. Its one stored column is `row`, the number of a row;
        `map` therefore reads what it is given, and writes what it makes as usual.
        """
        from kdcache.row_views import datasets_view

        return datasets_view(self)

    def plot(
        self, what: str = "kept-mass", *, rows: int = 128, on_progress: Callable[[int, int], None] | None = None
    ) -> Any:
        """A plot of it, which a notebook shows; `.numbers` holds what is drawn, `.save(path)` writes a PNG or SVG.

        `kept-mass` is the mass that the k largest entries keep, for each k; `selections` bytes against error, for each
        selection that can be made of this cache; `entropy` how sure the teacher was, by position and by document.

        Args:
            what: one of these.
            rows: how many rows are read for it, evenly spread.
            on_progress: called with rows read and rows to read.

        Raises:
            ConfigError: there is no such plot, or the cache does not know what it shows.
        """
        return show("plot", self, what, rows, on_progress)

    def _repr_html_(self) -> str:
        return str(show("cache", self))

    def __reduce__(self) -> tuple[type[Cache], tuple[Any, ...]]:
        return Cache, (self.storage, self.manifest, self.commits)


def unpack(packed: PackedRow, targets: SparseTargets, seq_len: int) -> Row:
    """Pad a row to `seq_len` slots and put each target in the slot that it belongs to."""
    labels = packed.labels(seq_len)
    return Row(
        tokens=torch.from_numpy(packed.padded_tokens(seq_len)),
        labels=torch.from_numpy(labels),
        segments=torch.from_numpy(packed.segments(seq_len)),
        documents=torch.from_numpy(packed.piece_documents.astype(np.int64)),
        targets=targets.spread(torch.from_numpy(np.flatnonzero(labels != IGNORE)), seq_len),
        extras={name: torch.from_numpy(values) for name, values in packed.padded_extras(seq_len).items()},
    )


def open_cache(
    path: str | os.PathLike[str],
    *,
    partial: bool = False,
    local_copy: str | os.PathLike[str] | None = None,
    local_limit: str | int = "20GB",
) -> Cache:
    """Open a cache for reading.

    Args:
        path: its folder, or any URL that fsspec knows, such as `s3://bucket/cache`.
        partial: accept a cache of which some shards are not committed yet; the rows are those
            of the shards that exist now.
        local_copy: keep copies of what is read from a URL in this folder.
        local_limit: the most that the copies hold together, such as `20GB`.

    Raises:
        ConfigError: a URL that cannot be used, a limit that is no size, or a local copy of a folder.
        CacheError: no cache there.
        IncompleteCacheError: shards are missing and `partial` is false.
        CorruptCacheError: the manifest, the seal or a commit is damaged, or (unless `partial`, and where there is no
            seal) an object is not there with its size.
    """
    storage, limit = open_storage(path), parse_size(local_limit)
    manifest = Manifest.read(storage)
    if local_copy is not None:
        storage = mirror(storage, manifest.sha256, local_copy, limit)
    cache = Cache(storage, manifest, open_commits(storage, manifest))
    missing = manifest.shards - len(cache.commits)
    if missing and not partial:
        raise IncompleteCacheError(
            f"{storage} is incomplete: {missing} of {manifest.shards} shards are missing; "
            "run the same dump-teacher command again to finish it"
        )
    if not partial and not cache.commits.sealed:
        cache.require_objects()
    return cache
