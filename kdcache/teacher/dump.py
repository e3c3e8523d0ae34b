"""The dump of one process: its share of the shards, one after the other.

A run that stops leaves whole shards; the next run makes those that are not committed.
Cost above the teacher's forward pass: the selection, and one copy of the entries off the device; `waited_seconds` says
for how long the teacher had to wait for encoding and writing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.cache_writer import NewShard
from kdcache.store.commits import read_commits
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.engines.base import ranks_of
from kdcache.teacher.shard_maker import ShardMaker
from kdcache.worker import Worker, find_worker

Progress = Callable[[int, int, int], None]
"""Called with documents done, documents to do, and labelled positions done so far."""


def dump(config: DumpConfig, on_progress: Progress | None = None, create_only: bool = False) -> dict[str, Any]:
    """Run the teacher over this worker's share of the shards that are not committed yet.

    Args:
        config: of the dump.
        on_progress: called after each batch.
        create_only: create the cache if there is none, and take no share.

    Returns:
        The summary that `kdcache dump-teacher --json` prints; nothing in a process that holds a part of a teacher whose
        targets another one writes.

    Raises:
        KdcacheError: see the exception tree; nothing already written is harmed.
    """
    started = time.perf_counter()
    worker = find_worker(config.worker, os.environ, ranks_of(config.teacher_spec))
    with ShardMaker(config) as maker:
        plan = maker.inputs.plan
        share = [s for s in range(len(plan)) if worker.owns(s) and not create_only]
        if maker.done:  # refuses a damaged commit
            read_commits(maker.storage, maker.writer.manifest, [s for s in share if s in maker.done])
        mine = [s for s in share if s not in maker.done]
        tally = _Tally(on_progress if maker.group.leads else None, sum(plan.documents_of(s) for s in mine))
        maker.create()
        for shard in mine:
            tally.finish(maker.make(shard, tally.show), plan.documents_of(shard))
    return _summary(maker, worker, share, tally, time.perf_counter() - started) if maker.group.leads else {}


@dataclass
class _Tally:
    """What this worker has done so far."""

    on_progress: Progress | None
    documents: int
    documents_done: int = 0
    shards: int = 0
    positions: int = 0

    def show(self, documents: float, positions: int) -> None:
        """Report progress inside a shard."""
        if self.on_progress:
            self.on_progress(self.documents_done + int(documents), self.documents, self.positions + positions)

    def finish(self, shard: NewShard | None, documents: int) -> None:
        """Count a shard; one that another worker has committed does not count as ours."""
        self.documents_done += documents
        if shard is not None and shard.committed:
            self.shards += 1
            self.positions += shard.labels
        self.show(0, 0)


def _summary(maker: ShardMaker, worker: Worker, share: Sequence[int], tally: _Tally, seconds: float) -> dict[str, Any]:
    summary = maker.writer.finish(share)
    summary["shards"]["by_this_worker"] = tally.shards
    return {
        **summary,
        "extras": maker.writer.manifest.extras,
        "worker": str(worker),
        "seconds": seconds,
        "waited_seconds": maker.stalled_seconds,
        "reused": maker.reused,
        "positions_per_second": tally.positions / seconds,
    }
