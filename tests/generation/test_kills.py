"""Generation that is killed, stopped or shared ends as the one that was not."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from tests.making import TEXTS
from tests.processes import ReadyMade, kdcache, wait_until

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("many") / "p.jsonl"
    path.write_text("".join(json.dumps({"text": text[:40]}) + "\n" for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def whole(teacher: Path, many: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "c"
    done = kdcache(*command(teacher, many, out))
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["complete"] and summary["shards"] == {"planned": 14, "written": 14, "by_this_worker": 14}
    return out


def command(writer: Path, prompts: Path, out: Path, *more: object) -> list[str]:
    return [
        "generate", "--writer", str(writer), "--prompts", str(prompts), "--out", str(out), "--max-new-tokens", "60",
        "--docs-per-shard", "8", "--batch-rows", "4", "--device", "cpu", "--json", *map(str, more),
    ]  # fmt: skip


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.jsonl"))}


def test_killed_at_random_moments(teacher: Path, many: Path, whole: Path, tmp_path: Path) -> None:
    out, moments = tmp_path / "c", random.Random(0)
    for round_ in range(6):
        process = ReadyMade("-m", "kdcache_cli", *command(teacher, many, out))
        wanted = len(files(out)) + 1 if round_ % 2 else 0
        wait_until(lambda wanted=wanted: len(files(out)) >= wanted, process, "has not written a file", every=0.002)
        time.sleep(moments.random() * (0.1 if wanted else 1))
        process.kill()
        process.communicate()
        assert files(out).items() <= files(whole).items()
        if len(files(out)) > 8:
            break
    assert 3 <= len(files(out)) < 14
    done = json.loads(kdcache(*command(teacher, many, out)).stdout)
    assert done["complete"] and 0 < done["shards"]["by_this_worker"] < 14
    assert files(out) == files(whole)
    time.sleep(2.1)  # what a killed writer has left is deleted when it is surely old
    (out / "shard-00013.jsonl").unlink()
    assert json.loads(kdcache(*command(teacher, many, out)).stdout)["complete"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*files(whole), "kdcache-corpus.json"])


def test_a_signal_ends_it_after_its_shard(teacher: Path, many: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    process = ReadyMade("-m", "kdcache_cli", *command(teacher, many, out))
    wait_until(lambda: bool(files(out)), process, "has not written a file", every=0.002)
    process.terminate()
    _, said = process.communicate()
    assert process.returncode == 75 and "stopped; what is finished is kept" in said
    assert 0 < len(files(out)) < 14 and files(out).items() <= files(whole).items()
    assert json.loads(kdcache(*command(teacher, many, out)).stdout)["complete"]
    assert files(out) == files(whole)


def test_two_workers_make_the_same_files(teacher: Path, many: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "side"
    processes = [ReadyMade("-m", "kdcache_cli", *command(teacher, many, out, "--worker", f"{i}/2")) for i in range(2)]
    results = [(process.communicate(), process.returncode) for process in processes]
    assert all(code == 0 for _, code in results), results
    assert files(out) == files(whole)
    launched = kdcache(*command(teacher, many, tmp_path / "launched", "--launch", "local", "--workers", "2"))
    assert launched.returncode == 0, launched.stderr
    summary = json.loads(launched.stdout)
    assert summary["workers"] == 2 and summary["complete"] and summary["completions"] == len(TEXTS)
    assert files(tmp_path / "launched") == files(whole)


def test_the_command_in_words(teacher: Path, many: Path, tmp_path: Path) -> None:
    words = [word for word in command(teacher, many, tmp_path / "c", "--limit-docs", "9") if word != "--json"]
    done = kdcache(*words)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    said = " ".join(done.stdout.split())
    assert "complete, 2 of 2 shards (2 by this worker)" in said and "9 completions" in said
    refused = kdcache(*words, "--top-p", "0.5")
    assert refused.returncode == 2 and refused.stdout == ""
    assert "differs in --top-p (there: 1.0, asked: 0.5)" in refused.stderr and len(refused.stderr.splitlines()) == 1
