"""Manifest and commits: what they say, and that a changed byte is noticed."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from kdcache.errors import CacheError, CacheMismatchError, CorruptCacheError
from kdcache.store.commit import Commit, read_commits
from kdcache.store.manifest import NAME, Manifest
from kdcache.store.record import canonical, read_record, seal


def test_a_record_knows_itself(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(seal({"b": [1, 2.5, "é"], "a": None}))
    assert read_record(path)["b"] == [1, 2.5, "é"]
    assert path.read_text().rstrip().endswith("}") and list(json.loads(path.read_text()))[-1] == "checksum"
    assert canonical({"b": 1, "a": "é"}) == '{"a":"é","b":1}'.encode()


def test_every_flipped_bit_of_every_record_is_noticed(cache: Path, tmp_path: Path) -> None:
    for name in (NAME, "commits/00001.json"):
        data, quiet = (cache / name).read_bytes(), 0
        damaged = tmp_path / "damaged.json"
        for at in range(0, len(data), 3):
            damaged.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
            try:
                quiet += read_record(damaged) == read_record(cache / name)
                pytest.fail(f"byte {at} of {name} changed unnoticed") if not quiet else None
            except CorruptCacheError:
                pass
        assert quiet <= data.count(b" ") + data.count(b"\n")  # white space says nothing


def test_a_manifest_reads_back_as_it_was_written(cache: Path) -> None:
    manifest = Manifest.read(cache)
    assert json.loads((cache / NAME).read_text())["checksum"] == manifest.sha256
    assert manifest.temperatures == (1.0, 2.0)
    assert manifest.exact_at(2.0) and not manifest.exact_at(3.0)
    assert manifest.shards == len(read_commits(cache, manifest)) == 4


def reseal(path: Path, **changes: object) -> None:
    path.write_bytes(seal({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "lie",
    [
        {"vocab_size": 0},
        {"seq_len": -1},
        {"docs_per_shard": 0},
        {"documents": "many"},
        {"temperatures": [0]},
        {"temperatures": []},
        {"temperatures": "1"},
        {"selection": {"kind": "topk", "k": 10**9}},
        {"selection": {"kind": "best"}},
        {"selection": 3},
        {"precision": "float8"},
        {"store": "tape"},
        {"tokenizer_files": {"../../etc/passwd": "0"}},
        {"surprise": 1},
    ],
    ids=str,
)
def test_a_sealed_manifest_that_lies_is_refused(cache: Path, tmp_path: Path, lie: dict[str, object]) -> None:
    shutil.copytree(cache, tmp_path / "c")
    reseal(tmp_path / "c" / NAME, **lie)
    with pytest.raises(CacheError):
        Manifest.read(tmp_path / "c")


def test_no_cache_and_unknown_formats(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="holds no cache"):
        Manifest.read(tmp_path)
    shutil.copytree(cache, tmp_path / "c")
    reseal(tmp_path / "c" / NAME, format=2)
    with pytest.raises(CacheError, match="format 2; this version reads format 1"):
        Manifest.read(tmp_path / "c")


def test_a_commit_of_another_shard_or_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "c")
    manifest = Manifest.read(cache)
    shutil.copy(cache / "commits/00001.json", tmp_path / "c/commits/00002.json")
    with pytest.raises(CorruptCacheError, match="another shard"):
        read_commits(tmp_path / "c", manifest)
    with pytest.raises(CorruptCacheError, match="another cache"):
        Commit.read(cache, 1, "0" * 64)
    reseal(tmp_path / "c/commits/00000.json", rows=-1)
    with pytest.raises(CorruptCacheError, match="a count"):
        Commit.read(tmp_path / "c", 0, manifest.sha256)


def test_the_fields_that_differ_are_named(cache: Path) -> None:
    manifest = Manifest.read(cache)
    other = dataclasses.replace(manifest, seq_len=32, teacher_sha256="f" * 64, origin={})
    with pytest.raises(CacheMismatchError, match=r"seq_len \(cache: 64, asked: 32\)") as caught:
        manifest.require_same(other, cache)
    assert "teacher_sha256" in str(caught.value)
    assert "origin" not in str(caught.value)
    manifest.require_same(dataclasses.replace(manifest, origin={"teacher": "elsewhere"}), cache)
