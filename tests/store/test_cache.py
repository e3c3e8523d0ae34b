"""A cache as its readers see it: any row in any order, nothing believed that the manifest does not vouch for."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from kdcache import open_cache, verify_cache
from kdcache.errors import CorruptCacheError
from kdcache.store.local import LocalStorage
from kdcache.store.seal import seal_cache


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copy"))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def test_any_row_of_a_cache_reads_the_same_in_any_order(cache: Path) -> None:
    opened = open_cache(cache)
    first = [row.tokens.tolist() for row in opened]
    assert [opened[int(i)].tokens.tolist() == first[i] for i in torch.randperm(len(first))] == [True] * len(first)
    assert opened[-1].tokens.tolist() == first[-1]
    with pytest.raises(IndexError):
        opened[len(first)]


def test_an_open_cache_goes_to_another_process(cache: Path) -> None:
    opened = open_cache(cache)
    row = opened[3]
    assert pickle.loads(pickle.dumps(opened))[3].tokens.tolist() == row.tokens.tolist()


def test_verify_finds_every_kind_of_damage(copy: Path) -> None:
    assert verify_cache(copy).ok
    flip(copy / "shards/00000.arrow")
    (copy / "shards/00001.arrow").unlink()
    flip(copy / "commits/00002.json")
    flip(copy / "tokenizer/tokenizer.json")
    (copy / "commits/00003.json").unlink()
    report = verify_cache(copy)
    assert {(p["shard"], p["object"]) for p in report.problems} == {
        (0, "shards/00000.arrow"), (1, "shards/00001.arrow"), (2, "commits/00002.json"),
        (None, "tokenizer/tokenizer.json"), (3, "commits/00003.json"),
    }  # fmt: skip
    assert report.content_sha256 is None


@pytest.mark.parametrize("change", ["cut", "delete", "folder"])
def test_opening_misses_an_object_that_is_not_whole(copy: Path, change: str) -> None:
    """A partial cache may still be looked at; of a sealed one nobody looks for objects before they are read."""
    (copy / "seal.arrow").unlink()
    path = copy / "shards/00002.arrow"
    data = path.read_bytes()
    path.unlink()
    if change == "cut":
        path.write_bytes(data[:-1])
    elif change == "folder":
        path.mkdir()
    with pytest.raises(CorruptCacheError, match=r"shards/00002\.arrow has \d+ bytes, not the \d+ that were committed"):
        open_cache(copy)
    assert seal_cache(LocalStorage(copy))
    with pytest.raises(CorruptCacheError, match=r"00002\.arrow has \d+ bytes"):
        open_cache(copy).require_objects()
    opened = open_cache(copy)
    assert opened[0].tokens.numel() == 64
    with pytest.raises(CorruptCacheError, match=r"00002\.arrow"):
        opened[opened.index(2, 0)]


def test_the_tokenizer_is_checked_before_it_is_used(copy: Path) -> None:
    assert open_cache(copy).tokenizer_path == copy / "tokenizer"
    stray = copy / "tokenizer/added_tokens.json"
    stray.write_text("{}")
    with pytest.raises(CorruptCacheError, match=r"added_tokens\.json is not named by the manifest"):
        _ = open_cache(copy).tokenizer_path
    stray.unlink()
    flip(copy / "tokenizer/tokenizer.json")
    with pytest.raises(CorruptCacheError, match=r"tokenizer\.json is not what the manifest names"):
        _ = open_cache(copy).tokenizer_path
    (copy / "tokenizer/tokenizer.json").unlink()
    with pytest.raises(CorruptCacheError, match=r"tokenizer\.json is missing"):
        _ = open_cache(copy).tokenizer_path
