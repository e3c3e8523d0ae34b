"""Commits: the small record that makes a shard exist, written last and once only."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kdcache.errors import CorruptCacheError
from kdcache.store.durable import write_new
from kdcache.store.manifest import FORMAT, Manifest
from kdcache.store.record import read_record, seal

FOLDER = "commits"


@dataclass(frozen=True, kw_only=True)
class Commit:
    """Contents of `commits/00007.json`.

    Attributes:
        shard: the shard's own number.
        manifest_sha256: the cache that it belongs to.
        rows, positions, entries: what the shard holds.
        documents, dropped: documents in its range, and how many of them the filters dropped.
        objects: `{"name", "bytes", "sha256"}` of each file of the shard.
        tokens_sha256: of the token ids of its rows, the shape of the pieces included.
        compute: dtype, device, threads and batch size that made it; bit-identity is promised for
            equal values of these, near-identity otherwise.
    """

    shard: int
    manifest_sha256: str
    rows: int
    positions: int
    entries: int
    documents: int
    dropped: int
    objects: list[dict[str, Any]]
    tokens_sha256: str
    compute: dict[str, Any]

    def write(self, cache: Path) -> bool:
        """Commit the shard; False if another worker did so first."""
        return write_new(commit_path(cache, self.shard), seal({"format": FORMAT, **dataclasses.asdict(self)}))

    @classmethod
    def read(cls, cache: Path, shard: int, manifest_sha256: str) -> Self | None:
        """The commit of a shard, or None if it is not committed.

        Raises:
            CorruptCacheError: damaged, or the commit of another shard or cache.
        """
        path = commit_path(cache, shard)
        try:
            fields = read_record(path)
        except FileNotFoundError:
            return None
        names = {field.name for field in dataclasses.fields(cls)}
        if set(fields) - {"checksum", "format"} != names or fields.get("format") != FORMAT:
            raise CorruptCacheError(f"{path} does not have the fields of a commit")
        commit = cls(**{name: fields[name] for name in names})
        if commit.shard != shard or commit.manifest_sha256 != manifest_sha256:
            raise CorruptCacheError(f"{path} is the commit of another shard or of another cache")
        objects = commit.objects
        if not isinstance(objects, list) or not objects or any(set(x) != {"name", "bytes", "sha256"} for x in objects):
            raise CorruptCacheError(f"{path} does not name the objects of its shard")
        counts = (commit.rows, commit.positions, commit.entries, commit.documents, commit.dropped)
        if any(not isinstance(n, int) or n < 0 for n in counts):
            raise CorruptCacheError(f"{path} has a count that is not a number of things")
        return commit


def commit_path(cache: Path, shard: int) -> Path:
    """Where the commit of a shard lies."""
    return cache / FOLDER / f"{shard:05d}.json"


def read_commits(cache: Path, manifest: Manifest) -> dict[int, Commit]:
    """The commits of all shards that exist, by shard, in order."""
    sha256 = manifest.sha256
    found = ((shard, Commit.read(cache, shard, sha256)) for shard in range(manifest.shards))
    return {shard: commit for shard, commit in found if commit is not None}
