"""Manifest and commits: what they say, and that a changed byte is noticed."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numcodecs import Zstd

from kdcache.errors import CacheError, CacheMismatchError, ConfigError, CorruptCacheError
from kdcache.store.commit import Commit
from kdcache.store.commits import read_commits
from kdcache.store.local import LocalStorage
from kdcache.store.manifest import NAME, Manifest
from kdcache.store.sealed_json import canonical, read_record, seal


def test_a_record_knows_itself(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(seal({"b": [1, 2.5, "é"], "a": None}))
    assert read_record(LocalStorage(tmp_path), "r.json")["b"] == [1, 2.5, "é"]
    assert path.read_text().rstrip().endswith("}") and list(json.loads(path.read_text()))[-1] == "checksum"
    assert canonical({"b": 1, "a": "é"}) == '{"a":"é","b":1}'.encode()


def test_every_flipped_bit_of_every_record_is_noticed(cache: Path, tmp_path: Path) -> None:
    for name in (NAME, "commits/00001.json"):
        data, quiet = (cache / name).read_bytes(), 0
        damaged, storage, honest = (
            tmp_path / "damaged.json",
            LocalStorage(tmp_path),
            read_record(LocalStorage(cache), name),
        )
        for at in range(0, len(data), 3):
            damaged.write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
            try:
                quiet += read_record(storage, "damaged.json") == honest
                pytest.fail(f"byte {at} of {name} changed unnoticed") if not quiet else None
            except CorruptCacheError:
                pass
        assert quiet <= data.count(b" ") + data.count(b"\n")  # white space says nothing


def test_a_manifest_reads_back_as_it_was_written(cache: Path) -> None:
    manifest = Manifest.read(LocalStorage(cache))
    assert json.loads((cache / NAME).read_text())["checksum"] == manifest.sha256
    assert manifest.temperatures == (1.0, 2.0)
    assert manifest.exact_at(2.0) and not manifest.exact_at(3.0)
    assert manifest.shards == len(read_commits(LocalStorage(cache), manifest)) == 4


def reseal(path: Path, **changes: object) -> None:
    path.write_bytes(seal({**json.loads(path.read_text()), **changes}))


def test_the_hash_of_a_manifest_is_the_one_that_stands_in_it(cache: Path, tmp_path: Path) -> None:
    """Another zstd folds the order of ids into other bytes; the commits name those of the writer."""
    shutil.copytree(cache, tmp_path / "c")
    order = np.arange(40, dtype="<u2")[::-1]
    other = base64.b64encode(Zstd(level=19, checksum=True).encode(order.copy())).decode()
    reseal(tmp_path / "c" / NAME, id_order=other)
    manifest = Manifest.read(LocalStorage(tmp_path / "c"))
    assert manifest.id_order == tuple(order.tolist())
    assert manifest.sha256 == json.loads((tmp_path / "c" / NAME).read_text())["checksum"]
    assert manifest.to_fields()["id_order"] != other
    assert dataclasses.replace(manifest, seq_len=32).sha256 != manifest.sha256


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"documents": 10**8, "shards": 10**7 + 1}, "10,000,001 shards of 100,000,000 documents are above the limit"),
        ({"seq_len": 1 << 24, "selection": {"kind": "full"}}, "a row of seq_len 16777216 slots may hold"),
        ({"vocab_size": 1 << 31}, "the vocabulary has 2,147,483,648 tokens"),
        ({"temperatures": (1.0, 1000.0)}, "temperature 1000 is outside"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_manifest_beyond_the_limits_is_never_written(
    cache: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    manifest = dataclasses.replace(Manifest.read(LocalStorage(cache)), **changes)
    with pytest.raises(ConfigError, match=re.escape(words)):
        manifest.create(LocalStorage(tmp_path / "new"))
    assert not (tmp_path / "new").exists()


def test_no_cache_and_unknown_formats(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="holds no cache"):
        Manifest.read(LocalStorage(tmp_path))
    shutil.copytree(cache, tmp_path / "c")
    reseal(tmp_path / "c" / NAME, format=2)
    with pytest.raises(CacheError, match="format 2; this version reads format 1"):
        Manifest.read(LocalStorage(tmp_path / "c"))


def test_a_commit_of_another_shard_or_cache_is_refused(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "c")
    manifest = Manifest.read(LocalStorage(cache))
    shutil.copy(cache / "commits/00001.json", tmp_path / "c/commits/00002.json")
    with pytest.raises(CorruptCacheError, match="another shard"):
        read_commits(LocalStorage(tmp_path / "c"), manifest)
    with pytest.raises(CorruptCacheError, match="another cache"):
        Commit.read(LocalStorage(cache), 1, "0" * 64)
    reseal(tmp_path / "c/commits/00000.json", rows=-1)
    with pytest.raises(CorruptCacheError, match="rows is -1"):
        Commit.read(LocalStorage(tmp_path / "c"), 0, manifest.sha256)


def test_the_fields_that_differ_are_named(cache: Path) -> None:
    manifest = Manifest.read(LocalStorage(cache))
    other = dataclasses.replace(manifest, seq_len=32, teacher_sha256="f" * 64, origin={})
    with pytest.raises(CacheMismatchError, match=r"seq_len \(cache: 64, asked: 32\)") as caught:
        manifest.require_same(other, LocalStorage(cache))
    assert "teacher_sha256" in str(caught.value)
    assert "origin" not in str(caught.value)
    manifest.require_same(dataclasses.replace(manifest, origin={"teacher": "elsewhere"}), LocalStorage(cache))
