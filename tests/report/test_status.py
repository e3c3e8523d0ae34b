"""Status: what it says of a cache that is made before its eyes, whatever the clocks show."""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from kdcache_cli.main import app
from kdcache_cli.status_table import duration
from typer.testing import CliRunner

from kdcache.errors import CacheError, ConfigError
from kdcache.report.status import StatusReader, watch
from kdcache.store.heartbeat import Heartbeat, heartbeat_name
from kdcache.store.local import LocalStorage
from kdcache.store.publish import publish_manifest
from kdcache.store.seal import seal_cache
from kdcache.testing.example_rows import example_manifest, example_plan, example_rows, of_shards, write_shard

ONE = Heartbeat(
    shard=0, manifest_sha256="", failure="", host="node-1", pid=11, worker="0/2", job="", every=5.0, seconds=30.0,
    rows=5, planned_rows=10, labels=100, made=0, made_labels=0, busy_seconds=30.0,
)  # fmt: skip


class Dump:
    """A dump of ten shards of 100 characters, the first two of them committed, in a folder."""

    def __init__(self, folder: Path, planned: bool = True) -> None:
        self.folder, self.storage = folder, LocalStorage(folder)
        manifest = of_shards(example_manifest("arrow"), 10)
        plan = example_plan(manifest) if planned else None
        self.manifest = publish_manifest(self.storage, manifest, {"tokenizer.json": b"{}"}, plan)
        for shard in (0, 1):
            self.commit(shard)

    def commit(self, shard: int) -> None:
        assert write_shard(self.storage, self.manifest, example_rows(self.manifest, 2), shard)

    def runs(self, shard: int, age: float = 0.0, **changes: Any) -> None:
        """Somebody makes a shard, who gave a sign so many seconds ago."""
        beat = dataclasses.replace(ONE, shard=shard, manifest_sha256=self.manifest.sha256, **changes)
        beat.write(self.storage)
        at = time.time() - age
        os.utime(self.folder / heartbeat_name(shard), (at, at))

    def look(self) -> dict[str, Any]:
        found = StatusReader(str(self.folder)).look()
        json.dumps(found, allow_nan=False)
        return found


@pytest.fixture
def dump(tmp_path: Path) -> Dump:
    return Dump(tmp_path / "c")


def test_who_runs_who_is_silent_and_what_failed(dump: Dump) -> None:
    dump.runs(2)
    dump.runs(3, age=10, pid=12, worker="1/2", job="slurm 4711_1", seconds=20.0)
    dump.runs(4, age=100, pid=13)
    dump.runs(5, age=1000, failure="k is 3, above 2", pid=14)
    dump.runs(1, age=3)  # is committed by now
    found = dump.look()
    assert found["shards"] == {
        "planned": 10, "committed": 2, "running": 2, "silent": 1, "failed": 1, "waiting": 4
    }  # fmt: skip
    first, second = found["running"]
    assert (first["shard"], first["pid"], first["host"], first["worker"], first["job"]) == (2, 11, "node-1", "0/2", "")
    assert first["share"] == 0.5 and first["seconds"] == pytest.approx(30, abs=2)
    assert (second["shard"], second["pid"], second["job"]) == (3, 12, "slurm 4711_1")
    assert second["seconds"] == pytest.approx(30, abs=2) and second["last_sign_seconds"] == pytest.approx(10, abs=2)
    assert [(one["shard"], one["pid"]) for one in found["silent"]] == [(4, 13)]
    assert found["silent"][0]["last_sign_seconds"] == pytest.approx(100, abs=2)
    assert [(one["shard"], one["pid"], one["reason"]) for one in found["failed"]] == [(5, 14, "k is 3, above 2")]
    assert not found["complete"] and found["unreadable"] == []
    shown = " ".join(CliRunner().invoke(app, ["status", str(dump.folder)]).stdout.split())
    for text in ("2 of 10 shards", "node-1:11", "slurm 4711_1", "4: no sign of worker 0/2, process node-1:13 for 1"):
        assert text in shown
    assert "shard 5 failed at 20" in shown and "k is 3, above 2" in shown


def test_rate_and_time_left(dump: Dump) -> None:
    """Each has made 3 shards and a half in 35 s: 10 characters a second; 700 of the last 800 are to do."""
    for shard in (2, 3):
        dump.runs(shard, seconds=5.0, made=3, made_labels=250, busy_seconds=35.0)
    found = dump.look()
    assert found["rate"]["characters_per_second"] == pytest.approx(20)
    assert found["rate"]["shards_per_hour"] == pytest.approx(720)
    assert found["rate"]["positions_per_second"] == pytest.approx(20)
    assert found["share"] == pytest.approx(0.3) and found["seconds_left"] == pytest.approx(35)
    dump.runs(4, rows=0, planned_rows=None, seconds=0.1, busy_seconds=0.1)  # has just begun: as fast as the others
    assert dump.look()["rate"]["characters_per_second"] == pytest.approx(30)
    for shard in (2, 3, 4):
        dump.runs(shard, age=1000)
    found = dump.look()
    assert found["seconds_left"] is None and set(found["rate"].values()) == {None}
    assert found["shards"]["silent"] == 3


