"""A trial: rows of a sample in a small cache of their own, to see what a cache and its making take.

The cache lies in a temporary folder and is written by what writes any cache, so its bytes are a cache's bytes. It has
three shards: one without rows (what a shard takes however few rows it has), one to warm up, and the measured one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from kdcache.cache_writer import CacheWriter
from kdcache.errors import CacheError
from kdcache.planning.sample import Sample, slots_of
from kdcache.rows import PackedRow
from kdcache.store.commit import Commit, commit_name
from kdcache.store.manifest import NAME, Manifest
from kdcache.store.open_storage import open_storage
from kdcache.targets import SparseTargets
from kdcache.teacher.engines.base import TargetRequest
from kdcache.teacher.opened_teacher import OpenedTeacher
from kdcache.teacher.shard_maker import describe, write_batches

EMPTY, WARM, MEASURED = range(3)
"""The shards of a trial."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a cache takes on disk.

    Attributes:
        once: bytes that every cache has: its manifest.
        a_shard: bytes that every shard and its commit have, however few rows there are.
        listed: bytes of a commit for the bad records of the sample.
        rows: bytes of the measured rows.
        labels, positions: of these.
    """

    once: int
    a_shard: int
    listed: int
    rows: int
    labels: int
    positions: int

    def of(self, sample: Sample, shards: int) -> int:
        """Bytes of a whole cache."""
        rows = self.rows / max(1, self.labels) * sample.labels
        return round(self.once + shards * self.a_shard + (self.listed + rows) / sample.share)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What the teacher takes, selection, and the encoding that it waits for, included.

    Attributes:
        a_slot: seconds for a slot of a batch.
        a_shard: seconds that a shard takes at its end: the last encoding, flushing, and the commit.
    """

    a_slot: float
    a_shard: float


@dataclass
class Trial:
    """A small cache.

    Attributes:
        folder: where it lies.
        writer: of its shards.
    """

    folder: Path
    manifest: Manifest
    tokenizer: dict[str, bytes] = field(default_factory=dict)
    writer: CacheWriter = field(init=False)

    def __post_init__(self) -> None:
        small = dataclasses.replace(
            self.manifest, shards=MEASURED + 1, plan={}, documents=max(self.manifest.documents, MEASURED + 1)
        )
        self.writer = CacheWriter.create(open_storage(self.folder), small, self.tokenizer)
        with self.writer.shard(EMPTY):
            pass

    def run(
        self, teacher: OpenedTeacher, sample: Sample, batches: Sequence[Sequence[PackedRow]], eos_id: int | None
    ) -> Speed:
        """Run the teacher over batches and write what it gives, as a dump does."""
        request = TargetRequest.of(self.writer.manifest)
        ends: list[float] = []

        def done(*_: int) -> None:
            ends.append(time.perf_counter())

        with self.writer.shard(WARM) as shard:
            describe(shard, dataclasses.replace(sample.described, dropped={}, bad_records=()), teacher, eos_id)
            write_batches(shard, batches[:1], teacher, request, eos_id, done)
        ends.clear()
        started = time.perf_counter()
        with self.writer.shard(MEASURED) as shard:
            describe(shard, sample.described, teacher, eos_id)
            write_batches(shard, batches, teacher, request, eos_id, done)
        slots = sum(slots_of(batch, sample.spec) for batch in batches)
        return Speed(a_slot=(ends[-1] - started) / slots, a_shard=time.perf_counter() - ends[-1])

    def write(self, number: int, rows: Sequence[PackedRow], targets: Sequence[SparseTargets], like: Commit) -> None:
        """Write rows whose targets are there already into a shard that says of its documents what another one does."""
        with self.writer.shard(number) as shard:
            shard.documents, shard.dropped_by, shard.bad_records = like.documents, like.dropped_by, like.bad_records
            shard.cut, shard.truncated, shard.eos_labels = like.cut, like.truncated, like.eos_labels
            shard.compute = like.compute
            for row, found in zip(rows, targets, strict=True):
                shard.write_row(row, found)

    def commit(self, number: int) -> Commit:
        """The commit of a shard."""
        found = Commit.read(self.writer.storage, number, self.writer.manifest.sha256)
        if found is None:
            raise CacheError(f"{self.folder} has lost shard {number}")
        return found

    def sizes(self) -> Sizes:
        """What it takes on disk, when all of its shards are written."""
        storage, commits = self.writer.storage, [self.commit(number) for number in (EMPTY, WARM, MEASURED)]
        written = [storage.size(commit_name(number)) or 0 for number in (EMPTY, WARM, MEASURED)]
        empty, _, measured = commits
        return Sizes(
            once=storage.size(NAME) or 0,
            a_shard=empty.bytes + written[WARM],
            listed=max(0, written[MEASURED] - written[WARM]),
            rows=measured.bytes - empty.bytes,
            labels=measured.labels,
            positions=measured.positions,
        )


def synchronise(device: torch.device) -> None:
    """Wait for a device, so that a clock that is read next has seen its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
