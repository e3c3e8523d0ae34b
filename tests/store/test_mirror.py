"""Local copies of a remote cache: bounded, reused, never believed without their sum."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdcache import open_cache
from kdcache.cache import Cache
from kdcache.errors import CacheError, ConfigError, CorruptCacheError
from kdcache.store.mirror import MirroredStorage
from kdcache.store.remote import RemoteStorage
from kdcache.store.storage import Readable
from tests.objects import Bucket, Endpoint
from tests.processes import READY, python


def tokens(cache: Cache) -> list[list[int]]:
    return [row.tokens.tolist() for row in cache]


def held(folder: Path) -> int:
    """Bytes of the files in a folder; one that has two names for a moment counts once."""
    found = {}
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file():
                found[path.stat().st_ino] = path.stat().st_size
    return sum(found.values())


def data_bytes(cache: Cache) -> list[int]:
    return [data["bytes"] for commit in cache.commits.values() for data in commit.objects]


@pytest.fixture
def url(cache: Path, bucket: Bucket) -> str:
    return bucket.upload(cache, "c")


def test_what_was_copied_is_not_fetched_again(
    cache: Path, bucket: Bucket, endpoint: Endpoint, url: str, tmp_path: Path
) -> None:
    expected = tokens(open_cache(cache))
    first = open_cache(url, local_copy=tmp_path / "m")
    assert tokens(first) == expected
    assert held(tmp_path / "m") == sum(data_bytes(first))
    for _ in range(2):
        start = len(endpoint.requests())
        assert tokens(open_cache(url, local_copy=tmp_path / "m")) == expected
        assert not [path for _, path in endpoint.asked(bucket.url, start) if path.startswith("c/shards/")]


def test_a_limit_is_kept_and_what_fits_is_used(
    cache: Path, bucket: Bucket, endpoint: Endpoint, url: str, tmp_path: Path
) -> None:
    sizes = data_bytes(open_cache(url))
    limit = sum(sizes[:2])
    for _ in range(2):
        start = len(endpoint.requests())
        assert tokens(open_cache(url, local_copy=tmp_path / "m", local_limit=limit)) == tokens(open_cache(cache))
        assert max(sizes) < held(tmp_path / "m") <= limit
    fetched = {path for _, path in endpoint.asked(bucket.url, start) if path.startswith("c/shards/")}
    assert fetched and len(fetched) == len(sizes) - 2  # the second pass reads the rest, and moves nothing
    assert tokens(open_cache(url, local_copy=tmp_path / "none", local_limit=0)) == tokens(open_cache(cache))
    assert held(tmp_path / "none") == 0


def read_all(url: str, folder: Path, limit: int) -> None:
    cache = open_cache(url, local_copy=folder, local_limit=limit)
    for _ in cache:
        pass


def test_two_processes_share_the_limit_and_the_copies(
    url: str, tmp_path: Path, bucket: Bucket, endpoint: Endpoint
) -> None:
    limit = sum(data_bytes(open_cache(url))[:3])
    start = len(endpoint.requests())
    readers = [READY.Process(target=read_all, args=(url, tmp_path / "m", limit)) for _ in range(2)]
    for reader in readers:
        reader.start()
    most = 0
    while any(reader.is_alive() for reader in readers):
        most = max(most, held(tmp_path / "m"))
        time.sleep(0.001)
    assert [reader.exitcode for reader in readers] == [0, 0]
    assert 0 < most <= limit and held(tmp_path / "m") == limit
    fetched = [path for _, path in endpoint.asked(bucket.url, start) if path.startswith("c/shards/")]
    assert len({path for path in fetched if fetched.count(path) == 1}) == 3  # each copy was made once, for both


def test_room_is_taken_before_it_is_filled(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two objects that do not fit together, the second wanted while the first is on its way."""
    begun, go_on, fetch = threading.Event(), threading.Event(), MirroredStorage._pieces

    def slowly(self: MirroredStorage, source: Readable) -> Iterator[bytes]:
        if "/00000" in source.name:
            begun.set()
            assert go_on.wait(timeout=60)
        return fetch(self, source)

    monkeypatch.setattr(MirroredStorage, "_pieces", slowly)
    limit = sum(data_bytes(open_cache(url))[:2]) - 1
    one, two = (open_cache(url, local_copy=tmp_path / "m", local_limit=limit) for _ in range(2))
    first = threading.Thread(target=one.read_packed, args=(0,))
    first.start()
    assert begun.wait(timeout=60)
    _ = two[two.index(1, 0)]
    go_on.set()
    first.join()
    assert held(tmp_path / "m") == data_bytes(one)[0] <= limit


