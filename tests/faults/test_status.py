"""What `kdcache status` says, against real workers: some run, one is killed, one fails, one has a wrong clock."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kdcache import verify_cache
from kdcache.store.open_storage import open_storage
from tests.objects import Bucket
from tests.processes import PATIENCE, ReadyMade, kdcache, python

pytestmark = pytest.mark.slow

WORKER = """
import sys, time
import kdcache.store.pulse as pulse
from kdcache.cache_writer import NewShard
pulse._EVERY = pulse._EVERY_REMOTE = 0.5
hours, fails = float(sys.argv.pop(1)), int(sys.argv.pop(1))
clock, write_row = time.time, NewShard.write_row
time.time = lambda: clock() + 3600 * hours
def slowly(self, *args, **named):
    if self.rows:
        time.sleep(900)
    if self.number == fails:
        raise OSError("the disk\\nis \\x1b[31m on fire")
    write_row(self, *args, **named)
NewShard.write_row = slowly
from kdcache_cli.main import run
run()
"""
"""A worker whose clock is wrong by so many hours, that fails in one shard, and takes long for the second row of any."""


def worker(*arguments: str, hours: float = 0.0, fails: int = -1) -> ReadyMade:
    return ReadyMade("-c", WORKER, str(hours), str(fails), *arguments)


@pytest.fixture(params=["folder", "bucket"])
def out(request: pytest.FixtureRequest, tmp_path: Path, bucket: Bucket) -> str:
    return str(tmp_path / "c") if request.param == "folder" else f"{bucket.url}/c"


def dumping(teacher: Path, corpus: Path, out: str, *more: str) -> list[str]:
    return [
        "dump-teacher", "--teacher", str(teacher), "--corpus", str(corpus), "--out", out, "--seq-len", "64", "--k", "8",
        "--docs-per-shard", "12", "--batch-rows", "1", "--device", "cpu", "--json", *more,
    ]  # fmt: skip


def look(out: str, hours: float = 0.0) -> dict[str, Any]:
    """The status as a machine sees it whose clock is wrong by so many hours."""
    done = python("-c", WORKER, str(hours), "-1", "status", out, "--json")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def wait_for(out: str, true: Callable[[dict[str, Any]], bool], hours: float = 0.0) -> dict[str, Any]:
    deadline = time.monotonic() + PATIENCE
    while not true(found := look(out, hours)):
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
    return found


def test_it_says_what_the_processes_do(teacher: Path, corpus: Path, out: str) -> None:
    arguments = dumping(teacher, corpus, out)
    kdcache(*arguments, "--worker", "8/9")  # the cache exists, with one of its nine shards
    workers = [
        worker(*arguments, "--worker", "0/4"),
        worker(*arguments, "--worker", "1/4", hours=-5.0),
        worker(*arguments, "--worker", "2/4", hours=5.0, fails=2),
    ]
    pids = [process.pid for process in workers]

    found = wait_for(out, lambda f: f["shards"]["running"] == 2 and f["shards"]["failed"] == 1)
    assert [(one["pid"], one["worker"]) for one in found["running"]] == [(pids[0], "0/4"), (pids[1], "1/4")]
    assert found["shards"]["silent"] == 0 and found["shards"]["planned"] == 9
    (failed,) = found["failed"]
    assert (failed["pid"], failed["shard"], failed["reason"]) == (pids[2], 2, "OSError: the disk")
    assert workers[2].wait() == 1 and workers[0].poll() is None and workers[1].poll() is None
    found = wait_for(out, lambda f: all(one["share"] for one in f["running"]) and f["shards"]["running"] == 2)
    assert found["seconds_left"] > 0 and found["rate"]["positions_per_second"] > 0

    workers[0].kill()
    assert workers[0].wait() == -signal.SIGKILL
    for hours in (0.0, -4.0, 4.0):
        found = wait_for(out, lambda f: f["shards"]["silent"] == 1, hours)
        assert [one["pid"] for one in found["silent"]] == [pids[0]]
        assert 3 < found["silent"][0]["last_sign_seconds"] < PATIENCE
        assert [one["pid"] for one in found["running"]] == [pids[1]]
    workers[1].kill()
    assert workers[1].wait() == -signal.SIGKILL
    found = wait_for(out, lambda f: f["shards"]["silent"] == 2)
    assert found["shards"]["running"] == 0 and found["shards"]["failed"] == 1 and found["seconds_left"] is None

    watching = ReadyMade("-m", "kdcache_cli", "status", out, "--watch", "--every", "0.2")
    done = kdcache(*arguments)
    assert done.returncode == 0, done.stderr
    told, err = watching.communicate()
    assert (watching.returncode, err) == (0, "")
    assert told.splitlines()[-1] == f"{out}: complete, 9 shards" and "2 silent, 1 failed" in told.splitlines()[0]
    assert look(out)["complete"] and open_storage(out).names("running") == []
    assert verify_cache(out).ok


def test_ctrl_c_ends_the_watching(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "c")
    kdcache(*dumping(teacher, corpus, out, "--worker", "0/9"))
    watching = ReadyMade("-m", "kdcache_cli", "status", out, "--watch", "--every", "60")
    time.sleep(2)
    os.kill(watching.pid, signal.SIGINT)
    told, err = watching.communicate()
    assert watching.returncode == 130 and err == "stopped; what is finished is kept\n"
    assert told == f"{out}: 1 of 9 shards committed (10.3% of the work), 8 waiting\n"
