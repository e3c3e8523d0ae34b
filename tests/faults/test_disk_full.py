"""A disk that is really full: one sentence, nothing half-written, and the same cache once there is room."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcache import open_cache
from tests.making import TEXTS
from tests.objects import Bucket
from tests.processes import kdcache


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one mebibyte, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("this system has no mount command")
    if done.returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_takes_no_more_local_copies(small_disk: Path, cache: Path, bucket: Bucket) -> None:
    """What is there is used, the rest is read over the network."""
    url = bucket.upload(cache, "c")
    sizes = [data["bytes"] for commit in open_cache(url).commits.values() for data in commit.objects]
    room = 2 * max(sizes) + (64 << 10)
    subprocess.run(["mount", "-o", f"remount,size={room}", str(small_disk)], check=True)
    (small_disk / "other").write_bytes(bytes(60 << 10))
    assert sum(sizes) > room
    expected = [row.tokens.tolist() for row in open_cache(cache)]
    for _ in range(2):
        read = open_cache(url, local_copy=small_disk / "copies", local_limit="20GB")
        assert [row.tokens.tolist() for row in read] == expected
    copies = [path.stat().st_size for path in (small_disk / "copies").glob("*/*") if not path.name.startswith(".")]
    assert 0 < len(copies) < len(sizes) and set(copies) <= set(sizes)
    assert not list((small_disk / "copies").rglob("*.kdcache-tmp"))


@pytest.mark.slow
def test_a_full_disk_ends_with_a_sentence_and_the_dump_goes_on(small_disk: Path, teacher: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{n}: {text}"}) + "\n" for n in range(12) for text in TEXTS))
    options = [
        "--teacher", teacher, "--corpus", corpus, "--seq-len", "64", "--k", "8", "--docs-per-shard", "100", "--device",
        "cpu", "--json",
    ]  # fmt: skip
    full = kdcache("dump-teacher", *options, "--out", small_disk / "cache")
    assert full.returncode == 2 and full.stdout == ""
    assert full.stderr.startswith("error: ") and full.stderr.endswith("No space left on device\n")
    assert full.stderr.count("\n") == 1
    assert not list(small_disk.rglob(".*"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    done = json.loads(kdcache("dump-teacher", *options, "--out", small_disk / "cache").stdout)
    assert done["complete"] and 0 < done["shards"]["by_this_worker"] < done["shards"]["planned"]
    kdcache("dump-teacher", *options, "--out", tmp_path / "whole")
    for path in sorted((tmp_path / "whole/shards").iterdir()):
        assert path.read_bytes() == (small_disk / "cache/shards" / path.name).read_bytes()
