"""Training from a URL: readers go ahead, and the run is the one from a folder, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from kdcache import open_cache
from kdcache.errors import CacheError, ConfigError, CorruptCacheError
from kdcache.report.evaluate import evaluate
from kdcache.student import data_workers
from kdcache.student.config import TrainConfig
from kdcache.student.train import train
from kdcache.student.trainer import DistillationTrainer, arguments
from tests.objects import Bucket, Endpoint
from tests.processes import READY, ReadyMade, wait_until


def options(cache: object, student: Path, out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "steps": 9, "batch_rows": 2, "accumulate": 2, "lr": 5e-3, "heldout": 0.1, "save_every": 3, "keep": 3,
        "device": "cpu", "soft_weight": 0.9,
    }  # fmt: skip
    return TrainConfig(**{**usual, "cache": str(cache), "student": str(student), "out": str(out), **changes})


def same(one: Path, two: Path) -> bool:
    a, b = (dict(AutoModelForCausalLM.from_pretrained(folder).state_dict()) for folder in (one, two))
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def figures(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics without what a clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "data_wait_share"} for line in lines]


@pytest.fixture(scope="module")
def run(cache: Path, student_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run from a folder, with no readers."""
    out = tmp_path_factory.mktemp("run") / "s"
    return out, train(options(cache, student_config, out))


@pytest.mark.slow
def test_a_run_from_a_url_is_the_run_from_a_folder_also_when_resumed(
    ready_readers: None,
    run: tuple[Path, dict[str, Any]],
    cache: Path,
    student_config: Path,
    bucket: Bucket,
    endpoint: Endpoint,
    tmp_path: Path,
) -> None:
    out, folder = run
    config = options(bucket.upload(cache, "c"), student_config, tmp_path / "s", local_copy=str(tmp_path / "m"))
    there = train(config)
    assert there["heldout"] == folder["heldout"] and same(tmp_path / "s", out)
    assert figures(tmp_path / "s") == figures(out)
    for name in ("checkpoint-9", "checkpoint-6"):
        shutil.rmtree(tmp_path / "s" / name)
    (tmp_path / "s/summary.json").unlink()
    start = len(endpoint.requests())
    again = train(dataclasses.replace(config, resume=True, readers=1, local_limit="1GB"))
    assert again["heldout"] == folder["heldout"] and same(tmp_path / "s", out)
    assert again["positions"] < there["positions"]
    assert not [path for _, path in endpoint.asked(bucket.url, start) if path.startswith("c/shards/")]