def test_one_that_is_slow_is_what_everybody_waits_for(dump: Dump) -> None:
    for shard in range(2, 9):
        dump.commit(shard)
    dump.runs(9, rows=1, seconds=90.0, busy_seconds=120.0, made=3)  # 310 characters in 120 s; 90 to do
    assert dump.look()["seconds_left"] == pytest.approx(90 / 310 * 120)
    assert dump.look()["stragglers"] == [9]  # others took 10 s each
    dump.runs(9, rows=1, seconds=30.0, busy_seconds=60.0, made=3)
    assert dump.look()["stragglers"] == []


def test_a_straggler_among_first_shards(dump: Dump) -> None:
    for shard in (2, 3, 4):
        dump.runs(shard, seconds=10.0, busy_seconds=10.0)  # 20 s a shard
    dump.runs(5, rows=1, seconds=66.0, busy_seconds=66.0)
    assert dump.look()["stragglers"] == [5]
    dump.runs(5, rows=1, seconds=60.0, busy_seconds=60.0)
    assert dump.look()["stragglers"] == []


def test_without_a_plan_shards_are_counted(tmp_path: Path) -> None:
    dump = Dump(tmp_path / "c", planned=False)
    dump.runs(2, made=3, busy_seconds=35.0)
    found = dump.look()
    assert found["rate"]["characters_per_second"] is None and found["rate"]["shards_per_hour"] == pytest.approx(360)
    assert found["share"] == pytest.approx(0.25) and found["seconds_left"] == pytest.approx(75)


def test_the_clock_of_this_machine_does_not_matter(dump: Dump, monkeypatch: pytest.MonkeyPatch) -> None:
    dump.runs(2, age=4)
    dump.runs(3, age=40)
    true = time.time
    for wrong in (-7200.0, 7200.0):
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda wrong=wrong: true() + wrong)
            found = dump.look()
        assert [one["shard"] for one in found["running"]] == [2] and [one["shard"] for one in found["silent"]] == [3]
        assert found["running"][0]["last_sign_seconds"] == pytest.approx(4, abs=2)
        assert found["last_commit_seconds"] < 60
    assert not list(dump.folder.glob(".*"))


def test_lies_are_named_and_the_rest_is_shown(dump: Dump) -> None:
    dump.runs(2)
    dump.runs(3, host="\x1b[2J")
    (dump.folder / "running/00004.json").symlink_to("/dev/zero")
    (dump.folder / "running/junk").write_text("x")
    (dump.folder / "running/00011.json").write_text("a shard that is not planned")
    dump.runs(5, labels=(1 << 63) - 1, made=(1 << 63) - 1, seconds=0.0, busy_seconds=5e-324)
    dump.runs(6, labels=(1 << 63) - 1, made=(1 << 63) - 1, seconds=0.0, busy_seconds=1e9)
    found = dump.look()
    assert [one["shard"] for one in found["running"]] == [2, 5, 6]
    assert [one["object"] for one in found["unreadable"]] == ["running/00003.json", "running/00004.json"]
    shown = CliRunner().invoke(app, ["status", str(dump.folder)])
    assert shown.exit_code == 0 and "\x1b" not in shown.stdout and "it is not a plain file" in shown.stdout


def test_watching_ends_when_the_cache_is_complete(dump: Dump, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = []

    def work(seconds: float) -> None:
        pauses.append(seconds)
        for shard in range(2 * len(pauses), 2 * len(pauses) + 2):
            dump.commit(shard)

    monkeypatch.setattr("kdcache.report.status.time.sleep", work)
    assert [found["shards"]["committed"] for found in watch(str(dump.folder), 3)] == [2, 4, 6, 8, 10]
    assert len(pauses) == 4 and min(pauses) >= 3
    done = CliRunner().invoke(app, ["status", str(dump.folder), "--watch", "--json"])
    found = json.loads(done.stdout)
    assert done.exit_code == 0 and found["complete"] and (found["share"], found["seconds_left"]) == (1, 0)
    assert "complete, 10 shards" in CliRunner().invoke(app, ["status", str(dump.folder), "--watch"]).stdout


def test_a_sealed_cache_is_not_listed(dump: Dump, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(2, 10):
        dump.commit(shard)
    assert seal_cache(dump.storage)
    monkeypatch.setattr(LocalStorage, "modified", lambda *_: 1 / 0)
    found = dump.look()
    assert found["complete"] and found["shards"]["committed"] == found["shards"]["planned"] == 10


@pytest.mark.parametrize("every", [0.0, -1.0, float("nan"), float("inf")])
def test_what_cannot_be_watched(tmp_path: Path, every: float) -> None:
    with pytest.raises(ConfigError, match="every is"):
        next(watch(str(tmp_path), every))
    with pytest.raises(CacheError, match="holds no cache"):
        next(watch(str(tmp_path), 1.0))


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0 s"), (119.0, "119 s"), (121.0, "2 min"), (7300.0, "2.0 h"), (1e6, "12 days"), (1e30, " days")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert duration(seconds).endswith(shown)
