"""The doctor says what works, and in one sentence what does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdcache.doctor import self_test
from kdcache.doctor.access import check_access
from kdcache.doctor.examine import examine
from kdcache.doctor.machine import disk_speed
from kdcache.errors import ConfigError
from kdcache.store.local import LocalStorage
from tests.objects import Bucket
from tests.processes import kdcache


@pytest.mark.slow
def test_a_machine_that_works(tmp_path: Path) -> None:
    done = kdcache("doctor", "--folder", tmp_path, "--store", tmp_path / "s", "--device", "cpu", "--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["ok"] and found["problems"] == [], done.stderr
    assert found["versions"]["torch"] and found["devices"][0]["cores"] >= 1
    assert set(found["self_test"]["seconds"]) == {"teacher", "dump", "verify", "train"}
    assert found["disk"]["write_bytes_per_second"] > 0 and found["store"]["ok"]
    assert not any(path.is_file() for path in tmp_path.rglob("*"))  # nothing is left


@pytest.mark.slow
def test_without_the_self_test_it_only_looks(tmp_path: Path) -> None:
    done = kdcache("doctor", "--folder", tmp_path, "--no-self-test", "--device", "cpu")
    assert done.returncode == 0 and "everything that was looked at works" in done.stdout
    assert "self-test" not in done.stdout


def test_a_place_that_cannot_be_written_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    found = examine(folder=str(tmp_path), store=str(tmp_path / "file"), self_test=False, device="cpu")
    assert not found["ok"] and "is a file, not a folder" in found["problems"][0]
    done = kdcache("doctor", "--folder", tmp_path, "--store", tmp_path / "file", "--no-self-test")
    assert done.returncode == 1 and "problem: " in done.stdout
    assert not check_access("nosuch://bucket/x")["ok"]


def test_a_store_that_lets_objects_be_replaced_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def create(self: LocalStorage, name: str, data: bytes) -> bool:
        (self.folder / name).write_bytes(data)
        return True

    monkeypatch.setattr(LocalStorage, "create", create)
    found = check_access(str(tmp_path))
    assert not found["ok"] and "lets a second put replace" in found["error"] and list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_bucket(bucket: Bucket) -> None:
    found = check_access(f"{bucket.url}/caches")
    assert found["ok"], found
    missing = check_access("s3://a-bucket-that-nobody-has/caches")
    assert not missing["ok"] and missing["error"]


def test_a_stage_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> None:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(self_test, "_make_teacher", broken)
    found = self_test.run_self_test("cpu", lambda _: None)
    assert not found["ok"] and found["error"] == "teacher: RuntimeError: no kernel image is available"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        disk_speed(tmp_path / "none", 1)
