"""Convert: a cache into another store, another place, another precision or fewer entries, without its teacher.

Between stores the streams of every row are carried over as they are, so the content is the same bit for bit and so
is its hash. Fewer entries are made by the kind of selection (`kdcache.selection.narrow`): the largest are kept and
the rest moves into every tail, or sampled weights are drawn again without bias. Shard by shard, create-only, any number
of workers: a run that stops is resumed where it was.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from kdcache import stopping
from kdcache.cache import MOST_TOKENIZER_BYTES, Cache, open_cache
from kdcache.codec.id_ranks import FrequencyOrder
from kdcache.errors import CorruptCacheError
from kdcache.rows import IGNORE, PackedRow
from kdcache.selection import Selection, narrow, require_narrower
from kdcache.store.commits import committed, read_commits
from kdcache.store.manifest import Manifest
from kdcache.store.open_storage import open_storage
from kdcache.store.plan import read_plan
from kdcache.store.publish import (
    TOKENIZER,
    finish,
    new_shard,
    publish_manifest,
    publish_shard,
    require_free_or_same,
    sweep,
)
from kdcache.store.pulse import Pulse
from kdcache.store.registry import find_store
from kdcache.store.row_format import Record
from kdcache.store.shards import ShardWriter
from kdcache.targets import SparseTargets
from kdcache.worker import find_worker


def convert(
    cache: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    store: str | None = None,
    k: int | None = None,
    precision: str | None = None,
    worker: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Convert this worker's share of the shards that are not there yet.

    Args:
        cache: folder or URL of the cache.
        out: folder or URL of the new cache; created, or resumed if it is the same conversion.
        store: `arrow`, `zarr` or a registered one; None leaves it as it is.
        k: entries a position, or draws; None leaves them as they are.
        precision: of the values; None leaves the stored streams unchanged, unless k changes them.
        worker: `I/N`; None takes it from SLURM or torchrun.
        on_progress: called with (shards done, shards to do).

    Returns:
        What `kdcache convert --json` prints.

    Raises:
        ConfigError: more entries than there are, an unknown store or precision.
        KdcacheError: see the exception tree; nothing already written is harmed.
    """
    started = time.perf_counter()
    me = find_worker(worker, os.environ)
    source, storage = open_cache(cache), open_storage(out)
    wanted = _plan(source, store, k, precision)
    existing = require_free_or_same(storage, wanted)
    if existing is None:
        wanted = dataclasses.replace(wanted, id_order=id_order_of(source, wanted))
    manifest = publish_manifest(
        storage, existing or wanted, _tokenizer_files(source), read_plan(source.storage, source.manifest)
    )
    sweep(storage, manifest)
    done = set(committed(storage, manifest))
    read_commits(storage, manifest, [shard for shard in done if me.owns(shard)])  # refuses one that is damaged
    mine = [shard for shard in range(manifest.shards) if me.owns(shard) and shard not in done]
    pulse = Pulse(storage, manifest, me.among_others)
    same_targets = manifest.selection == source.manifest.selection
    for number, shard in enumerate(mine):
        if on_progress:
            on_progress(number, len(mine))
        commit = source.commits[shard]
        with (
            stopping.deferred(),
            new_shard(storage, manifest, shard) as writer,
            pulse.of(shard, functools.partial(_counts, writer, commit.rows)),
        ):
            made = functools.partial(_row, source, manifest, shard)
            for packed, targets, record in source.storage.map(made, range(commit.rows)):
                writer.write(packed, targets, record)
                stopping.check(stopping.GRACE)
            publish_shard(
                storage, manifest, writer, documents=commit.documents, entropies=commit.entropy_histogram,
                compute=commit.compute, dropped_by=commit.dropped_by, bad=commit.bad, bad_records=commit.bad_records,
                cut=commit.cut, truncated=commit.truncated, eos_labels=commit.eos_labels,
                sums=commit.sums if same_targets else None,
            )  # fmt: skip
    if on_progress:
        on_progress(len(mine), len(mine))
    summary = finish(storage, range(me.index, manifest.shards, me.count))
    summary["shards"]["by_this_worker"] = len(mine)
    return {**summary, "seconds": time.perf_counter() - started}


