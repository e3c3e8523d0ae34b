"""Dumps by processes that one command starts on this machine."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import psutil
import pytest

from kdcache.crew.processes import _share, visible_gpus
from kdcache.errors import ConfigError
from kdcache.teacher.config import DumpConfig, DumpOptions
from kdcache.verify import verify_cache
from tests.making import dump_options
from tests.processes import ReadyMade, kdcache, wait_until


def arguments(teacher: Path, corpus: Path, out: Path, *more: object) -> list[object]:
    return [
        "dump-teacher", "--teacher", teacher, "--corpus", corpus, "--out", out, "--seq-len", 64, "--k", 8,
        "--temperatures", "1,2", "--docs-per-shard", 6, "--device", "cpu", "--json", *more,
    ]  # fmt: skip


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def workers(driver: ReadyMade) -> list[psutil.Process]:
    return psutil.Process(driver.pid).children()


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_make_the_cache_of_one(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    done = kdcache(*arguments(teacher, corpus, tmp_path / "one"), env=one_thread())
    assert done.returncode == 0, done.stderr
    more = ("--launch", "local", "--workers", 2)
    driver = ReadyMade("-m", "kdcache_cli", *arguments(teacher, corpus, tmp_path / "two", *more), env=one_thread())
    wait_until(lambda: len(workers(driver)) == 2, driver, "there are no two workers")
    workers(driver)[1].kill()
    out, err = driver.communicate()
    assert (driver.returncode, err) == (0, "")
    summary = json.loads(out)
    assert summary["complete"] and summary["workers"] == 2 and summary["replaced"] == 1
    found = subprocess.run(["diff", "-r", tmp_path / "one", tmp_path / "two"], capture_output=True, check=False)
    assert found.returncode == 0, found.stdout
    assert verify_cache(tmp_path / "two").ok


@pytest.mark.slow
def test_a_stopped_driver_ends_its_workers(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    more = ("--launch", "local", "--workers", 1, "--batch-rows", 1, "--docs-per-shard", 1)
    driver = ReadyMade("-m", "kdcache_cli", *arguments(teacher, corpus, tmp_path / "c", *more), env=one_thread())
    wait_until(lambda: any((tmp_path / "c" / "commits").glob("*")), driver, "no shard is committed")
    processes = workers(driver)
    driver.terminate()
    out, err = driver.communicate()
    assert (driver.returncode, out) == (75, "") and "stopped; what is finished is kept" in err
    assert processes and not any(process.is_running() for process in processes)


@pytest.mark.slow
def test_what_a_worker_refuses_is_one_sentence(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    done = kdcache(*arguments(teacher, tmp_path / "nowhere.jsonl", tmp_path / "c", "--launch", "local"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "nowhere.jsonl" in done.stderr and done.stderr.count("\n") == 1


def test_gpus_are_dealt_in_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    four = ["0", "1", "2", "3"]
    assert [_share(four, 1, worker) for worker in range(6)] == [["0"], ["1"], ["2"], ["3"], ["0"], ["1"]]
    assert [_share(four, 2, worker) for worker in range(3)] == [["0", "1"], ["2", "3"], ["0", "1"]]
    assert [_share(four, 0.5, worker) for worker in range(2)] == [["0"], ["1"]]
    assert _share(four, 0, 0) == _share([], 0, 0) == []
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": "GPU-a,5"}) == ["GPU-a", "5"]
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": ""}) == visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"workers": 2}, 'workers is 2, but no workers are started: use launch="ray"'),
        ({"launch": "slurm"}, "launch is slurm, but must be local or ray"),
        ({"launch": "ray", "workers": 0}, "workers is 0, but must be at least 1"),
        ({"launch": "ray", "cpus_per_worker": -1}, "cpus_per_worker is -1, but must be at least 1"),
        ({"launch": "ray", "gpus_per_worker": 1.5}, "gpus_per_worker is 1.5, but must be a whole number"),
        ({"launch": "ray", "gpus_per_worker": float("nan")}, "gpus_per_worker is nan"),
        ({"launch": "local", "address": "auto"}, "address is auto, but only a Ray cluster has one"),
        ({"launch": "local", "worker": "0/2"}, "worker and launch exclude each other"),
        ({"launch": "local", "create_only": True}, "create_only and launch exclude each other"),
        ({"worker": "0/2", "create_only": True}, "create_only and worker exclude each other"),
    ],
)
def test_options_that_cannot_be(given: dict[str, object], said: str, teacher: Path, tmp_path: Path) -> None:
    config = dump_options(teacher, tmp_path / "corpus", tmp_path / "c")
    fields = {name: getattr(config, name) for name in DumpConfig.__dataclass_fields__}
    with pytest.raises(ConfigError) as error:
        DumpOptions(**{**fields, **given})
    assert str(error.value).startswith(said)
    assert DumpOptions(**fields).config == config


def test_ray_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, teacher: Path, tmp_path: Path) -> None:
    from kdcache.teacher.launch import launch

    monkeypatch.setattr("kdcache.ray_cluster.find_spec", lambda _: None)
    config = dump_options(teacher, tmp_path / "corpus", tmp_path / "c")
    fields = {name: getattr(config, name) for name in DumpConfig.__dataclass_fields__}
    with pytest.raises(ConfigError, match=r"pip install 'kdcache\[ray\]'"):
        launch(DumpOptions(**fields, launch="ray"))
