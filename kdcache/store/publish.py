"""Publish: how a cache comes into being, how a shard joins it, and what its shards hold together.

Order of writes, each durable before the next: tokenizer, plan, manifest; then for each shard its data, then its commit;
the seal last, and beside it a list of bad records. Every step is create-only, so workers that race leave one manifest,
one commit a shard and one seal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from kdcache.corpus.plan import Plan
from kdcache.errors import CacheError, ConfigError
from kdcache.store.bad_records import LISTING, by_plain_reason, fit, listing
from kdcache.store.commit import FOLDER, Commit, commit_name, quantiles
from kdcache.store.commits import Commits, committed, read_commits
from kdcache.store.heartbeat import FOLDER as HEARTBEATS
from kdcache.store.heartbeat import heartbeat_name
from kdcache.store.manifest import NAME, PLAN, Manifest
from kdcache.store.plan import create_plan, require_plan
from kdcache.store.registry import find_store
from kdcache.store.seal import open_commits, seal_cache, unseal
from kdcache.store.shards import FOLDER as SHARDS
from kdcache.store.shards import Shard, ShardWriter, recorded_shards, shard_stem
from kdcache.store.storage import Storage


def new_shard(storage: Storage, manifest: Manifest, shard: int) -> ShardWriter:
    """A writer of one shard of a cache."""
    return find_store(manifest.store).writer(storage, shard, manifest.row_format)


def open_shard(storage: Storage, manifest: Manifest, commit: Commit) -> Shard:
    """A reader of one committed shard.

    Raises:
        CorruptCacheError: its objects are not what the commit promises.
    """
    reader = find_store(manifest.store).reader
    return reader(storage, commit.shard, manifest.row_format, commit.objects, commit.rows)


TOKENIZER = "tokenizer"
_MOST_BYTES = 1 << 30


def require_free_or_same(storage: Storage, manifest: Manifest, but_for: tuple[str, ...] = ()) -> Manifest | None:
    """The manifest of the cache that is there, if it is of this configuration; None where nothing is.

    Args:
        storage: where the cache is, or will be.
        manifest: of this configuration.
        but_for: fields that may differ.

    Raises:
        CacheMismatchError: a cache of another configuration.
        CacheError: other files, or a storage where no cache should be created.
    """
    if storage.size(NAME) is not None:
        existing = Manifest.read(storage)
        existing.require_same(
            dataclasses.replace(manifest, **{name: getattr(existing, name) for name in but_for}), storage
        )
        return existing
    strangers = [
        name for name in storage.names() if not name.startswith(f"{TOKENIZER}/") and name != PLAN
    ]  # written before the manifest
    if NAME in strangers:  # another worker was quick
        return require_free_or_same(storage, manifest, but_for)
    if strangers:
        raise CacheError(f"{storage} holds no cache but other files, such as {strangers[0]}; choose another folder")
    storage.require_fit()
    return None


def publish_manifest(
    storage: Storage, manifest: Manifest, tokenizer: dict[str, bytes], plan: Plan | None = None
) -> Manifest:
    """Write the tokenizer's files, the plan and then the manifest, or take those that another worker has written.

    Args:
        storage: where the cache is to be.
        manifest: all but `tokenizer_files` and `plan`, which follow from what is written here.
        tokenizer: the bytes of each of its files, by name.
        plan: of the shards; None where the cache is not made from a corpus.

    Raises:
        CacheMismatchError: a cache of another configuration, or of other documents in its shards, is there.
        CacheError: the files of another tokenizer are there, or the storage cannot be written.
    """
    if storage.size(NAME) is None:
        for name, data in tokenizer.items():
            path = f"{TOKENIZER}/{name}"
            if not storage.create(path, data) and storage.read(path, _MOST_BYTES) != data:
                raise CacheError(
                    f"{storage.path_of(path)} is of another tokenizer; delete {TOKENIZER}, or choose another folder"
                )
        strays = sorted(set(storage.names(TOKENIZER)) - {f"{TOKENIZER}/{name}" for name in tokenizer})
        if strays and storage.size(NAME) is None:
            raise CacheError(
                f"{storage.path_of(strays[0])} is a stray file; delete {TOKENIZER}, or choose another folder"
            )
        sums = {name: hashlib.sha256(data).hexdigest() for name, data in tokenizer.items()}
        planned = {} if plan is None else create_plan(storage, plan)
    else:
        sums, planned = manifest.tokenizer_files, manifest.plan
    existing = dataclasses.replace(manifest, tokenizer_files=sums, plan=planned).create(storage)
    require_plan(storage, existing, plan)
    return existing


def publish_shard(
    storage: Storage,
    manifest: Manifest,
    writer: ShardWriter,
    *,
    documents: int,
    entropies: list[int] | None,
    compute: dict[str, Any],
    sums: dict[str, Any] | None = None,
    dropped_by: Mapping[str, int] | None = None,
    bad: int = 0,
    bad_records: Iterable[Mapping[str, Any]] = (),
    cut: int = 0,
    truncated: int = 0,
    eos_labels: int | None = None,
) -> bool:
    """Make a written shard appear and commit it. False if another worker was first.

    Args:
        storage: where the cache is.
        manifest: the one that is there.
        writer: all rows written.
        documents: in its range.
        entropies: histogram of the teacher's entropy over its labelled positions; None if that is unknown.
        compute: how its numbers were made.
        sums: of its targets before rounding; None for those of the targets that were written.
        dropped_by: documents that became no rows, by reason.
        bad, bad_records: how many of them could not be used, and `document` and `reason` of each.
        cut, truncated, eos_labels: see `Commit`.

    Raises:
        ConfigError: counts that contradict each other, or a `compute` that is not plain JSON of moderate size.
    """
    if Commit.read(storage, writer.shard, manifest.sha256) is not None:
        return False
    unseal(storage)
    objects, ours = writer.publish(find_store(manifest.store).reader)
    try:
        reasons, listed = by_plain_reason(dropped_by or {}), fit(bad_records)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"shard {writer.shard} cannot be committed: {error}") from None
    if listed and listed[-1]["document"] >= manifest.documents:
        raise ConfigError(
            f"shard {writer.shard} cannot be committed: bad record {listed[-1]['document']} is not one of the "
            f"{manifest.documents} documents"
        )
    commit = Commit(
        shard=writer.shard,
        manifest_sha256=manifest.sha256,
        objects=objects,
        documents=documents,
        dropped=sum(reasons.values()),
        dropped_by=reasons,
        bad=bad,
        bad_records=listed,
        cut=cut,
        truncated=truncated,
        eos_labels=eos_labels,
        **writer.tally.fields(),
        entropy_histogram=entropies,
        sums=writer.tally.sums.fields() if sums is None else sums,
        compute=compute if ours else {"unknown": "its writer stopped before the commit"},
    )
    commit.require_readable()
    if commit.write(storage):
        return True
    existing = Commit.read(storage, writer.shard, manifest.sha256)
    if storage.remote and existing == commit:  # the answer to the first put was lost; its data has a name of its own
        return True
    if existing is not None and not any(x["name"].startswith(writer.data.name) for x in existing.objects):
        storage.delete(writer.data.name)
    return False


def sweep(storage: Storage, manifest: Manifest) -> None:
    """Delete what writers that died have left in a cache.

    Cost: two listings, one more where there are heartbeats; in an object store the commit of each shard whose data is
    there twice.
    """
    _sweep_heartbeats(storage, manifest)
    doubtful: list[int] = []
    if storage.remote:  # in a folder a name is taken at once
        found: dict[int, set[str]] = {}  # names of data by shard
        for name in storage.names(SHARDS):
            data = name.split("/")[1]
            number = data.partition("-")[0]
            if number.isdecimal():
                found.setdefault(int(number), set()).add(data)
        doubtful = [shard for shard, names in found.items() if len(names) > 1 and shard < manifest.shards]
    commits = read_commits(storage, manifest, doubtful).values()
    storage.sweep({shard_stem(c.shard): {x["name"] for x in c.objects} for c in commits})


def _sweep_heartbeats(storage: Storage, manifest: Manifest) -> None:
    """Delete the heartbeats of shards that are committed: their writers died just before they would have done it."""
    left = recorded_shards(storage.names(HEARTBEATS), HEARTBEATS, manifest.shards)
    for shard in set(left).intersection(committed(storage, manifest) if left else ()):
        with contextlib.suppress(CacheError):  # they harm nobody
            storage.delete_object(heartbeat_name(shard))


def finish(storage: Storage, shards: Iterable[int] | None = None) -> dict[str, Any]:
    """Sweep a cache, seal it and list its bad records if it is complete, and count what it holds.

    Args:
        storage: where the cache is.
        shards: those to count while the cache is not complete, so that not every worker reads every commit; None for
            all.

    Returns:
        Counts, entropy quantiles, and bytes of the manifest, commits and shards; the tokenizer and what says again what
        the commits say are not counted.
    """
    manifest = Manifest.read(storage)
    sweep(storage, manifest)
    if seal_cache(storage):
        commits = open_commits(storage, manifest)
        done = len(commits)
        _list_bad_records(storage, commits)
    else:
        there = committed(storage, manifest)
        done, wanted = len(there), set(there if shards is None else shards)
        commits = read_commits(storage, manifest, [shard for shard in there if shard in wanted])
    total = {name: commits.total(name) for name in ("rows", "labels", "positions", "entries")}
    sizes = storage.sizes(FOLDER)
    size = (storage.size(NAME) or 0) + sum(sizes.get(commit_name(shard), 0) for shard in commits) + commits.bytes
    histogram = commits.histogram()
    return {
        "cache": str(storage),
        "complete": done == manifest.shards,
        "shards": {"planned": manifest.shards, "committed": done},
        **total,
        **commits.of_documents(),
        "bytes": size,
        "bytes_per_position": size / max(1, total["positions"]),
        "entropy_quantiles": None if histogram is None else quantiles(histogram),
    }


def _list_bad_records(storage: Storage, commits: Commits) -> None:
    """Write the list of the bad records of a complete cache, if it has any and nobody has yet."""
    if commits.total("bad") and storage.size(LISTING) is None:
        storage.create(LISTING, listing(commits.bad_records()))
