"""Totals: what all committed shards of a cache hold together.

Commits: the small record that makes a shard exist, written last and once only.

Entropies: a histogram of the teacher's entropy, small enough for a commit, from which quantiles can be told.

Bin i counts positions with (i / 32)^2 <= H < ((i + 1) / 32)^2 nats: a thousandth of a nat wide at 0, where most
positions of a sure teacher lie, a sixteenth at 1 nat, a fifth at 10. Histograms of shards add up. A quantile is found
inside its bin by interpolation, so it is off by less than the bin is wide, whatever the distribution.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from kdcache.errors import CorruptCacheError
from kdcache.store.manifest import FORMAT, NAME, Manifest
from kdcache.store.sealed_json import read_record, require_fields, seal, short
from kdcache.store.shards import shard_stem
from kdcache.store.storage import Storage, inside

MOST_BINS = 150
"""The entropy of 2^31 tokens lies in the last but one."""

LEVELS = (0.1, 0.25, 0.5, 0.75, 0.9, 0.99)

_BINS_A_ROOT = 32


def histogram(entropy: torch.Tensor | None) -> list[int]:
    """Positions in each bin, up to the last that has any; none where the entropy is unknown.

    Args:
        entropy: `[N]` nats, on the CPU.
    """
    if entropy is None:
        return []
    bins = (_BINS_A_ROOT * entropy.double().clamp(min=0).sqrt()).long().clamp(max=MOST_BINS - 1)
    return np.bincount(bins.numpy()).tolist() if len(bins) else []


def added(histograms: Iterable[Sequence[int]]) -> list[int]:
    """One histogram of several."""
    return [sum(column) for column in itertools.zip_longest(*histograms, fillvalue=0)]


def quantiles(counts: Sequence[int]) -> dict[str, float] | None:
    """The entropy, nats, below which a share of the positions lies, by share; None where there is no position."""
    ends = list(itertools.accumulate(counts))
    if not ends or not ends[-1]:
        return None
    found = {}
    for level in LEVELS:
        wanted = level * ends[-1]
        i = next(i for i, end in enumerate(ends) if end >= wanted)
        low, high = (i / _BINS_A_ROOT) ** 2, ((i + 1) / _BINS_A_ROOT) ** 2
        found[f"{level:g}"] = low + (high - low) * (wanted - (ends[i] - counts[i])) / counts[i]
    return found


FOLDER = "commits"
_LEAST_ROW = 16
"""Bytes; a row has its offsets and its seal in any store. So a claim of rows is bounded by what lies there."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """Contents of `commits/00007.json`.

    Attributes:
        shard: the shard's own number.
        manifest_sha256: the cache that it belongs to.
        rows, labels, positions, entries: what the shard holds; positions are the labelled ones that carry a target.
        documents, dropped: documents in its range, and how many of them the filters dropped.
        objects: `{"name", "bytes", "sha256"}` of each file of the shard.
        tokens_sha256: of the token ids of its rows, the shape of the pieces included.
        content_sha256: of all streams of its rows, before compression: equal in every store.
        entropy_histogram: of the teacher, over all labelled positions; see `histogram`. Empty where it is unknown.
        compute: dtype, device, threads and batch size that made it; bit-identity is promised for
            equal values of these, near-identity otherwise.
    """

    shard: int
    manifest_sha256: str
    rows: int
    labels: int
    positions: int
    entries: int
    documents: int
    dropped: int
    objects: list[dict[str, Any]]
    tokens_sha256: str
    content_sha256: str
    entropy_histogram: list[int]
    compute: dict[str, Any]

    def write(self, storage: Storage) -> bool:
        """Commit the shard; False if another worker did so first."""
        return storage.create(commit_name(self.shard), seal({"format": FORMAT, **dataclasses.asdict(self)}))

    @classmethod
    def read(cls, storage: Storage, shard: int, manifest_sha256: str) -> Self | None:
        """The commit of a shard, or None if it is not committed.

        Raises:
            CorruptCacheError: damaged, or the commit of another shard or cache.
        """
        path = storage.where(commit_name(shard))
        try:
            fields = read_record(storage, commit_name(shard))
        except FileNotFoundError:
            return None
        form = fields.pop("format", None)
        del fields["checksum"]
        try:
            if type(form) is not int or form != FORMAT:
                raise ValueError(f"it is of format {short(repr(form))}")
            require_fields(fields, cls)
            commit = cls(**fields)
            commit._check()
        except (ValueError, CorruptCacheError) as error:
            raise CorruptCacheError(f"{path} does not describe a shard: {error}") from None
        if commit.shard != shard or commit.manifest_sha256 != manifest_sha256:
            raise CorruptCacheError(f"{path} is the commit of another shard or of another cache")
        return commit

    def _check(self) -> None:
        stem = shard_stem(self.shard)
        for data in self.objects:
            require_fields(data, _Object)
            if not inside(data["name"]).startswith((f"{stem}.", f"{stem}-")):
                raise ValueError(f"it names an object {short(data['name'])} that is not of shard {self.shard}")
        if not self.objects or len({data["name"] for data in self.objects}) != len(self.objects):
            raise ValueError("it names no object, or one twice")
        size = sum(data["bytes"] for data in self.objects)
        if self.rows * _LEAST_ROW > size or self.rows >= 1 << 32:
            raise ValueError(f"it claims {self.rows} rows in {size} bytes")
        if self.positions > self.labels:
            raise ValueError(f"it claims {self.positions} targets for {self.labels} labels")
        counted = sum(self.entropy_histogram)  # none where the entropy is unknown
        if len(self.entropy_histogram) > MOST_BINS or (self.entropy_histogram and counted != self.labels):
            raise ValueError(f"its histogram is not of the entropies of {self.labels} labels")


@dataclass(frozen=True, kw_only=True)
class _Object:
    """The fields of an entry of `objects`."""

    name: str
    bytes: int
    sha256: str


def commit_name(shard: int) -> str:
    """The object that holds the commit of a shard."""
    return f"{FOLDER}/{shard:05d}.json"


def read_commits(storage: Storage, manifest: Manifest) -> dict[int, Commit]:
    """The commits of all shards that exist, by shard, in order."""
    sha256, shards = manifest.sha256, []
    for name in storage.names(FOLDER):
        number = name.removeprefix(f"{FOLDER}/").removesuffix(".json")
        if number.isdecimal() and int(number) < manifest.shards and name == commit_name(int(number)):
            shards.append(int(number))
    found = storage.map(lambda shard: Commit.read(storage, shard, sha256), sorted(shards))
    return {commit.shard: commit for commit in found if commit is not None}


def totals(storage: Storage) -> dict[str, Any]:
    """Counts, entropy quantiles, and bytes of the manifest, commits and shards; the tokenizer is not counted."""
    manifest = Manifest.read(storage)
    commits = read_commits(storage, manifest)
    names = ("rows", "labels", "positions", "entries", "documents", "dropped")
    total = {name: sum(getattr(c, name) for c in commits.values()) for name in names}
    sizes = storage.map(storage.size, [NAME, *(commit_name(shard) for shard in commits)])
    size = sum(found or 0 for found in sizes) + sum(data["bytes"] for c in commits.values() for data in c.objects)
    return {
        "cache": str(storage),
        "complete": len(commits) == manifest.shards,
        "shards": {"planned": manifest.shards, "committed": len(commits)},
        **total,
        "bytes": size,
        "bytes_per_position": size / max(1, total["positions"]),
        "entropy_quantiles": quantiles(added(c.entropy_histogram for c in commits.values())),
    }
