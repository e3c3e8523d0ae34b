"""Totals: what all committed shards of a cache hold together."""

from __future__ import annotations

from typing import Any

from kdcache.store.commit import commit_name, read_commits
from kdcache.store.entropies import added, quantiles
from kdcache.store.manifest import NAME, Manifest
from kdcache.store.place import Place


def totals(place: Place) -> dict[str, Any]:
    """Counts, entropy quantiles, and bytes of the manifest, commits and shards; the tokenizer is not counted."""
    manifest = Manifest.read(place)
    commits = read_commits(place, manifest)
    names = ("rows", "labels", "positions", "entries", "documents", "dropped")
    total = {name: sum(getattr(c, name) for c in commits.values()) for name in names}
    sizes = place.map(place.size, [NAME, *(commit_name(shard) for shard in commits)])
    size = sum(found or 0 for found in sizes) + sum(data["bytes"] for c in commits.values() for data in c.objects)
    return {
        "cache": str(place),
        "complete": len(commits) == manifest.shards,
        "shards": {"planned": manifest.shards, "committed": len(commits)},
        **total,
        "bytes": size,
        "bytes_per_position": size / max(1, total["positions"]),
        "entropy_quantiles": quantiles(added(c.entropy_histogram for c in commits.values())),
    }
