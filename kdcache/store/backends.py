"""Backends: the stores by name."""

from __future__ import annotations

from kdcache.store.arrow_store import ArrowShardWriter
from kdcache.store.commit import Commit
from kdcache.store.manifest import Manifest
from kdcache.store.place import Place
from kdcache.store.shards import Shard, ShardWriter
from kdcache.store.zarr_store import ZarrShardWriter

WRITERS: dict[str, type[ShardWriter]] = {"arrow": ArrowShardWriter, "zarr": ZarrShardWriter}


def new_shard(place: Place, manifest: Manifest, shard: int) -> ShardWriter:
    """A writer of one shard of a cache."""
    return WRITERS[manifest.store](place, shard, manifest.row_format)


def open_shard(place: Place, manifest: Manifest, commit: Commit) -> Shard:
    """A reader of one committed shard.

    Raises:
        CorruptCacheError: its objects are not what the commit promises.
    """
    reader = WRITERS[manifest.store].reader()
    return reader(place, commit.shard, manifest.row_format, commit.objects, commit.rows)
