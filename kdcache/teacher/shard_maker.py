"""What makes the shards of one dump, in any order: its corpus, its teacher and its writer.

Whoever decides which shards are made when (`dump` for one process, another launcher for many) builds a `ShardMaker` and
calls `make`. It checks everything that can be wrong (folders, corpus, options, a cache of another configuration) when
it is built, opens and probes the teacher when `create` or `make` first needs it, and only then writes. Each shard is a
function of its documents only; what other caches hold of them is copied (`reuse`), which may change last bits. Shards
are written through `kdcache.CacheWriter`; encoding and writing run in a thread of their own, during the forward pass.
"""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

import kdcache
from kdcache import stopping
from kdcache.cache import open_cache
from kdcache.cache_writer import CacheWriter, NewShard, tokenizer_files
from kdcache.corpus.shards import ShardRows
from kdcache.errors import CacheMismatchError
from kdcache.rows import PackedRow
from kdcache.store.commits import committed
from kdcache.store.manifest import Manifest
from kdcache.store.open_storage import open_storage
from kdcache.store.plan import require_no_other_plan
from kdcache.store.publish import require_free_or_same
from kdcache.teacher.background_writer import BackgroundWriter
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.engines.base import TargetRequest, find_engine, ranks_of, require_answerable
from kdcache.teacher.inputs import open_inputs
from kdcache.teacher.mixed_shard import MixedShard
from kdcache.teacher.open_teacher import open_teacher
from kdcache.teacher.opened_teacher import BatchTargets, OpenedTeacher
from kdcache.teacher.pilot import run_pilot
from kdcache.teacher.reuse import Reuse
from kdcache.teacher.tensor_group import join_group
from kdcache.worker import find_worker

OnBatch = Callable[[float, int], None]
"""Called after each batch with the documents (a share of the shard's) and the labelled slots done in this shard."""


