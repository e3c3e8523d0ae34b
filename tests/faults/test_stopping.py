"""Commands that are told to stop: exit code 75, what was under way is whole or absent, and the same command resumes.

Signals go to the command alone or, as SLURM sends them, to its helpers as well.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kdcache import stopping, verify_cache
from kdcache.student import trainer
from tests.making import TEXTS
from tests.processes import Ranks, ReadyMade, kdcache, wait_until

WORDS = "stopped; what is finished is kept\n"
STEPS = 40

pytestmark = pytest.mark.slow
BOTH = pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGUSR1, marks=pytest.mark.long)], ids=["term", "usr1"]
)
"""Both are handled alike (tests/unit/test_stopping.py); the ranks below get the other one."""


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def commits(out: Path) -> int:
    return len(list((out / "commits").glob("*.json")))


def files(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "c.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n}: {text}"}) + "\n" for n in range(4) for text in TEXTS))
    return path


@pytest.fixture(scope="module")
def dumping(teacher: Path, long_corpus: Path) -> list[object]:
    """A dump of a few shards, each of many batches."""
    return [
        "dump-teacher", "--teacher", teacher, "--corpus", long_corpus, "--seq-len", "64", "--k", "8",
        "--docs-per-shard", "150", "--batch-rows", "1", "--json", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(dumping: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "c"
    assert kdcache(*dumping, "--out", out, env=one_thread()).returncode == 0
    return out


def stop_in_shard(dumping: list[object], out: Path, number: int, *more: object) -> int:
    """Stop a dump when it has begun its second shard; how many are committed then."""
    process = ReadyMade("-m", "kdcache_cli", *dumping, "--out", out, *more, env=one_thread())
    begun = lambda: any((out / "shards").glob(".00001.*.kdcache-tmp"))  # noqa: E731
    wait_until(begun, process, "the second shard was not begun", every=0.001)
    os.kill(process.pid, number)
    _, err = process.communicate()
    assert (process.returncode, err) == (75, WORDS)
    assert not list(out.rglob(".*")), "something unfinished is left"
    return commits(out)


@BOTH
def test_a_dump_finishes_its_shard(dumping: list[object], whole: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "c"
    assert stop_in_shard(dumping, out, number, "--grace", "1000") == 2
    done = json.loads(kdcache(*dumping, "--out", out, env=one_thread()).stdout)
    assert done["complete"] and done["shards"]["by_this_worker"] == done["shards"]["planned"] - 2
    assert files(out) == files(whole) and verify_cache(out).ok


def test_a_dump_drops_a_shard_that_takes_too_long(dumping: list[object], whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    assert stop_in_shard(dumping, out, signal.SIGTERM, "--grace", "0") == 1
    assert kdcache(*dumping, "--out", out, env=one_thread()).returncode == 0
    assert files(out) == files(whole)


@BOTH
def test_a_conversion_finishes_its_shard(whole: Path, tmp_path: Path, number: int) -> None:
    converting = ["convert", whole, "--store", "zarr", "--json"]
    process = ReadyMade("-m", "kdcache_cli", *converting, "--out", tmp_path / "c", env=one_thread())
    wait_until(lambda: commits(tmp_path / "c") == 1, process, "no shard was converted", every=0.001)
    os.kill(process.pid, number)
    _, err = process.communicate()
    assert (process.returncode, err) == (75, WORDS)
    assert not list((tmp_path / "c").rglob(".*"))
    assert kdcache(*converting, "--out", tmp_path / "c").returncode == 0
    assert verify_cache(tmp_path / "c").content_sha256 == verify_cache(whole).content_sha256


@BOTH
def test_what_cannot_be_resumed_stops_at_once(whole: Path, teacher: Path, tmp_path: Path, number: int) -> None:
    code = "import pathlib, sys, time; from kdcache.report import evaluate; begun = pathlib.Path(sys.argv.pop()); "
    code += "evaluate.evaluate = lambda *_, **__: (begun.touch(), time.sleep(600)); "
    code += "from kdcache_cli.main import run; run()"
    process = ReadyMade("-c", code, "evaluate", "--student", teacher, "--cache", whole, tmp_path / "begun")
    wait_until((tmp_path / "begun").exists, process, "it did not begin")
    os.kill(process.pid, number)
    _, err = process.communicate()
    assert (process.returncode, err) == (75, WORDS)


def training(cache: Path, student_config: Path, out: Path, *more: object) -> list[object]:
    return [
        "train-student", "--cache", cache, "--student", student_config, "--out", out, "--resume", f"--steps={STEPS}",
        "--lr=5e-3", "--heldout=0.1", "--device=cpu", "--record-rows", "--save-every=1000", "--keep=5", *more,
    ]  # fmt: skip


def steps_begun(out: Path) -> int:
    path = out / "rows-0.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def saved(out: Path) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in trainer.complete(out)]


def stop(process: ReadyMade | Ranks, ready: Callable[[], bool], *signals: tuple[int, int]) -> None:
    wait_until(ready, process, "not enough steps were taken", every=0.002)
    for pid, number in signals:
        os.kill(pid, number)
    _, err = process.communicate()
    assert process.returncode == stopping.EXIT_CODE == 75, err


def require_same(out: Path, whole: Path) -> None:
    """The weights of a run that was left alone, its figures and its held-out lines."""
    found, expected = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    one, other = (json.loads((folder / "summary.json").read_text())["heldout"] for folder in (out, whole))
    assert one == other
    assert heldout_lines(out) == heldout_lines(whole)


def heldout_lines(out: Path) -> list[str]:
    return [line for line in (out / "metrics.jsonl").read_text().splitlines() if "heldout" in line]


@BOTH
def test_a_training_saves_the_step_that_it_has_finished(
    cache: Path, student_config: Path, tmp_path: Path, number: int
) -> None:
    """Also where the held-out rows were to be measured after that step: after every one of them."""
    more = ["--batch-rows=2", "--eval-every=1"]
    run = training(cache, student_config, tmp_path / "whole", *more)
    assert kdcache(*run, env=one_thread()).returncode == 0
    out = tmp_path / "s"
    for at in (3, 20):
        process = ReadyMade("-m", "kdcache_cli", *training(cache, student_config, out, *more), env=one_thread())
        stop(process, lambda at=at: steps_begun(out) >= at, (process.pid, number))
        assert saved(out)[-1] in (steps_begun(out), steps_begun(out) - 1)
        assert not (out / "summary.json").exists()
    assert kdcache(*training(cache, student_config, out, *more), env=one_thread()).returncode == 0
    require_same(out, tmp_path / "whole")


@BOTH
def test_readers_that_get_the_signal_too_do_not_end_the_step(
    cache: Path, student_config: Path, tmp_path: Path, number: int
) -> None:
    out = tmp_path / "s"
    arguments = training(cache, student_config, out, "--batch-rows=2", "--readers=2", "--steps=100000")
    code = "from kdcache.student import data_workers; data_workers.START = 'spawn'; "
    process = ReadyMade("-c", code + "from kdcache_cli.main import run; run()", *arguments, env=one_thread())
    wait_until(lambda: steps_begun(out) >= 3, process, "no step was taken")
    helpers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(helpers) >= 2
    stop(process, lambda: True, *((int(pid), number) for pid in (*helpers, process.pid)))
    assert saved(out) in ([steps_begun(out)], [steps_begun(out) - 1])


def test_all_ranks_stop_after_the_same_step(cache: Path, student_config: Path, tmp_path: Path) -> None:
    """Although only one of them is told to, and it is not the one that writes."""
    out = tmp_path / "s"
    arguments = training(cache, student_config, out, "--batch-rows=1")
    whole = Ranks(2, "-m", "kdcache_cli", *training(cache, student_config, tmp_path / "whole", "--batch-rows=1"))
    _, err = whole.communicate()
    assert whole.returncode == 0, err
    for at in (3, 20):
        ranks = Ranks(2, "-m", "kdcache_cli", *arguments)
        stop(ranks, lambda at=at: steps_begun(out) >= at, (ranks.processes[1].pid, signal.SIGUSR1))
        taken = [json.loads((out / f"rows-{rank}.jsonl").read_text().splitlines()[-1])["step"] for rank in (0, 1)]
        assert taken[0] == taken[1] == saved(out)[-1] >= at
    ranks = Ranks(2, "-m", "kdcache_cli", *arguments)
    _, err = ranks.communicate()
    assert ranks.returncode == 0, err
    require_same(out, tmp_path / "whole")
