"""Cache: rows by index, in O(1), memory-mapped, with no teacher in sight.

Opening reads the manifest and one small commit a shard; a row costs one record batch. An
open cache may be sent to worker processes: it reopens its shards there.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.errors import CacheError, CorruptCacheError, IncompleteCacheError
from kdcache.rows import IGNORE, PackedRow
from kdcache.store.arrow_store import ArrowShard, digest_row
from kdcache.store.commit import Commit, commit_path, read_commits
from kdcache.store.durable import sha256_file
from kdcache.store.manifest import NAME, Manifest
from kdcache.targets import SparseTargets

_OPEN_SHARDS = 64


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a cache, padded to L = `seq_len` slots; torch tensors, positions first.

    Attributes:
        tokens: `[L]` int64, 0 where padded.
        labels: `[L]` int64, labels[t] = tokens[t+1] inside a piece, already shifted, else -100.
        segments: `[L]` int64, piece of each token, -1 where padded.
        documents: `[P]` int64, the document that each piece comes from.
        targets: SparseTargets over L slots; `count` is 0 where the label is -100.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    segments: torch.Tensor
    documents: torch.Tensor
    targets: SparseTargets


class Cache:
    """A cache of teacher targets, read by row.

    Attributes:
        path: its folder.
        manifest: what it is.
        commits: the commit of each shard that exists.
    """

    def __init__(self, path: Path, manifest: Manifest, commits: dict[int, Commit]) -> None:
        self.path, self.manifest, self.commits = path, manifest, commits
        self._shards = list(commits)
        self._ends = list(itertools.accumulate(commit.rows for commit in commits.values()))
        self._open: OrderedDict[int, ArrowShard] = OrderedDict()

    @property
    def tokenizer_path(self) -> Path:
        """The folder of the cache's tokenizer."""
        return self.path / "tokenizer"

    def missing(self) -> list[int]:
        """Planned shards that are not committed."""
        return sorted(set(range(self.manifest.shards)) - set(self.commits))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))

    def locate(self, index: int) -> tuple[int, int]:
        """The shard of a row, and the row's number inside it.

        Raises:
            IndexError: no such row.
        """
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of a cache of {len(self)} rows")
        place = bisect.bisect_right(self._ends, index)
        return self._shards[place], index - (self._ends[place - 1] if place else 0)

    def index(self, shard: int, row: int) -> int:
        """The cache-wide number of a shard's row.

        Raises:
            CacheError: no such shard or row.
        """
        if shard not in self.commits:
            raise CacheError(f"{self.path} has no committed shard {shard}")
        if not 0 <= row < self.commits[shard].rows:
            raise CacheError(f"shard {shard} has rows 0 to {self.commits[shard].rows - 1}, not {row}")
        place = self._shards.index(shard)
        return row + (self._ends[place - 1] if place else 0)

    def __getitem__(self, index: int) -> Row:
        packed, targets = self.read_packed(index)
        return unpack(packed, targets, self.manifest.seq_len)

    def read_packed(self, index: int) -> tuple[PackedRow, SparseTargets]:
        """A row without padding, and the targets of its labelled slots."""
        shard, row = self.locate(index)
        return self._reader(shard).read(row)

    def _reader(self, shard: int) -> ArrowShard:
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            commit = self.commits[shard]
            data = commit.objects[0]
            path = _inside(self.path, data["name"])
            if not path.is_file() or path.stat().st_size != data["bytes"]:
                raise CorruptCacheError(f"{path} is missing or not the {data['bytes']} bytes that were committed")
            self._open[shard] = ArrowShard(path, shard, self.manifest.codec, self.manifest.seq_len, commit.rows)
            if len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}


def unpack(packed: PackedRow, targets: SparseTargets, seq_len: int) -> Row:
    """Pad a row to `seq_len` slots and put each target in the slot that it belongs to."""
    labels = packed.labels(seq_len)
    return Row(
        tokens=torch.from_numpy(packed.padded_tokens(seq_len)),
        labels=torch.from_numpy(labels),
        segments=torch.from_numpy(packed.segments(seq_len)),
        documents=torch.from_numpy(packed.piece_documents.astype(np.int64)),
        targets=targets.spread(torch.from_numpy(np.flatnonzero(labels != IGNORE)), seq_len),
    )


