"""The whole story in real processes, with the cache behind a real HTTP endpoint."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from kdcache import verify_cache
from tests.objects import Bucket
from tests.processes import ReadyMade, kdcache, python

pytestmark = pytest.mark.slow


def dumping(teacher: Path, corpus: Path, *more: object) -> list[str]:
    options = [
        "dump-teacher", "--teacher", teacher, "--corpus", corpus, "--seq-len", 64, "--k", 8, "--temperatures", "1,2",
        "--docs-per-shard", 20, "--device", "cpu", "--json", *more,
    ]  # fmt: skip
    return [str(option) for option in options]


def test_a_cache_in_a_bucket_from_the_dump_to_the_student(
    teacher: Path, corpus: Path, student_config: Path, bucket: Bucket, tmp_path: Path
) -> None:
    url, folder = f"{bucket.url}/a/b/cache", tmp_path / "c"
    workers = [
        ReadyMade("-m", "kdcache_cli", *dumping(teacher, corpus, "--out", url, "--worker", f"{i}/2")) for i in range(2)
    ]
    told = [(*worker.communicate(), worker.returncode) for worker in workers]
    assert [(err, code) for _, err, code in told] == [("", 0)] * 2
    summaries = [json.loads(out) for out, _, _ in told]
    assert sum(s["shards"]["by_this_worker"] for s in summaries) == 6 and any(s["complete"] for s in summaries)

    for storage, store in ((folder, "arrow"), (f"{bucket.url}/z", "zarr")):
        dumped = kdcache(*dumping(teacher, corpus, "--out", storage, "--store", store))
        assert dumped.returncode == 0 and dumped.stderr == "", dumped.stderr
    verified = kdcache("verify", url, "--json")
    report = json.loads(verified.stdout)
    assert verified.returncode == 0 and report["ok"] and report["shards"] == 6
    assert report["content_sha256"] == verify_cache(folder).content_sha256
    assert report["content_sha256"] == verify_cache(f"{bucket.url}/z").content_sha256

    shown = kdcache("inspect-shard", url, "--shard", 3, "--json")
    assert shown.stderr == "" and json.loads(shown.stdout)["complete"]

    student, copies = tmp_path / "s", tmp_path / "copies"
    copying = ["--local-copy", copies, "--local-limit", "100kB"]
    trained = kdcache(
        "train-student", "--cache", url, "--student", student_config, "--out", student, "--steps", 4, *copying, "--json"
    )
    assert trained.returncode == 0 and trained.stderr == "", trained.stderr
    evaluated = kdcache("evaluate", "--student", student, "--cache", url, "--heldout", 0.02, *copying, "--json")
    assert evaluated.returncode == 0 and evaluated.stderr == "", evaluated.stderr
    after = json.loads(trained.stdout)["heldout"]["after"]
    figures = json.loads(evaluated.stdout)
    assert len(figures.pop("calibration")["bins"]) == 15 and figures.pop("logits") == "tiles"
    assert figures == pytest.approx(after, abs=1e-5)
    assert 0 < sum(path.stat().st_size for path in copies.rglob("*") if path.is_file()) <= 100_000


KILLED = """
import os, signal, sys
from kdcache.store.commit import Commit
write = Commit.write
def die(self, place):
    if self.shard == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, place)
Commit.write = die
from kdcache_cli.main import run
run()
"""


def test_a_dump_killed_between_data_and_commit_goes_on(
    teacher: Path, corpus: Path, bucket: Bucket, tmp_path: Path
) -> None:
    url = f"{bucket.url}/c"
    died = python("-c", KILLED, *dumping(teacher, corpus, "--out", url))
    assert died.returncode == -signal.SIGKILL, died.stderr
    orphans = [name for name in bucket.names("c/shards") if name.startswith("00002-")]
    assert len(orphans) == 1
    done = json.loads(kdcache(*dumping(teacher, corpus, "--out", url)).stdout)
    assert done["complete"] and done["shards"]["by_this_worker"] == 4
    assert verify_cache(url).ok
    assert len(bucket.names("c/shards")) == 6 and orphans[0] not in bucket.names("c/shards")
