"""Random damage, many thousand times: a row is refused or is what was written, and nothing else ever happens.

KDCACHE_MUTATIONS sets how many (3,000 by default, 100,000 in a long run), spread over both stores, every kind of
selection and every codec. Three sorts in turn:

    damage   bytes of an object change; every seal is checked, so a row is refused or identical
    lie      the same, by somebody who seals again: all seals match whatever is read. A row is refused or well-formed
    streams  the decompressed streams of a row change, which reaches the codec. Refused or well-formed
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.cache import unpack
from kdcache.errors import CorruptCacheError, KdcacheError
from kdcache.planning.memory import peak_resident
from kdcache.store import arrow_store, zarr_store
from kdcache.store.commits import read_commits
from kdcache.store.local import LocalStorage
from kdcache.store.registry import find_store
from kdcache.store.row_format import Record, RowFormat
from kdcache.store.shards import Shard
from kdcache.store.storage import Storage
from kdcache.testing.example_rows import (
    SELECTIONS,
    Example,
    everything,
    example_manifest,
    example_rows,
    same_rows,
    write_cache,
)
from tests.attacks.mutator import Mutator
from tests.attacks.reading import MOST_SECONDS

COUNT = int(os.environ.get("KDCACHE_MUTATIONS", "3000"))
CASES: list[tuple[str, ...]] = [
    (store, kind, precision)
    for store in ("arrow", "zarr")
    for kind in SELECTIONS
    for precision in ("float32", "float16", "6", "12")
] + [(store, kind, "6", "entropy>1") for store in ("arrow", "zarr") for kind in ("topk", "ipps")]
ROWS = 5
MOST_MEMORY = 4  # times what the honest shard takes


class Held(Storage):
    """A place that holds objects in memory, to be read from."""

    url = ""

    def __init__(self, objects: dict[str, bytes]) -> None:
        self.objects = objects

    def path_of(self, name: str) -> str:
        return name

    def open(self, name: str, promised: dict[str, Any] | None = None) -> HeldObject:
        if name not in self.objects:
            raise CorruptCacheError(f"{name} is missing")
        return HeldObject(name, self.objects[name])

    def not_here(self, *_: Any) -> Any:
        raise NotImplementedError

    read = size = names = create = replace = new_data = delete = delete_object = sweep = modified = clock = not_here


class HeldObject:
    def __init__(self, name: str, data: bytes) -> None:
        self.name, self.data, self.size = name, data, len(data)

    def read(self, start: int, length: int) -> bytes:
        if not 0 <= start <= start + length <= self.size:
            raise CorruptCacheError(f"{self.name} ends before byte {start + length}")
        return self.data[start : start + length]


class Given(Shard):
    """A shard of one row whose streams are given."""

    def __init__(self, form: RowFormat, record: Record) -> None:
        self.storage, self.shard, self.form, self.rows, self.name = Held({}), 0, form, 1, "given"
        self.record = record

    def open(self, objects: list[dict[str, Any]]) -> str:
        return "given"

    def record(self, row: int) -> Record:
        return self.record


class Matches(int):
    """A checksum that is always the right one."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = int.__hash__


@contextlib.contextmanager
def sealed_again() -> Iterator[None]:
    """While it lasts, every seal matches whatever was read: as if somebody had computed it anew."""
    with pytest.MonkeyPatch.context() as patch:
        for store in (arrow_store, zarr_store):
            patch.setattr(store, "row_seal", lambda *_: Matches())
        patch.setattr(zarr_store, "_unsealed", lambda data, what: data[:-4])
        yield


