"""A bucket that answers 503 to a third of all requests and cuts connections off: dump and training end right."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kdcache import verify_cache
from tests.busy_endpoint import BusyEndpoint
from tests.objects import Bucket, Endpoint
from tests.processes import ReadyMade, kdcache

pytestmark = pytest.mark.slow


def test_dump_and_training_end_right(
    teacher: Path, corpus: Path, student_config: Path, bucket: Bucket, endpoint: Endpoint, tmp_path: Path
) -> None:
    """One corpus is dumped to a bucket, by two workers, and to a folder at the same time, and a part of it to another
    folder; a student reads from a bucket and a folder."""
    here, there, part = tmp_path / "c", f"{bucket.url}/c", tmp_path / "part"
    dumping = [
        "dump-teacher", "--teacher", teacher, "--corpus", corpus, "--seq-len", 64, "--k", 8, "--docs-per-shard", 20,
        "--device", "cpu", "--json",
    ]  # fmt: skip
    with BusyEndpoint(endpoint.url, busy=1 / 3, lost=0.06, seed=1) as busy:
        env = {**os.environ, "AWS_ENDPOINT_URL": busy.url}
        workers = [
            ReadyMade("-m", "kdcache_cli", *dumping, "--out", there, "--worker", f"{i}/2", env=env) for i in range(2)
        ]
        workers.append(ReadyMade("-m", "kdcache_cli", *dumping, "--out", here))
        workers.append(ReadyMade("-m", "kdcache_cli", *dumping, "--limit-docs", 30, "--out", part))
        told = [(*worker.communicate(), worker.returncode) for worker in workers]
        assert [(err, code) for _, err, code in told] == [("", 0)] * 4
        assert sum(json.loads(out)["shards"]["by_this_worker"] for out, _, _ in told[:2]) == 6

        def train(out: Path, **options: object) -> bytes:
            done = kdcache(
                "train-student", "--cache", there, "--cache", part, "--student", student_config, "--out", out,
                "--steps", 3, "--batch-rows", 4, "--json", **options,
            )  # fmt: skip
            assert done.returncode == 0 and done.stderr == "", done.stderr
            return (out / "model.safetensors").read_bytes()

        weights = train(tmp_path / "busy", env=env)
        status = kdcache("status", there, "--json", env=env)
    assert json.loads(status.stdout)["complete"]
    assert min(busy.done[fate] for fate in ("busy", "cut", "lost")) > 0
    assert 0.2 < busy.done["busy"] / busy.done.total() < 0.45
    assert weights == train(tmp_path / "idle")
    remote = verify_cache(there)
    assert remote.ok and remote.content_sha256 == verify_cache(here).content_sha256
    assert not bucket.names("c/running")
    assert len(bucket.names("c/shards")) == 6