@pytest.mark.slow
def test_readers_of_a_folder_change_nothing_and_their_errors_are_one_sentence(
    run: tuple[Path, dict[str, Any]],
    cache: Path,
    student_config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaders: list[Any] = []
    load = DistillationTrainer.get_train_dataloader
    monkeypatch.setattr(
        DistillationTrainer, "get_train_dataloader", lambda self: loaders.append(load(self)) or loaders[-1]
    )
    whole = shutil.copytree(cache, tmp_path / "c")
    config = options(whole, student_config, tmp_path / "s", readers=2)
    assert train(config)["heldout"] == run[1]["heldout"] and same(tmp_path / "s", run[0])
    assert loaders[0].num_workers == 2 and loaders[0].multiprocessing_context.get_start_method() == "spawn"

    monkeypatch.setattr(data_workers, "START", READY)
    (tmp_path / "s/summary.json").unlink()
    for name in ("checkpoint-9", "checkpoint-6"):
        shutil.rmtree(tmp_path / "s" / name)
    sound = {path: path.read_bytes() for path in (whole / "shards").iterdir()}
    for path, data in sound.items():
        path.write_bytes(data[:-1])
    with pytest.raises(CorruptCacheError, match=r"arrow has .* bytes, not the .* that were committed") as caught:
        train(dataclasses.replace(config, resume=True))
    assert "\n" not in str(caught.value) and "Traceback" not in str(caught.value)
    for path, data in sound.items():
        path.write_bytes(data)
    assert train(dataclasses.replace(config, resume=True))["heldout"] == run[1]["heldout"]
    assert same(tmp_path / "s", run[0])


SPAWNING = """
from kdcache.student import data_workers
data_workers.START = "spawn"  # as usual
from kdcache_cli.main import run
run()
"""


@pytest.mark.slow
def test_a_run_with_readers_stops_in_one_sentence(cache: Path, student_config: Path, tmp_path: Path) -> None:
    process = ReadyMade(
        "-c", SPAWNING, "train-student", "--cache", cache, "--student", student_config, "--out",
        tmp_path / "s", "--readers", 2, "--batch-rows", 2, "--steps", 100_000, "--device", "cpu", "--quiet",
    )  # fmt: skip
    wait_until((tmp_path / "s/metrics.jsonl").exists, process, "no step was taken")
    process.terminate()
    _, words = process.communicate()
    assert process.returncode == 75 and words == "stopped; what is finished is kept\n"


def test_a_reader_that_is_killed_is_one_sentence() -> None:
    said = r"a reader was killed \(DataLoader worker \(pid 7\) is killed by signal: Killed\)"
    with pytest.raises(CacheError, match=said), data_workers.translate_worker_errors():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nMore advice.")
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    with ours, pytest.raises(CacheError, match="a reader was killed"), data_workers.translate_worker_errors():
        ours.recv()
    for other in (RuntimeError("another"), ConnectionError("another")):
        with pytest.raises(type(other), match="another"), data_workers.translate_worker_errors():
            raise other


def test_what_a_reader_says_is_said_without_its_traceback() -> None:
    told = (
        "Caught CorruptCacheError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\nkdcache.errors.CorruptCacheError: s3://b/c, row 3: its crc32c does not match\n'
    )
    for text in (told, "s3://b/c, row 3: its crc32c does not match"):
        with pytest.raises(CorruptCacheError) as caught, data_workers.translate_worker_errors():
            raise CorruptCacheError(text)
        assert str(caught.value) == "s3://b/c, row 3: its crc32c does not match"
    with pytest.raises(KeyError), data_workers.translate_worker_errors():
        raise KeyError(1)


@pytest.mark.parametrize(
    ("remote", "wished", "expected"), [(False, None, 0), (True, None, 2), (True, 0, 0), (False, 3, 3)]
)
def test_how_many_readers(tmp_path: Path, remote: bool, wished: int | None, expected: int) -> None:
    config = options("c", tmp_path, tmp_path / "s", readers=wished)
    assert arguments(config, 3, torch.device("cpu"), remote).dataloader_num_workers == expected
    with pytest.raises(ConfigError, match="readers is -1"):
        options("c", tmp_path, tmp_path, readers=-1)


@pytest.mark.slow
def test_where_rows_are_read_from_may_change_when_a_run_is_resumed(
    run: tuple[Path, dict[str, Any]], cache: Path, student_config: Path, bucket: Bucket, tmp_path: Path
) -> None:
    out = shutil.copytree(run[0], tmp_path / "s")
    (out / "summary.json").unlink()
    shutil.rmtree(out / "checkpoint-9")
    moved = options(
        bucket.upload(cache, "c"), student_config, out, resume=True, readers=0, local_copy=str(tmp_path / "m")
    )
    assert train(moved)["heldout"] == run[1]["heldout"] and same(out, run[0])
    assert json.loads((out / "train-student.json").read_text())["cache"] == list(moved.cache)


def test_evaluate_from_a_url(
    run: tuple[Path, dict[str, Any]], cache: Path, bucket: Bucket, endpoint: Endpoint, tmp_path: Path
) -> None:
    url = bucket.upload(cache, "c")
    for _ in range(2):
        start = len(endpoint.requests())
        there = evaluate(str(run[0]), url, heldout=0.1, device="cpu", local_copy=str(tmp_path / "m"), local_limit="1GB")
        assert there == evaluate(str(run[0]), str(cache), heldout=0.1, device="cpu")
    assert not [path for _, path in endpoint.asked(bucket.url, start) if path.startswith("c/shards/")]
    with pytest.raises(ConfigError, match="local_limit"):
        evaluate(str(run[0]), url, local_copy=str(tmp_path / "m"), local_limit="lots")
    assert len(open_cache(url)) == len(open_cache(cache))