def test_threads_that_open_one_object_copy_it_once(
    url: str, tmp_path: Path, bucket: Bucket, endpoint: Endpoint
) -> None:
    start = len(endpoint.requests())
    caches = [open_cache(url, local_copy=tmp_path / "m") for _ in range(4)]
    threads = [threading.Thread(target=cache.read_packed, args=(0,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([path for _, path in endpoint.asked(bucket.url, start) if path.startswith("c/shards/")]) == 1


def test_copies_of_other_caches_make_room(cache: Path, url: str, tmp_path: Path) -> None:
    """One of two, the longest unused, and not before it must."""
    manifest = json.loads((cache / "kdcache.json").read_text())
    most, folder = max(data_bytes(open_cache(url))), tmp_path / "m"
    for other, when in (("old", 1), ("older", 0)):
        (folder / other).mkdir(parents=True)
        (folder / other / "a").write_bytes(bytes(most))
        os.utime(folder / other / "a", (when, when))
    opened = open_cache(url, local_copy=folder, local_limit=3 * most)
    _ = opened[0]
    assert (folder / "older/a").exists() and 2 * most < held(folder) <= 3 * most
    _ = opened[opened.index(1, 0)]
    assert not (folder / "older/a").exists() and (folder / "old/a").exists()
    assert {p.name for p in folder.iterdir() if p.is_dir()} == {"old", "older", manifest["checksum"][:16]}
    assert tokens(opened) == tokens(open_cache(cache))
    assert held(folder) <= 3 * most


def test_a_copy_that_made_room_is_read_from_its_source(cache: Path, url: str, tmp_path: Path) -> None:
    opened = open_cache(url, local_copy=tmp_path / "m")
    _ = opened[0]
    for path in (tmp_path / "m").rglob("*"):
        if path.is_file():
            path.unlink()
    assert opened[7].tokens.tolist() == open_cache(cache)[7].tokens.tolist()


def test_another_object_under_the_same_name_is_another_copy(
    cache: Path, bucket: Bucket, url: str, tmp_path: Path
) -> None:
    """The commit says which bytes count; a copy of others, and a copy cut short, are made anew."""
    opened = open_cache(url, local_copy=tmp_path / "m")
    expected = tokens(opened)
    data = opened.commits[0].objects[0]
    (copy,) = (tmp_path / "m").rglob(data["sha256"])
    assert copy.read_bytes() == (cache / data["name"]).read_bytes()
    copy.write_bytes(copy.read_bytes()[:100])
    assert tokens(open_cache(url, local_copy=tmp_path / "m")) == expected
    assert copy.stat().st_size == data["bytes"]


def test_bits_that_rot_in_a_copy_are_noticed_and_the_copy_is_named(url: str, tmp_path: Path) -> None:
    opened = open_cache(url, local_copy=tmp_path / "m")
    _ = opened[0]
    (copy,) = (tmp_path / "m").rglob(opened.commits[0].objects[0]["sha256"])
    rotten = bytearray(copy.read_bytes())
    rotten[len(rotten) // 2] ^= 1
    copy.write_bytes(rotten)
    with pytest.raises(CorruptCacheError, match=rf"row \d+: .*delete its local copy {copy.parent}"):
        tokens(open_cache(url, local_copy=tmp_path / "m"))


@pytest.mark.parametrize("change", ["flip", "short", "gone"])
def test_damage_in_the_bucket_is_not_copied(bucket: Bucket, url: str, tmp_path: Path, change: str) -> None:
    opened = open_cache(url, local_copy=tmp_path / "m")
    name = f"c/{opened.commits[0].objects[0]['name']}"
    data = bytearray(bucket.get(name))
    data[-1] ^= 1
    if change == "gone":
        bucket.delete(name)
    else:
        bucket.put(name, bytes(data) if change == "flip" else bytes(data[:-1]))
    words = {"flip": "does not have the sha256", "short": "ends before byte", "gone": "there is no such object"}
    with pytest.raises(CorruptCacheError, match=words[change]):
        _ = opened[0]
    assert held(tmp_path / "m") == 0
    _ = opened[opened.index(1, 0)]


def test_verify_looks_at_the_bucket_and_not_at_copies(bucket: Bucket, url: str, tmp_path: Path) -> None:
    opened = open_cache(url, local_copy=tmp_path / "m")
    tokens(opened)
    data = opened.commits[0].objects[0]
    bucket.put(f"c/{data['name']}", b"\0" * data["bytes"])
    assert opened.storage.digest(data["name"])[1] != data["sha256"]


KILLED = """
import os, signal, sys
from kdcache import open_cache
from kdcache.store.atomic_files import NewFile
write = NewFile.write
def die(self, data):
    write(self, data)
    self.flush()
    os.kill(os.getpid(), signal.SIGKILL)
NewFile.write = die
open_cache(sys.argv[1], local_copy=sys.argv[2])[0]
"""


def test_a_process_killed_while_it_copies_leaves_nothing_that_is_believed(
    cache: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    died = python("-c", KILLED, url, tmp_path / "m")
    assert died.returncode == -signal.SIGKILL, died.stderr
    (left,) = (path for path in (tmp_path / "m").glob("*/.*") if path.stat().st_size)
    assert left.name.endswith(".kdcache-tmp")
    os.utime(left, (0, 0))
    limit = sum(data_bytes(open_cache(url)))
    assert tokens(open_cache(url, local_copy=tmp_path / "m", local_limit=limit)) == tokens(open_cache(cache))
    assert held(tmp_path / "m") == limit and not left.exists()


def test_what_cannot_be(cache: Path, url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="local_copy is for a cache at a URL"):
        open_cache(cache, local_copy=tmp_path / "m")
    with pytest.raises(ConfigError, match="local_limit many"):
        open_cache(url, local_copy=tmp_path / "m", local_limit="many")
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot be written"):
        open_cache(url, local_copy=tmp_path / "file")
    assert isinstance(open_cache(url).storage, RemoteStorage)
