"""The dump: shard by shard, from documents to a commit.

Order of a run: look at everything that can be wrong (folders, corpus, options, a cache of
another configuration), load and probe the teacher, and only then write. Each shard is a
function of its documents alone; a run that stops leaves whole shards behind and goes on with
those that are not committed.
Encoding and writing run beside the forward pass, in a thread of their own; `waited_seconds` says for how
long the teacher stood still for them.
Cost above the teacher's forward pass: the selection, and one copy of the entries off the device.
"""

from __future__ import annotations

import functools
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.rows import PackedRow
from kdcache.store.commit import add_histograms, histogram
from kdcache.store.commits import committed, read_commits
from kdcache.store.manifest import Manifest
from kdcache.store.open_storage import open_storage
from kdcache.store.publish import create_cache, new_shard, publish_shard, require_free_or_same, sweep, totals
from kdcache.store.seal import seal_cache, unseal
from kdcache.store.shards import ShardWriter
from kdcache.store.storage import Storage
from kdcache.targets import SparseTargets
from kdcache.teacher.background_writer import Beside
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.engines.transformers import Teacher
from kdcache.teacher.inputs import Inputs, open_inputs
from kdcache.teacher.pilot import run_pilot
from kdcache.worker import Worker, find_worker

Progress = Callable[[int, int, int], None]
"""Called with documents done, documents to do, and labelled positions done so far."""


def dump(config: DumpConfig, on_progress: Progress | None = None) -> dict[str, Any]:
    """Run the teacher over this worker's share of the shards that are not committed yet.

    Returns:
        The summary that `kdcache dump-teacher --json` prints.

    Raises:
        KdcacheError: see the exception tree; nothing already written is harmed.
    """
    started = time.perf_counter()
    worker = find_worker(config.worker, os.environ)
    storage = open_storage(config.out)
    inputs = open_inputs(config)
    inputs.require_positions()
    standing = require_free_or_same(storage, inputs.manifest)
    done = set(committed(storage, standing)) if standing else set()
    if standing:
        read_commits(storage, standing, [s for s in done if worker.owns(s)])  # refuses one that is damaged
    mine = [s for s in range(inputs.manifest.shards) if worker.owns(s) and s not in done]
    tally = _Tally(on_progress, sum(_range_size(inputs.manifest, s) for s in mine))
    if mine or not standing:
        teacher = Teacher(config, inputs.folder, inputs.manifest)
        wanted = standing or run_pilot(teacher, inputs)
        manifest = create_cache(storage, wanted, _tokenizer_files(inputs.tokenizer))
        sweep(storage, manifest)
        if mine:
            unseal(storage)
        for shard in mine:
            tally.finish(_make_shard(storage, shard, inputs, manifest, teacher, tally), _range_size(manifest, shard))
        sweep(storage, manifest)  # again: data without a commit is known to be nobody's once its shard has one
    seal_cache(storage)
    return _summary(storage, worker, tally, time.perf_counter() - started)


@dataclass
class _Tally:
    """What this worker has done so far."""

    on_progress: Progress | None
    documents: int
    documents_done: int = 0
    shards: int = 0
    positions: int = 0
    waited: float = 0.0

    def show(self, documents: float, positions: int) -> None:
        """Report progress inside a shard."""
        if self.on_progress:
            self.on_progress(self.documents_done + int(documents), self.documents, self.positions + positions)

    def finish(self, positions: int | None, documents: int) -> None:
        """Count a shard; `positions` is None if another worker made it meanwhile."""
        self.documents_done += documents
        self.shards += positions is not None
        self.positions += positions or 0
        self.show(0, 0)


def _make_shard(
    storage: Storage, shard: int, inputs: Inputs, manifest: Manifest, teacher: Teacher, tally: _Tally
) -> int | None:
    """Make and commit one shard. Its labelled positions, or None if another worker was first."""
    made, rule, positions = inputs.shard_rows(shard), manifest.rule, 0
    entropies: list[list[int]] = []
    with new_shard(storage, manifest, shard) as writer, Beside() as beside:
        batches = [made.rows[i : i + teacher.batch_rows] for i in range(0, len(made.rows), teacher.batch_rows)]
        rows = 0
        made_targets = teacher.run_all(batches, manifest, rule, shard=shard, seed=manifest.seed)
        for batch, found in zip(batches, made_targets, strict=True):
            beside.run(functools.partial(_write, writer, batch, found.targets, found.labels))
            entropies.append(histogram(found.entropy))
            positions, rows = positions + len(found.entropy), rows + len(batch)
            tally.show(made.documents * rows / len(made.rows), positions)
        beside.finish()
        tally.waited += beside.waited
        done = publish_shard(
            storage, manifest, writer, documents=made.documents, dropped=made.dropped,
            entropies=add_histograms(entropies), compute=teacher.compute,
        )  # fmt: skip
        return positions if done else None


def _write(writer: ShardWriter, batch: list[PackedRow], targets: SparseTargets, counts: list[int]) -> None:
    for row, part in zip(batch, targets.split(counts), strict=True):
        writer.write(row, part)


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        return {p.name: p.read_bytes() for p in sorted(Path(scratch).rglob("*")) if p.is_file()}


def _range_size(manifest: Manifest, shard: int) -> int:
    start = shard * manifest.docs_per_shard
    return min(manifest.docs_per_shard, manifest.documents - start)


def _summary(storage: Storage, worker: Worker, tally: _Tally, seconds: float) -> dict[str, Any]:
    summary = totals(storage)
    summary["shards"]["by_this_worker"] = tally.shards
    return {
        **summary,
        "worker": f"{worker.index}/{worker.count}",
        "seconds": seconds,
        "waited_seconds": tally.waited,
        "positions_per_second": tally.positions / seconds,
    }