def _counts(writer: ShardWriter, rows: int) -> tuple[int, int, int]:
    """How far a shard is."""
    return writer.tally.rows, rows, writer.tally.labels


def _plan(source: Cache, store: str | None, k: int | None, precision: str | None) -> Manifest:
    """The manifest of the new cache, but for its order of ids."""
    if store is not None:
        find_store(store)
    old = source.manifest
    new = narrowed_manifest(old, old.rule if k is None else old.rule.fewer(k), precision)
    return dataclasses.replace(new, store=store or old.store, origin={**old.origin, "converted_from": old.sha256})


def narrowed_manifest(old: Manifest, rule: Selection, precision: str | None = None) -> Manifest:
    """The manifest of a cache whose entries are made of another one's, but for an order of ids that it may lack.

    Raises:
        ConfigError: the rule asks for entries that are not there, or an unknown precision.
    """
    require_narrower(rule, old.rule, old.width)
    new = dataclasses.replace(
        old,
        selection=old.selection if rule == old.rule else rule.to_fields(),
        precision=precision or old.precision,
        id_order=old.id_order if precision in (None, old.precision) else (),
    )
    return dataclasses.replace(new, error_bound=new.codec.error_bound)


def id_order_of(source: Cache, manifest: Manifest) -> tuple[int, ...]:
    """The order of the manifest, or one from the first rows of the cache where a compact codec has none yet."""
    if manifest.id_order or not manifest.codec.orders_ids:
        return manifest.id_order
    order = FrequencyOrder(manifest.vocab_size)
    for _, targets in source.read_rows(range(len(source))):
        if not order.add(targets):
            break
    return order.ids()


def _row(source: Cache, manifest: Manifest, shard: int, row: int) -> tuple[PackedRow, SparseTargets, Record]:
    """Row, targets and streams; the streams of what does not change, extras among it, are taken over as they are."""
    packed, targets, record = source.shard(shard).read_with_record(row)
    old = source.manifest
    if (manifest.selection, manifest.precision) == (old.selection, old.precision):
        return packed, targets, record
    if manifest.selection != old.selection:
        targets = narrowed_row(packed, targets, old, manifest, shard, row)
    return packed, targets, manifest.row_format.repack(record, packed, targets)


def narrowed_row(
    packed: PackedRow, targets: SparseTargets, old: Manifest, new: Manifest, shard: int, row: int
) -> SparseTargets:
    """The targets `[N]` of the labelled slots of a row with fewer entries, as a conversion makes them.

    Args:
        packed, targets: the row.
        old, new: manifests of its cache, and of the one with fewer entries.
        shard, row: where it is.
    """
    carries = (targets.count > 0).nonzero()[:, 0]  # of the labelled slots
    slots = np.flatnonzero(packed.labels(new.seq_len) != IGNORE)[carries.numpy()]
    keys = torch.tensor([[shard, row, int(slot)] for slot in slots], dtype=torch.int64).reshape(-1, 3)
    labels = torch.from_numpy(packed.labels(new.seq_len)[slots])
    fewer = narrow(targets[carries], new.rule, source=old.rule, labels=labels, seed=new.seed, keys=keys)
    return fewer.spread(carries, len(targets.count))


def _tokenizer_files(source: Cache) -> dict[str, bytes]:
    files = {}
    for name, sha256 in source.manifest.tokenizer_files.items():
        files[name] = source.storage.read(f"{TOKENIZER}/{name}", MOST_TOKENIZER_BYTES)
        if hashlib.sha256(files[name]).hexdigest() != sha256:
            raise CorruptCacheError(f"{source.storage.path_of(f'{TOKENIZER}/{name}')} is not what the manifest names")
    return files
