"""A remembered hash is that of the same file, or it is not used."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from kdcache import file_hashes
from kdcache.file_hashes import file_sha256

LONG_AGO = 1_700_000_000


@pytest.fixture
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Files that were really read, in order; small ones are remembered too."""
    found: list[Path] = []

    def read(path: Path) -> str:
        found.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(file_hashes, "_WORTH_REMEMBERING", 0)
    monkeypatch.setattr(file_hashes, "sha256_file", read)
    return found


def make(path: Path, data: bytes, when: int = LONG_AGO) -> Path:
    path.write_bytes(data)
    os.utime(path, (when, when))
    return path


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/kdcache/sha256").glob("*"))


def test_a_file_is_read_once(tmp_path: Path, hashed: list[Path]) -> None:
    path = make(tmp_path / "weights", b"abc")
    assert file_sha256(path) == file_sha256(path) == hashlib.sha256(b"abc").hexdigest()
    link = tmp_path / "link"
    link.symlink_to(path)
    assert file_sha256(link) == hashlib.sha256(b"abc").hexdigest()
    assert hashed == [path]


def test_another_size_time_or_inode_is_read_again(tmp_path: Path, hashed: list[Path]) -> None:
    path = make(tmp_path / "weights", b"abc")
    file_sha256(path)
    for change in (
        lambda: make(path, b"abcd"),
        lambda: make(path, b"abce", LONG_AGO + 1),
        lambda: make(tmp_path / "other", b"abcf", LONG_AGO + 1).replace(path),
    ):
        change()
        assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert len(hashed) == 4


def test_a_file_of_this_second_is_not_remembered(tmp_path: Path, hashed: list[Path]) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    file_sha256(path)
    assert not entries(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"sha256": 3}', "[" * 60_000, "wrong hash", "wrong path"], ids=lambda c: c[:12]
)
def test_memory_that_is_damaged_means_hashing_again(tmp_path: Path, hashed: list[Path], content: str) -> None:
    path = make(tmp_path / "weights", b"abc")
    right = file_sha256(path)
    (entry,) = entries(tmp_path)
    fields = json.loads(entry.read_text())
    changed = {"wrong hash": {**fields, "sha256": "x" * 64}, "wrong path": {**fields, "path": "/"}}.get(content)
    entry.write_text(content if changed is None else json.dumps(changed))
    assert file_sha256(path) == right and len(hashed) == 2
    assert json.loads(entries(tmp_path)[0].read_text()) == fields


def test_without_a_folder_for_memory_it_is_hashed_every_time(
    tmp_path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "weights", b"abc")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert file_sha256(path) == file_sha256(path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError))
    file_sha256(path)
    assert len(hashed) == 3


def test_a_blob_of_the_hub_is_named_by_its_hash(tmp_path: Path, hashed: list[Path]) -> None:
    name, folder = "ab" * 32, tmp_path / "models--a--b"
    (folder / "blobs").mkdir(parents=True)
    (folder / "snapshots/1").mkdir(parents=True)
    (folder / "blobs" / name).write_bytes(b"never read")
    (folder / "snapshots/1/model.safetensors").symlink_to(f"../../blobs/{name}")
    assert file_sha256(folder / "snapshots/1/model.safetensors") == name
    (folder / "blobs/abcd").write_bytes(b"abc")
    assert file_sha256(folder / "blobs/abcd") == hashlib.sha256(b"abc").hexdigest()
    (tmp_path / name).write_bytes(b"abc")  # such a name says nothing elsewhere
    assert file_sha256(tmp_path / name) == hashlib.sha256(b"abc").hexdigest()
    assert len(hashed) == 2


def remember(folder: str, cache: str) -> list[str]:
    os.environ["XDG_CACHE_HOME"] = cache
    file_hashes._WORTH_REMEMBERING = 0
    return [file_sha256(path) for path in sorted(Path(folder).iterdir())] * 3


def test_processes_share_it(tmp_path: Path, hashed: list[Path]) -> None:
    (tmp_path / "files").mkdir()
    for n in range(20):
        make(tmp_path / "files" / f"{n:02}", bytes([n]) * 1000)
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        answers = [pool.submit(remember, str(tmp_path / "files"), str(tmp_path / "cache")) for _ in range(8)]
        found = {tuple(answer.result()) for answer in answers}
    assert len(found) == 1
    assert len(entries(tmp_path)) == 20
    assert file_sha256(tmp_path / "files/07") == hashlib.sha256(b"\7" * 1000).hexdigest()
    assert not hashed
