"""A dump that is really killed, again and again, ends as the one that never was."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from kdcache import verify_cache
from tests.making import TEXTS
from tests.processes import ReadyMade, kdcache, wait_until


def command(teacher: Path, corpus: Path, out: Path) -> list[str]:
    return [
        "dump-teacher", "--teacher", str(teacher), "--corpus", str(corpus), "--out", str(out), "--seq-len", "64",
        "--k", "8", "--docs-per-shard", "40", "--batch-rows", "2", "--json", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "c.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n}: {text}"}) + "\n" for n in range(6) for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def whole(teacher: Path, long_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of a dump that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "c"
    assert kdcache(*command(teacher, long_corpus, out)).returncode == 0
    return out


def shards(out: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((out / "shards").glob("*.arrow"))}


def start(arguments: list[str]) -> ReadyMade:
    return ReadyMade("-m", "kdcache_cli", *arguments)


def wait_for_commits(out: Path, count: int, process: ReadyMade) -> None:
    committed = lambda: len(list((out / "commits").glob("*.json"))) >= count  # noqa: E731
    wait_until(committed, process, f"has fewer than {count} commits", every=0.005)


@pytest.mark.slow
def test_kill_9_and_go_on(teacher: Path, long_corpus: Path, whole: Path, tmp_path: Path) -> None:
    planned, out = len(shards(whole)), tmp_path / "killed"
    for commits in (1, planned // 2):
        process = start(command(teacher, long_corpus, out))
        wait_for_commits(out, commits, process)
        time.sleep(0.02)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert not verify_cache(out).ok
    done = json.loads(kdcache(*command(teacher, long_corpus, out)).stdout)
    assert done["complete"] and 0 < done["shards"]["by_this_worker"] < planned
    assert verify_cache(out).ok
    assert shards(out) == shards(whole)
    left = [p.name for p in out.rglob(".*")]
    time.sleep(2.1)
    kdcache(*command(teacher, long_corpus, out))
    assert all(name.endswith(".kdcache-tmp") for name in left)


@pytest.mark.slow
def test_workers_side_by_side(teacher: Path, long_corpus: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    processes = [start([*command(teacher, long_corpus, out), "--worker", f"{i}/3"]) for i in range(3)]
    results = [(p.communicate(), p.returncode) for p in processes]
    assert all(code == 0 for _, code in results), results
    assert verify_cache(out).ok
    assert shards(out) == shards(whole)
