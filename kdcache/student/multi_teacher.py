"""Teachers: caches of several teachers over the same rows, read as one whose targets are pools.

`--cache FIRST --pool OTHER[:WEIGHT]`. They line up when row for row they hold the same tokens in the same pieces: the
same tokenizer, corpus and plan of shards, and for every shard the same `tokens_sha256`, which is the proof. Which
tokens may be labels is not in that hash, so it is compared as rows are read. How many entries each keeps and at which
positions, in which store, place and precision, is its own affair.

Cost: of reading, that of all caches.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kdcache.cache import Cache
from kdcache.errors import ConfigError, TargetError
from kdcache.losses import Pool
from kdcache.losses.pool import require_alike
from kdcache.rows import PackedRow, RowSpec
from kdcache.store.manifest import Manifest
from kdcache.targets import SparseTargets


@dataclass(frozen=True)
class TeacherCache:
    """One teacher of a pool.

    Attributes:
        name: of its cache: the folder or URL.
        cache: what it said.
        weight: its share of the pool, in any unit.
    """

    name: str
    cache: Cache
    weight: float


class RowReader(Protocol):
    """What rows are read from: a `Cache`, a `PooledCache`, or the `AlignedRows` of a student with another tokenizer."""

    @property
    def manifest(self) -> Manifest:
        """Of the cache that gives the rows."""

    @property
    def row_spec(self) -> RowSpec:
        """The shape of the rows, in the student's tokens."""

    def read_packed(self, index: int) -> tuple[PackedRow, SparseTargets | Pool]:
        """A row without padding, and the targets of its labelled slots."""

    def read_rows(self, indices: Iterable[int]) -> Iterator[tuple[PackedRow, SparseTargets | Pool]]:
        """The same of several rows, in their order."""


class PooledCache:
    """Rows whose targets are a `Pool` of what several teachers say; read as a `Cache` is.

    Attributes:
        teachers: the first gives the rows; they line up, see `require_lined_up`.
        manifest: of the first.
        row_spec: of its rows.
    """

    def __init__(self, teachers: Sequence[TeacherCache]) -> None:
        self.teachers = tuple(teachers)
        self.manifest = teachers[0].cache.manifest
        self.row_spec = self.manifest.row_spec

    def read_packed(self, index: int) -> tuple[PackedRow, Pool]:
        """A row without padding, and the pool of its labelled slots."""
        return self._pooled(index, [teacher.cache.read_packed(index) for teacher in self.teachers])

    def read_rows(self, indices: Iterable[int]) -> Iterator[tuple[PackedRow, Pool]]:
        """The same of several rows, in their order; all caches read ahead where one does."""
        numbers, *copies = itertools.tee(indices, 1 + len(self.teachers))
        each = [teacher.cache.read_rows(copy) for teacher, copy in zip(self.teachers, copies, strict=True)]
        for index, *found in zip(numbers, *each, strict=True):
            yield self._pooled(index, found)

    def _pooled(self, index: int, found: Sequence[tuple[PackedRow, SparseTargets]]) -> tuple[PackedRow, Pool]:
        row = found[0][0]
        for teacher, (other, _) in zip(self.teachers[1:], found[1:], strict=True):
            if not _same_labels(row, other):
                raise ConfigError(
                    f"row {index} of {self.teachers[0].name} and of {teacher.name} have other labels, so their targets "
                    "are not at the same positions; pool caches of one form of the corpus"
                )
        return row, Pool(tuple(targets for _, targets in found), tuple(teacher.weight for teacher in self.teachers))


def _same_labels(one: PackedRow, other: PackedRow) -> bool:
    if one.supervised is None or other.supervised is None:
        return one.supervised is other.supervised
    return np.array_equal(one.supervised, other.supervised)


def require_lined_up(first: TeacherCache, other: TeacherCache) -> None:
    """Refuse to pool caches whose rows are not the same, or whose targets cannot be pooled.

    Raises:
        ConfigError: naming both, and what differs: of the manifests, or the first shard.
    """
    both = f"{first.name} and {other.name}"
    mine, theirs = first.cache.manifest, other.cache.manifest
    if mine.sha256 == theirs.sha256:
        raise ConfigError(f"{both} are one cache; a pool takes that of another teacher")
    one, two = _rows_of(mine), _rows_of(theirs)
    differing = [f"{what} ({one[what]} and {two[what]})" for what in one if one[what] != two[what]]
    if differing:
        raise ConfigError(f"{both} cannot be pooled: they differ in {', '.join(differing)}")
    try:
        require_alike(*((each.rule.kind, each.rule.sampled) for each in (mine, theirs)))
    except TargetError as error:
        raise ConfigError(f"{both} cannot be pooled: {error}") from None
    commits, partners = first.cache.commits, other.cache.commits
    gone = np.setdiff1d(commits.shards, partners.shards)
    if len(gone):
        raise ConfigError(f"{both} cannot be pooled: the second has no shard {gone[0]}")
    shard = commits.first_with_other_tokens(partners)
    if shard is not None:
        raise ConfigError(
            f"{both} cannot be pooled: shard {shard} is the first to hold other tokens, in {commits[shard].rows} rows "
            f"here and {partners[shard].rows} there"
        )


def _rows_of(manifest: Manifest) -> dict[str, Any]:
    """What decides which tokens are in which row, for a message."""
    return {
        "tokenizer": manifest.tokenizer_sha256[:12],
        "vocab_size": manifest.vocab_size,
        "corpus": manifest.corpus_sha256[:12],
        "filters": manifest.filters,
        "documents": manifest.documents,
        "shards": manifest.shards,
        "seq_len": manifest.seq_len,
        "pack": manifest.pack,
        "overlong": manifest.overlong,
        "isolate": manifest.isolate,
    }