class Target:
    """An honest shard and how its mutants are judged."""

    def __init__(self, folder: Path, store: str, kind: str, precision: str, positions: str = "all") -> None:
        manifest = example_manifest(
            store, selection=SELECTIONS[kind], precision=precision, positions=positions, seq_len=24
        )
        storage, rows = LocalStorage(folder), example_rows(manifest, ROWS)
        commit = read_commits(storage, write_cache(storage, manifest, rows))[1]
        self.form, self.reader = manifest.row_format, find_store(store).reader
        self.objects = {x["name"]: everything(storage)[x["name"]] for x in commit.objects}
        self.records = [self.form.pack(*row) for row in rows]
        self.honest = [self.form.unpack(record) for record in self.records]
        self.seen: Counter[str] = Counter()

    def open(self, objects: dict[str, bytes]) -> Shard:
        named = [{"name": name, "bytes": len(data)} for name, data in objects.items()]
        return self.reader(Held(objects), 1, self.form, named, ROWS)

    def judge(self, objects: dict[str, bytes], lies: bool) -> None:
        """Open and read everything; only a KdcacheError or a good row may come of it."""
        try:
            shard = self.open(objects)
        except KdcacheError as error:
            assert "shards/00001" in str(error) or "shard 1" in str(error), error
            self.seen["refused whole"] += 1
            return
        for row in range(ROWS):
            self.judge_row(shard, row, self.honest[row], lies)

    def judge_row(self, shard: Shard, row: int, honest: Example, lies: bool) -> None:
        try:
            found = shard.read(row)
        except KdcacheError as error:
            assert f"{shard.name}, row {row}: " in str(error), error
            self.seen["refused rows"] += 1
            return
        if same_rows(found, honest):
            self.seen["identical rows"] += 1
        else:
            assert lies, "a damaged row was believed"
            self.require_sound(found)
            self.seen["other, sound rows"] += 1

    def require_sound(self, found: Example) -> None:
        """What a student may rely on, whatever was dumped."""
        packed, targets = found
        row = unpack(packed, targets, self.form.seq_len)
        size = self.form.vocab_size
        assert int(row.tokens.min()) >= 0 and int(row.tokens.max()) < size
        assert int(row.labels.max()) < size and int(row.segments.max()) == len(row.documents) - 1
        assert int(row.documents.min()) >= 0 and int(row.documents.max()) < self.form.documents
        ids = targets.ids[targets.valid]
        assert not ids.numel() or (int(ids.min()) >= 0 and int(ids.max()) < size)
        assert not targets.count.numel() or int(targets.count.max()) <= targets.ids.shape[-1]

    def mutate(self, mutator: Mutator, number: int) -> None:
        """One mutation and its judgement."""
        if number % 3 == 2:
            row = mutator.below(ROWS)
            record = self.records[row]
            streams = dict(record.streams)
            name = list(streams)[mutator.below(len(streams))]
            data = mutator(streams[name].tobytes())
            whole = len(data) - len(data) % streams[name].itemsize
            streams[name] = np.frombuffer(data[:whole], streams[name].dtype)
            positions = record.positions if mutator.below(8) else mutator.below(30)
            self.judge_row(Given(self.form, Record(positions=positions, streams=streams)), 0, self.honest[row], True)
            return
        texts = mutator.below(5) == 0  # a shard has more metadata than data
        names = [n for n in self.objects if n.endswith(".json") == texts] or list(self.objects)
        name = names[mutator.below(len(names))]
        objects = {**self.objects, name: mutator(self.objects[name])}
        with sealed_again() if number % 3 else contextlib.nullcontext():
            self.judge(objects, lies=bool(number % 3))


@pytest.mark.parametrize(
    "case", [case if case[2:] == ("6",) else pytest.param(case, marks=pytest.mark.long) for case in CASES], ids="-".join
)
def test_mutations(case: tuple[str, ...], tmp_path: Path, record_property: Any) -> None:
    target, mutator = Target(tmp_path / "c", *case), Mutator(zlib.crc32("-".join(case).encode()))
    tracemalloc.start()
    target.judge(target.objects, lies=False)
    honest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert target.seen == {"identical rows": ROWS}
    slowest, before, count = 0.0, peak_resident(), COUNT // len(CASES)
    for number in range(count):
        traced = number % 25 == 0
        if traced:
            tracemalloc.start()
        began = time.process_time()
        target.mutate(mutator, number // 25 if traced else number)
        slowest = max(slowest, time.process_time() - began)
        if traced:
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert most < MOST_MEMORY * honest, (number, most, honest)
    grown = peak_resident() - before
    sys.stdout.write(f"{'-'.join(case)}: {count:,} mutations, {dict(target.seen)}, ")
    sys.stdout.write(f"slowest {slowest * 1000:.1f} ms, peak memory grew {grown / 1e6:.1f} MB\n")
    assert slowest < MOST_SECONDS
    assert grown < 32 << 20
    if count >= 50:
        assert target.seen["refused whole"] and target.seen["refused rows"] and target.seen["identical rows"]
