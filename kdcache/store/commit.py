"""Commits: the small record that makes a shard exist, written last and once only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Self

from kdcache.errors import CorruptCacheError
from kdcache.store.entropies import MOST_BINS
from kdcache.store.manifest import FORMAT, Manifest
from kdcache.store.place import Place, inside
from kdcache.store.record import read_record, require_fields, seal, short
from kdcache.store.shards import shard_stem

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
        entropy_histogram: of the teacher, over all labelled positions; see `entropies`.
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

    def write(self, place: Place) -> bool:
        """Commit the shard; False if another worker did so first."""
        return place.create(commit_name(self.shard), seal({"format": FORMAT, **dataclasses.asdict(self)}))

    @classmethod
    def read(cls, place: Place, shard: int, manifest_sha256: str) -> Self | None:
        """The commit of a shard, or None if it is not committed.

        Raises:
            CorruptCacheError: damaged, or the commit of another shard or cache.
        """
        path = place.where(commit_name(shard))
        try:
            fields = read_record(place, commit_name(shard))
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
        if len(self.entropy_histogram) > MOST_BINS or sum(self.entropy_histogram) != self.labels:
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


def read_commits(place: Place, manifest: Manifest) -> dict[int, Commit]:
    """The commits of all shards that exist, by shard, in order."""
    sha256, shards = manifest.sha256, []
    for name in place.names(FOLDER):
        number = name.removeprefix(f"{FOLDER}/").removesuffix(".json")
        if number.isdecimal() and int(number) < manifest.shards and name == commit_name(int(number)):
            shards.append(int(number))
    found = place.map(lambda shard: Commit.read(place, shard, sha256), sorted(shards))
    return {commit.shard: commit for commit in found if commit is not None}