class ShardMaker:
    """Makes shards of one cache. Use it as a context manager, or call `close`, to give the teacher back.

    Attributes:
        group: the processes that hold the teacher together; usually this one.
        storage: where the cache is, or will be.
        inputs: everything that a shard is a function of.
        done: the shards that were committed when this was built.
        stalled_seconds: for how long the teacher has waited for encoding and writing.
        reused: positions and documents of the shards made here that were copied from other caches.

    Raises:
        KdcacheError: see the exception tree; nothing already written is harmed.
    """

    def __init__(self, config: DumpConfig) -> None:
        self.group = join_group(ranks_of(config.teacher_spec))
        self.storage = open_storage(config.out)
        caches = [open_cache(path, partial=True) for path in config.reuse]
        if self.group.leads:
            self.inputs = open_inputs(config, self.storage, date=caches[0].manifest.date if caches else None)
        planned = self.group.lead(lambda: self.inputs.planned)
        if not self.group.leads:
            self.inputs = open_inputs(config, self.storage, planned)
        wanted = self.inputs.manifest
        self._request = TargetRequest.of(wanted)
        require_answerable(find_engine(config.engine), self._request, wanted.position_filter)
        self._existing, self.done = self.group.lead(self._find)
        self.stalled_seconds = 0.0
        self.reused = {"positions": 0, "documents": 0}
        self._reuse = Reuse(caches, self._existing or wanted, self.storage) if caches else None
        self._ready = False
        self._config = config
        self._teacher: OpenedTeacher | None = None
        self._worker = find_worker(config.worker, os.environ, self.group.size).among_others
        self._writer = None if self._existing is None else CacheWriter(self.storage, self._existing, self._worker)

    def _find(self) -> tuple[Manifest | None, set[int]]:
        """The manifest of the cache if it exists, and the shards that are committed."""
        # an open engine may know less than its class
        existing = require_free_or_same(self.storage, self.inputs.manifest, but_for=("known",))
        require_no_other_plan(self.storage, self.inputs.plan)
        return existing, set(committed(self.storage, existing)) if existing else set()

    @property
    def writer(self) -> CacheWriter:
        """Writes the cache, which `create` has created if it did not exist."""
        assert self._writer is not None, "create() comes first"
        return self._writer

    def create(self) -> None:
        """Create the cache unless it exists. Opens the teacher for it, unless a reused cache says what targets know."""
        if self._writer is None:
            self._prepare()

    def make(self, number: int, on_batch: OnBatch) -> NewShard | None:
        """Make and commit one shard. None if somebody has committed it by now, or if the leader of the group writes it.

        Raises:
            KdcacheError: see the exception tree; a shard that fails leaves nothing that a reader sees.
            Stopped: a signal came; the shard is committed if that took no longer than the grace time.
        """
        self._prepare()
        if self.group.lead(lambda: self.writer.is_committed(number)):
            return None
        manifest, positions, rows = self.writer.manifest, 0, 0
        eos_id: int | None = self.inputs.tokenizer.eos_token_id
        if not self.group.leads:
            self._follow(number)
            return None
        with stopping.deferred(), self.writer.shard(number) as shard:
            made = self.inputs.shard_rows(number)
            found = self._reuse.find(made.rows, manifest) if self._reuse else None
            teacher = self._open() if found is None or not found.everything else None
            describe(shard, made, teacher, eos_id)

            def count(batch_rows: int, batch_positions: int) -> None:
                nonlocal rows, positions
                rows, positions = rows + batch_rows, positions + batch_positions
                on_batch(made.documents * rows / len(made.rows), positions)
                stopping.check(self._config.grace)

            if self._reuse is None or found is None or (teacher is not None and found.nothing):
                assert teacher is not None
                batches, request = made.rows.batches(teacher.batch_rows), TargetRequest.of(manifest)
                self.stalled_seconds += write_batches(shard, batches, teacher, request, eos_id, count)
                return shard
            if manifest.position_filter.above is not None:
                shard.entropies = None  # of what was left out, nobody knows them any more
            mixed = MixedShard(shard, manifest, made.rows, self._reuse, found)
            self.stalled_seconds += mixed.write(teacher, functools.partial(_count_ends, shard, eos_id), count)
            shard.compute["reused"] = self._reuse.describe(found, mixed.positions)
        if shard.committed:
            self.reused["positions"] += mixed.positions
            self.reused["documents"] += found.documents
        return shard

    def _follow(self, number: int) -> None:
        """Take part in the forward passes of a shard that the leader writes."""
        teacher, request = self._open(), TargetRequest.of(self.writer.manifest)
        batches = self.inputs.shard_rows(number).rows.batches(teacher.batch_rows)
        for _ in teacher.targets_of(batches, request, shard=number):
            pass

    def close(self) -> None:
        """Close the teacher."""
        if self._teacher is not None:
            self._teacher.close()
            self._teacher = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _prepare(self) -> None:
        """Make everything ready for shards, once: the cache exists, and the teacher is open if it may be needed."""
        if self._ready:
            return
        wanted = self._existing
        if self._reuse is None:
            teacher = self._open()
            wanted = wanted or run_pilot(teacher, self.inputs)
        else:
            if wanted is None and self._reuse.known != self.inputs.manifest.known:
                self._open()  # an open engine may know less
            wanted = wanted or self._reuse.complete(self.inputs.manifest)
            self._reuse.require_known(wanted.known)
        tokenizer = tokenizer_files(self.inputs.tokenizer)
        self._writer = self.group.lead(
            lambda: CacheWriter.create(self.storage, wanted, tokenizer, self.inputs.plan, self._worker)
        )
        self._ready = True

    def _open(self) -> OpenedTeacher:
        """The teacher, opened once."""
        if self._teacher is None:
            planned, existing = self.inputs.manifest, self._writer and self._writer.manifest
            teacher = open_teacher(
                self._config.teacher_spec, planned.teacher_row_spec, self._request, planned.position_filter
            )
            self._teacher = teacher
            self.inputs = self.inputs.with_known(teacher.engine.knows.known(planned.rule, planned.temperatures))
            if existing and existing.known != self.inputs.manifest.known:
                raise CacheMismatchError(f"{self.storage} knows other things of its teacher than this engine does")
        return self._teacher


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


def describe(shard: NewShard, made: ShardRows, teacher: OpenedTeacher | None, eos_id: int | None) -> None:
    """What is known of a shard before its rows are written."""
    shard.documents, shard.dropped_by, shard.planned_rows = made.documents, made.dropped, len(made.rows)
    shard.bad_records = [{"document": int(bad.document), "reason": bad.reason} for bad in made.bad_records]
    shard.cut, shard.truncated = made.cut, made.truncated
    shard.eos_labels = None if eos_id is None else 0
    shard.compute = {**(teacher.compute if teacher else {}), **_versions()}


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
        _count_ends(shard, eos_id, row)
        stop = start + len(row.tokens)
        shard.write_row(row, targets, {**{name: each[start:stop] for name, each in found.extras.items()}, **row.extras})
        start = stop


def _count_ends(shard: NewShard, eos_id: int | None, row: PackedRow) -> None:
    if shard.eos_labels is not None:
        shard.eos_labels += int((row.labels(len(row.tokens)) == eos_id).sum())