def open_cache(path: str | os.PathLike[str], *, partial: bool = False) -> Cache:
    """Open a cache for reading.

    Args:
        path: its folder.
        partial: accept a cache of which some shards are not committed yet; the rows are those
            of the shards that exist now.

    Raises:
        CacheError: no cache there.
        IncompleteCacheError: shards are missing and `partial` is false.
        CorruptCacheError: the manifest or a commit is damaged.
    """
    folder = Path(path)
    manifest = Manifest.read(folder)
    cache = Cache(folder, manifest, read_commits(folder, manifest))
    if cache.missing() and not partial:
        raise IncompleteCacheError(
            f"{folder} is incomplete: {len(cache.missing())} of {manifest.shards} shards are missing; "
            "run the same dump-teacher command again to finish it"
        )
    return cache


@dataclass(kw_only=True)
class VerifyReport:
    """What `verify_cache` found.

    Attributes:
        shards, objects, bytes: how much was checked.
        problems: `{"shard", "object", "what"}` each; shard is None for what belongs to the whole cache.
    """

    shards: int = 0
    objects: int = 0
    bytes: int = 0
    problems: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def add(self, shard: int | None, name: str, what: object) -> None:
        """Note a problem."""
        self.problems.append({"shard": shard, "object": name, "what": str(what)})


def verify_cache(path: str | os.PathLike[str], on_progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Re-hash every object, decode every row, and report all problems, not only the first.

    Args:
        path: the cache's folder.
        on_progress: called with (shards done, shards planned).

    Raises:
        CacheError: there is no cache to verify.
    """
    folder, report = Path(path), VerifyReport()
    try:
        manifest = Manifest.read(folder)
    except CorruptCacheError as error:
        report.add(None, NAME, error)
        return report
    for name, sha256 in manifest.tokenizer_files.items():
        _check_object(report, folder, None, {"name": f"tokenizer/{name}", "sha256": sha256})
    manifest_sha256 = manifest.sha256
    for shard in range(manifest.shards):
        if on_progress:
            on_progress(shard, manifest.shards)
        name = str(commit_path(folder, shard).relative_to(folder))
        try:
            commit = Commit.read(folder, shard, manifest_sha256)
        except CorruptCacheError as error:
            report.add(shard, name, error)
            continue
        if commit is None:
            report.add(shard, name, "the shard is not committed")
            continue
        report.shards += 1
        sound = [_check_object(report, folder, shard, data) for data in commit.objects]
        if all(sound):
            _check_rows(report, Cache(folder, manifest, {shard: commit}), commit)
    return report


def _check_object(report: VerifyReport, folder: Path, shard: int | None, data: dict[str, Any]) -> bool:
    path, report.objects = _inside(folder, data["name"]), report.objects + 1
    if not path.is_file():
        report.add(shard, data["name"], "it is missing")
    elif sha256_file(path) != data["sha256"]:
        report.add(shard, data["name"], "its sha256 is not the one recorded")
    else:
        report.bytes += path.stat().st_size
        return True
    return False


def _check_rows(report: VerifyReport, cache: Cache, commit: Commit) -> None:
    positions, entries, digest = 0, 0, hashlib.sha256()
    name = commit.objects[0]["name"]
    try:
        for index in range(len(cache)):
            packed, targets = cache.read_packed(index)
            positions, entries = positions + len(targets.count), entries + int(targets.count.sum())
            digest_row(digest, packed)
    except CorruptCacheError as error:
        report.add(commit.shard, name, error)
        return
    found = (positions, entries, digest.hexdigest())
    if found != (commit.positions, commit.entries, commit.tokens_sha256):
        report.add(commit.shard, name, "its rows are not the ones that were committed")


def _inside(folder: Path, name: object) -> Path:
    """A path that a record names, refused if it leads out of the cache."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CorruptCacheError(f"{folder} names an object {name!r} outside of itself")
    return folder / name
