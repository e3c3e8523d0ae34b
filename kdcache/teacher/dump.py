"""The dump: shard by shard, from documents to a commit.

Order of a run: check everything that can be wrong (folders, corpus, options, a cache of another configuration), open
and probe the teacher, and only then write. Each shard is a function of its documents only. A run that stops leaves
whole shards; the next run makes those that are not committed. Shards are written through `kdcache.CacheWriter`.
Encoding and writing run in a thread of their own, during the forward pass; `waited_seconds` says for how long the
teacher had to wait for them.
Cost above the teacher's forward pass: the selection, and one copy of the entries off the device.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import kdcache
from kdcache.cache_writer import CacheWriter, NewShard, tokenizer_files
from kdcache.corpus.shards import ShardRows
from kdcache.errors import CacheMismatchError
from kdcache.rows import PackedRow
from kdcache.store.commits import committed, read_commits
from kdcache.store.open_storage import open_storage
from kdcache.store.plan import require_no_other_plan
from kdcache.store.publish import require_free_or_same
from kdcache.teacher.background_writer import BackgroundWriter
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.engines.base import TargetRequest, find_engine, require_answerable
from kdcache.teacher.inputs import Inputs, open_inputs
from kdcache.teacher.open_teacher import open_teacher
from kdcache.teacher.opened_teacher import BatchTargets, OpenedTeacher
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
    inputs = open_inputs(config, storage)
    planned = inputs.manifest
    request = TargetRequest.of(planned)
    require_answerable(find_engine(config.engine), request, planned.position_filter)
    existing = require_free_or_same(storage, planned, but_for=("known",))  # an open engine may know less than its class
    require_no_other_plan(storage, inputs.plan)
    done = set(committed(storage, existing)) if existing else set()
    if existing:
        read_commits(storage, existing, [s for s in done if worker.owns(s)])  # refuses a damaged one
    mine = [s for s in range(planned.shards) if worker.owns(s) and s not in done]
    tally = _Tally(on_progress, sum(inputs.plan.documents_of(s) for s in mine))
    writer = CacheWriter(storage, existing or planned)
    if mine or not existing:
        with open_teacher(config.teacher_spec, planned.row_spec, request, planned.position_filter) as teacher:
            inputs = inputs.with_known(teacher.engine.knows.known(planned.rule, planned.temperatures))
            if existing and existing.known != inputs.manifest.known:
                raise CacheMismatchError(f"{storage} knows other things of its teacher than this engine does")
            wanted = existing or run_pilot(teacher, inputs)
            writer = CacheWriter.create(storage, wanted, tokenizer_files(inputs.tokenizer), inputs.plan)
            for shard in mine:
                _make_shard(writer, shard, inputs, teacher, tally)
    return _summary(writer, worker, tally, time.perf_counter() - started)


@dataclass
class _Tally:
    """What this worker has done so far."""

    on_progress: Progress | None
    documents: int
    documents_done: int = 0
    shards: int = 0
    positions: int = 0
    stalled_seconds: float = 0.0

    def show(self, documents: float, positions: int) -> None:
        """Report progress inside a shard."""
        if self.on_progress:
            self.on_progress(self.documents_done + int(documents), self.documents, self.positions + positions)

    def skip(self, documents: int) -> None:
        """Count a shard of another worker."""
        self.documents_done += documents
        self.show(0, 0)

    def finish(self, shard: NewShard, documents: int) -> None:
        """Count a shard; one that another worker committed meanwhile does not count as ours."""
        self.documents_done += documents
        if shard.committed:
            self.shards += 1
            self.positions += shard.labels
        self.show(0, 0)


def _make_shard(writer: CacheWriter, number: int, inputs: Inputs, teacher: OpenedTeacher, tally: _Tally) -> None:
    """Make and commit one shard, unless another worker has by now."""
    if writer.is_committed(number):
        tally.skip(inputs.plan.documents_of(number))
        return
    made, request, positions, rows = inputs.shard_rows(number), TargetRequest.of(writer.manifest), 0, 0
    eos_id: int | None = inputs.tokenizer.eos_token_id
    with writer.shard(number) as shard:
        describe(shard, made, teacher, eos_id)

        def count(batch_rows: int, batch_positions: int) -> None:
            nonlocal rows, positions
            rows, positions = rows + batch_rows, positions + batch_positions
            tally.show(made.documents * rows / len(made.rows), positions)

        tally.stalled_seconds += write_batches(
            shard, made.rows.batches(teacher.batch_rows), teacher, request, eos_id, count
        )
    tally.finish(shard, made.documents)


def write_batches(
    shard: NewShard,
    batches: Sequence[Sequence[PackedRow]],
    teacher: OpenedTeacher,
    request: TargetRequest,
    eos_id: int | None,
    on_batch: Callable[[int, int], None],
) -> float:
    """Write the targets of batch after batch into a shard, while the teacher works on the next.

    Args:
        shard: where to; see `describe`.
        batches: its rows, in order.
        teacher: whose targets.
        request: what is asked of it.
        eos_id: of the end of sequence, None where there is none.
        on_batch: called with the rows and the labelled slots of a batch when the teacher is done with it.

    Returns:
        For how many seconds the teacher waited for encoding and writing.
    """
    with BackgroundWriter() as background:
        for batch, found in zip(batches, teacher.targets_of(batches, request, shard=shard.number), strict=True):
            background.submit(functools.partial(_write, shard, batch, found, eos_id))
            on_batch(len(batch), sum(found.counts))
        background.finish()
        return background.stalled_seconds


def describe(shard: NewShard, made: ShardRows, teacher: OpenedTeacher, eos_id: int | None) -> None:
    """What is known of a shard before its rows are written."""
    shard.documents, shard.dropped_by = made.documents, made.dropped
    shard.bad_records = [{"document": int(bad.document), "reason": bad.reason} for bad in made.bad_records]
    shard.cut, shard.truncated = made.cut, made.truncated
    shard.eos_labels = None if eos_id is None else 0
    shard.compute = {**teacher.compute, **_versions()}


@functools.cache
def _versions() -> dict[str, str | None]:
    """Versions of what turns a document into tokens: another one might turn it into others."""
    found: dict[str, str | None] = {"kdcache": kdcache.__version__, "python": platform.python_version()}
    for name in ("transformers", "tokenizers", "jinja2"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a teacher without a chat template needs no Jinja
            found[name] = None
    return found


def _write(shard: NewShard, batch: Sequence[PackedRow], found: BatchTargets, eos_id: int | None) -> None:
    start = 0
    for row, targets in zip(batch, found.targets.split(found.counts), strict=True):
        if shard.eos_labels is not None:
            shard.eos_labels += int((row.labels(len(row.tokens)) == eos_id).sum())
        stop = start + len(row.tokens)
        shard.write_row(row, targets, {name: values[start:stop] for name, values in found.extras.items()})
        start = stop


def _summary(writer: CacheWriter, worker: Worker, tally: _Tally, seconds: float) -> dict[str, Any]:
    summary = writer.finish(range(worker.index, writer.manifest.shards, worker.count))
    summary["shards"]["by_this_worker"] = tally.shards
    return {
        **summary,
        "extras": writer.manifest.extras,
        "worker": f"{worker.index}/{worker.count}",
        "seconds": seconds,
        "waited_seconds": tally.stalled_seconds,
        "positions_per_second": tally.positions / seconds,
    }
