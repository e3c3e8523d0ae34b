"""Files appear whole or not at all, and never replace one another."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from pathlib import Path

import pytest

from kdcache.errors import CacheError
from kdcache.store import atomic_files
from kdcache.store.atomic_files import NewFile, NewFolder, locked, sha256_file, sweep, write_new
from kdcache.store.storage import Sink


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_nothing_is_there_before_publish(tmp_path: Path) -> None:
    with NewFile(tmp_path / "a") as file:
        file.write(b"12")
        file.write(b"345")
        file.flush()
        assert not (tmp_path / "a").exists()
        assert file.publish()
    assert (tmp_path / "a").read_bytes() == b"12345"
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"12345").hexdigest()
    assert names(tmp_path) == ["a"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), NewFile(tmp_path / "a") as file:
        file.write(b"12")
        raise RuntimeError
    assert names(tmp_path) == []


@pytest.mark.parametrize("links", [True, False])
def test_the_first_writer_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:

        def refuse(*_: object) -> None:
            raise PermissionError("no hard links here")

        monkeypatch.setattr(os, "link", refuse)
    assert write_new(tmp_path / "a", b"first")
    assert not write_new(tmp_path / "a", b"second")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert names(tmp_path) == ["a"]


def test_the_systems_refusal_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot be written"):
        write_new(tmp_path / "file" / "a", b"")


def test_a_folder_appears_whole_and_again_after_something_made_room(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "other").write_bytes(b"1")
    with NewFolder(tmp_path / "a") as folder:
        folder.file("b/c").write(b"12")
        folder.file("d").write(b"3")
        assert not folder.publish()
        assert (tmp_path / "a" / "other").exists()
        (tmp_path / "a" / "other").unlink()
        (tmp_path / "a").rmdir()
        assert folder.publish()
    assert {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()} == {"a/b/c", "a/d"}


def test_a_folder_that_is_not_published_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), NewFolder(tmp_path / "a") as folder:
        folder.file("b/c").write(b"12")
        raise RuntimeError
    assert names(tmp_path) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no device that is always full")
def test_a_full_disk_under_a_part_is_one_sentence() -> None:
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(CacheError, match=r"ids/c/0 cannot be wri"):
        Sink("shards/00000.zarr/ids/c/0", full).write(b"12")


def test_who_holds_a_folder_is_alone(tmp_path: Path) -> None:
    order: list[str] = []
    with locked(tmp_path):
        other = threading.Thread(target=enter, args=(tmp_path, order))
        other.start()
        time.sleep(0.05)
        order.append("first")
    other.join()
    assert order == ["first", "second"]


def enter(folder: Path, order: list[str]) -> None:
    with locked(folder):
        order.append("second")


def test_sweep_takes_the_dead_and_spares_the_living(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "_SWEEP_AGE", -1.0)
    with NewFile(tmp_path / "living") as file:
        file.write(b"1")
        dead = tmp_path / f".dead.0{atomic_files._TEMPORARY}"
        dead.write_bytes(b"2")
        (tmp_path / "kept").write_bytes(b"3")
        sweep(tmp_path)
        assert not dead.exists()
        assert file.publish()
    assert names(tmp_path) == ["kept", "living"]


def test_sweep_leaves_what_was_just_made(tmp_path: Path) -> None:
    young = tmp_path / f".young.0{atomic_files._TEMPORARY}"
    young.write_bytes(b"")
    sweep(tmp_path)
    assert young.exists()
    os.utime(young, (time.time() - 60,) * 2)
    sweep(tmp_path)
    assert not young.exists()
