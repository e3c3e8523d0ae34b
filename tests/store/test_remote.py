"""A cache in an object store: written, raced for, damaged, refused, read; against a real HTTP endpoint."""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import pickle
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from kdcache_cli.main import app
from typer.testing import CliRunner

from kdcache import Row, open_cache, verify_cache
from kdcache.errors import CacheError, ConfigError, CorruptCacheError
from kdcache.report.status import StatusReader
from kdcache.store.commit import Commit
from kdcache.store.open_storage import open_storage, parse_size
from kdcache.store.publish import new_shard, open_shard, publish_shard, require_free_or_same, sweep
from kdcache.store.remote import RemoteStorage
from kdcache.store.seal import seal_cache
from kdcache.store.storage import Storage
from kdcache.teacher.dump import dump
from tests.making import dump_options
from tests.objects import Bucket, Endpoint, free_port
from tests.processes import PATIENCE, READY

SHORT = {"limit_docs": 16, "docs_per_shard": 8}  # two shards of a few rows


def same(one: Row, two: Row) -> bool:
    pairs = [(getattr(one.targets, f.name), getattr(two.targets, f.name)) for f in dataclasses.fields(one.targets)]
    pairs += [(getattr(one, name), getattr(two, name)) for name in ("tokens", "labels", "segments", "documents")]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


@pytest.fixture(scope="module", params=["arrow", pytest.param("zarr", marks=pytest.mark.slow)])
def local(
    request: pytest.FixtureRequest, teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A small cache in a folder, of each store."""
    out = tmp_path_factory.mktemp(request.param) / "c"
    dump(dump_options(teacher, corpus, out, store=request.param, **SHORT))
    return out


@pytest.mark.parametrize("kind", ["s3", "memory"])
def test_the_same_cache_in_a_folder_and_in_a_store(
    local: Path, teacher: Path, corpus: Path, bucket: Bucket, kind: str
) -> None:
    store = open_cache(local).manifest.store
    url = f"{bucket.url}/a/c" if kind == "s3" else f"memory://{local.parent.name}/c"
    summary = dump(dump_options(teacher, corpus, url, store=store, **SHORT))
    assert summary["complete"] and summary["cache"] == url
    here, there = verify_cache(local), verify_cache(url)
    assert there.ok and here.content_sha256 == there.content_sha256 is not None
    assert (here.shards, here.objects) == (there.shards, there.objects)
    remote = open_cache(url)
    assert all(same(one, two) for one, two in zip(open_cache(local), remote, strict=True))
    assert same(remote[-1], pickle.loads(pickle.dumps(remote))[len(remote) - 1])
    again = dump(dump_options(teacher, corpus, url, store=store, **SHORT))
    assert again["complete"] and again["shards"]["by_this_worker"] == 0
    assert sorted(p.name for p in remote.tokenizer_path.iterdir()) == sorted(remote.manifest.tokenizer_files)


def test_a_cache_may_be_carried_to_a_store_and_has_no_neighbours(local: Path, bucket: Bucket) -> None:
    """Objects under their local names; a prefix that begins alike; a console's object for a folder."""
    url = bucket.upload(local, "c")
    bucket.put("c2/junk", b"1")
    bucket.put("c/", b"")
    assert verify_cache(url).ok
    assert RemoteStorage(url).names() == open_storage(local).names()
    assert RemoteStorage(url + "/").url == url


# who comes first


class Starting(RemoteStorage):
    """Two writers meet here: their commits start together."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.gate = threading.Barrier(2, timeout=30)

    def create(self, name: str, data: bytes) -> bool:
        self.gate.wait()
        return super().create(name, data)


def write_shard(storage: Storage, source: Path, shard: int, **compute: Any) -> bool:
    cache = open_cache(source)
    with new_shard(storage, cache.manifest, shard) as writer:
        for row in range(cache.commits[shard].rows):
            writer.write(*cache.shard(shard).read(row))
        entropies = cache.commits[shard].entropy_histogram
        return publish_shard(storage, cache.manifest, writer, documents=8, entropies=entropies, compute=compute)


def forget(bucket: Bucket, prefix: str) -> None:
    """Make the second shard one that nobody has written."""
    for name in bucket.names(prefix):
        if name.startswith(("commits/00001", "shards/00001", "seal")):
            bucket.delete(f"{prefix}/{name}")


@pytest.mark.slow
def test_of_two_writers_one_commits_and_the_others_data_goes(local: Path, bucket: Bucket) -> None:
    url = bucket.upload(local, "c")
    forget(bucket, "c")
    storage, won = Starting(url), {}

    def write(writer: int) -> None:
        won[writer] = write_shard(storage, local, 1, writer=writer)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(won.values()) == [False, True]
    manifest = open_cache(url).manifest
    commit = Commit.read(storage, 1, manifest.sha256)
    assert commit is not None and won[commit.compute["writer"]]
    assert {f"shards/{n}" for n in bucket.names("c/shards") if n.startswith("00001")} == {
        data["name"] for data in commit.objects
    }
    assert verify_cache(url).ok
    assert write_shard(RemoteStorage(url), local, 1) is False  # and who comes later uploads nothing
    assert seal_cache(RemoteStorage(url))
    assert verify_cache(url).objects == verify_cache(local).objects


def test_an_answer_that_is_lost_does_not_lose_the_commit(local: Path, bucket: Bucket) -> None:
    """The first put arrives, its answer does not; the library's second try then finds an object."""
    url = bucket.upload(local, "c")
    forget(bucket, "c")
    storage = RemoteStorage(url)
    put = storage._fs.pipe_file

    def lossy(path: str, data: bytes, **options: Any) -> None:
        put(path, data, **options)
        raise FileExistsError

    storage._fs.pipe_file = lossy
    try:
        assert write_shard(storage, local, 1)
    finally:
        storage._fs.pipe_file = put
    sweep(storage, open_cache(url).manifest)
    assert verify_cache(url).ok and open_cache(url).commits[1].objects[0]["name"].count("-") == 1


def test_puts_that_meet_are_tried_again(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = RemoteStorage(f"{bucket.url}/c")
    put, errors = storage._fs.pipe_file, [OSError("Resource busy"), OSError("Resource busy")]

    def busy(path: str, data: bytes, **options: Any) -> None:
        if errors:
            raise errors.pop()
        put(path, data, **options)

    monkeypatch.setattr(storage._fs, "pipe_file", busy)
    assert storage.create("x", b"1") and not errors
    assert not storage.create("x", b"2") and bucket.get("c/x") == b"1"


def test_a_store_that_lets_puts_replace_objects_is_refused(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = RemoteStorage(f"{bucket.url}/c")
    put = storage._fs.pipe_file
    monkeypatch.setattr(storage._fs, "pipe_file", lambda path, data, **_: put(path, data))
    with pytest.raises(CacheError, match="lets a second put replace an object"):
        storage.create("x", b"1")


def test_a_bucket_that_keeps_versions_takes_no_new_cache(
    cache: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, manifest = bucket.url.removeprefix("s3://"), open_cache(cache).manifest
    bucket.fs.make_bucket_versioned(name)
    with pytest.raises(CacheError, match="cannot hold a new cache: its bucket keeps versions"):
        require_free_or_same(RemoteStorage(f"{bucket.url}/new"), manifest)
    assert not bucket.names("new")
    assert require_free_or_same(RemoteStorage(bucket.upload(cache, "old")), manifest) == manifest
    with monkeypatch.context() as patch:
        patch.setattr("s3fs.S3FileSystem.is_bucket_versioned", lambda *_: 1 / 0)  # somebody who may not ask
        assert require_free_or_same(RemoteStorage(f"{bucket.url}/new"), manifest) is None
    bucket.fs.make_bucket_versioned(name, False)
    assert require_free_or_same(RemoteStorage(f"{bucket.url}/new"), manifest) is None


@pytest.mark.parametrize("kind", ["s3", "memory"])
def test_objects_are_replaced_and_dated_by_the_clock_of_the_store(
    bucket: Bucket, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(f"{bucket.url}/c" if kind == "s3" else f"memory://{tmp_path.name}/c")
    assert storage.modified("running") == {}
    before = time.time()
    for data in (b"1", b"22"):
        storage.replace("running/x", data)
        assert storage.read("running/x", 10) == data
    assert storage.modified("running")["running/x"] == pytest.approx(before, abs=5)
    assert storage.clock() == pytest.approx(before, abs=5)
    if kind == "s3":
        with monkeypatch.context() as patch:
            patch.setattr("kdcache.store.remote.time.time", lambda: 0.0)
            assert storage.clock() == pytest.approx(before, abs=60)
    for _ in range(2):
        storage.delete_object("running/x")
        assert storage.names() == []


@pytest.mark.slow
def test_a_look_at_a_large_dump_costs_a_listing(cache: Path, bucket: Bucket, endpoint: Endpoint) -> None:
    """One request for a thousand commits, whatever is in them."""
    url = bucket.upload(cache, "c")
    storage = RemoteStorage(url)
    for name in [*storage.names("commits"), "seal.arrow", "kdcache.json"]:
        storage.delete_object(name)
    manifest = dataclasses.replace(open_cache(cache).manifest, plan={}, shards=10_000, documents=10_000)
    manifest.create(storage)
    paths = {f"{bucket.url.removeprefix('s3://')}/c/commits/{n:05d}.json": b"x" for n in range(1200)}
    bucket.fs.pipe(paths)
    storage.replace("running/02000.json", b"somebody makes it")
    reader = StatusReader(url)
    start = len(endpoint.requests())
    assert reader.look()["shards"]["committed"] == 1200
    asked = Counter(method for method, _ in endpoint.asked(bucket.url, start))
    assert asked["HEAD"] + asked["GET"] == asked.total() <= 4 + 2 + 1


@pytest.mark.slow
def test_a_writer_killed_before_its_commit_leaves_an_orphan_that_goes(
    local: Path, teacher: Path, corpus: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, store = f"{bucket.url}/c", open_cache(local).manifest.store
    commit = Commit.write

    def die(self: Commit, storage: Storage) -> bool:
        if self.shard == 1:
            raise KeyboardInterrupt  # what was put stays as it is, as after a kill
        return commit(self, storage)

    with monkeypatch.context() as patch:
        patch.setattr(Commit, "write", die)
        with pytest.raises(KeyboardInterrupt):
            dump(dump_options(teacher, corpus, url, store=store, **SHORT))
    orphans = [n for n in bucket.names("c/shards") if n.startswith("00001-")]
    assert orphans and not verify_cache(url).ok
    assert dump(dump_options(teacher, corpus, url, store=store, **SHORT))["shards"]["by_this_worker"] == 1
    assert verify_cache(url).content_sha256 == verify_cache(local).content_sha256
    left = {f"shards/{name}" for name in bucket.names("c/shards")}
    assert left == {data["name"] for commit in open_cache(url).commits.values() for data in commit.objects}
    assert not left & set(orphans)


def test_a_manifest_that_appears_while_a_worker_looks_is_found(
    cache: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, manifest = RemoteStorage(f"{bucket.url}/c"), open_cache(cache).manifest
    size = RemoteStorage.size

    def late(self: RemoteStorage, name: str) -> int | None:
        found = size(self, name)
        manifest.create(self)
        return found

    monkeypatch.setattr(RemoteStorage, "size", late)
    assert require_free_or_same(storage, manifest) == manifest


# damage


def damage(bucket: Bucket, name: str, how: str) -> None:
    data = bucket.get(name)
    if how == "flip":
        at = len(data) // 2
        bucket.put(name, data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
    elif how == "truncate":
        bucket.put(name, data[: len(data) // 2])
    elif how == "empty":
        bucket.put(name, b"")
    elif how == "lengthen":
        bucket.put(name, data + b"\0")
    elif how == "delete":
        bucket.delete(name)


DAMAGES = ("flip", "delete", *(pytest.param(how, marks=pytest.mark.long) for how in ("truncate", "empty", "lengthen")))
"""Every kind of damage is done in a bucket by the suite that all stores pass (test_conformance.py)."""


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_data_is_named_and_never_read(local: Path, bucket: Bucket, how: str) -> None:
    url, whole = bucket.upload(local, "c"), open_cache(local)
    damaged = ["tokenizer/tokenizer.json", *(n for n in bucket.names("c") if n.startswith("shards/00001"))]
    for name in damaged:
        damage(bucket, f"c/{name}", how)
    assert {p["object"] for p in verify_cache(url).problems} == set(damaged)
    if how != "flip":
        with pytest.raises(CorruptCacheError, match=r"shards/00001.* bytes, not the .* that were committed"):
            open_cache(url).require_objects()
    cache = open_cache(url)
    with pytest.raises(CorruptCacheError, match="tokenizer"):
        _ = cache.tokenizer_path
    refused = set()
    for index in range(len(cache)):
        try:
            assert same(cache[index], whole[index])
        except CorruptCacheError as error:
            assert "shards/00001" in str(error)
            refused.add(index)
    shard = set(range(cache.index(1, 0), len(cache)))
    if how == "lengthen":  # what was committed is there, and something behind it
        assert not refused
    elif how == "flip" and cache.manifest.store == "arrow":  # one file, one bit
        assert refused and refused < shard
    else:
        assert refused == shard


@pytest.mark.parametrize("how", ["flip", "delete"])
def test_any_one_damaged_object_of_a_shard_is_enough(local: Path, how: str) -> None:
    bucket = Bucket(fsspec.filesystem("memory"), f"memory:///{local.parent.name}-{how}")
    url, whole = bucket.upload(local, "c"), open_cache(local)
    index = whole.index(1, 0)
    for name in [n for n in bucket.names("c") if n.startswith("shards/00001")]:
        data = bucket.get(f"c/{name}")
        damage(bucket, f"c/{name}", how)
        cache = open_cache(url, partial=True)
        read = 0
        for row in range(index, len(cache)):
            try:
                assert same(cache[row], whole[row])
                read += 1
            except CorruptCacheError as error:
                assert "shards/00001" in str(error)
        assert read < len(cache) - index, name
        bucket.put(f"c/{name}", data)


@pytest.mark.slow
@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_records_are_named_and_never_believed(cache: Path, bucket: Bucket, how: str) -> None:
    url = bucket.upload(cache, "c")
    name = "c/commits/00001.json"
    data = bucket.get(name)
    damage(bucket, name, how)
    assert [p["object"] for p in verify_cache(url).problems] == ["commits/00001.json"]
    sealed = bucket.get("c/seal.arrow")
    bucket.delete("c/seal.arrow")
    with pytest.raises(CacheError, match="1 of 4 shards are missing" if how == "delete" else "00001.json is damaged"):
        open_cache(url)
    bucket.put(name, data)
    bucket.put("c/seal.arrow", sealed)
    damage(bucket, "c/seal.arrow", how)
    assert [p["object"] for p in verify_cache(url).problems] == ([] if how == "delete" else ["seal.arrow"])
    if how != "delete":
        with pytest.raises(CorruptCacheError, match=r"seal\.arrow is damaged"):
            open_cache(url)
    damage(bucket, "c/kdcache.json", how)
    with pytest.raises(CacheError, match="holds no cache" if how == "delete" else "kdcache.json is damaged"):
        open_cache(url)


@pytest.mark.slow
def test_objects_of_two_shards_changed_places(local: Path, bucket: Bucket) -> None:
    url = bucket.upload(local, "c")
    one, two = (f"shards/0000{shard}" for shard in (0, 1))
    for name in [n for n in bucket.names("c") if n.startswith(one)]:
        other = name.replace(one, two)
        first, second = bucket.get(f"c/{name}"), bucket.get(f"c/{other}")
        bucket.put(f"c/{name}", second)
        bucket.put(f"c/{other}", first)
    assert {p["shard"] for p in verify_cache(url).problems} == {0, 1}
    cache = open_cache(url, partial=True)
    for index in (0, len(cache) - 1):
        with pytest.raises(CorruptCacheError):
            cache[index]


# what it costs


def test_no_look_before_a_read_and_no_read_twice(local: Path, bucket: Bucket, endpoint: Endpoint) -> None:
    cache = open_cache(bucket.upload(local, "c"))
    zarr, streams = cache.manifest.store == "zarr", len(cache.manifest.row_format.shapes(0))

    def asked(read: Any) -> list[tuple[str, str]]:
        start = len(endpoint.requests())
        read()
        return endpoint.asked(bucket.url, start)

    opening = asked(lambda: cache[1])
    assert {method for method, _ in opening} == {"GET"}
    assert len(opening) == (3 + 3 * streams + 2 if zarr else 3)  # group, arrays and indexes, tables; or both ends
    assert len(asked(lambda: cache[5])) == (streams if zarr else 1)
    whole = open_cache(str(cache.storage))
    sweep = asked(lambda: list(whole.read_rows(range(len(whole)))))
    if not zarr:  # four rows lie together and are fetched once, also by threads that ask for them together
        assert len(sweep) == sum(2 + -(-commit.rows // 4) for commit in whole.commits.values())


def test_verify_looks_at_an_object_once_before_it_is_read(local: Path, bucket: Bucket, endpoint: Endpoint) -> None:
    url, start = bucket.upload(local, "c"), len(endpoint.requests())
    assert verify_cache(url).ok
    looks = [path for method, path in endpoint.asked(bucket.url, start) if method == "HEAD" and "/shards/" in path]
    assert looks and len(looks) == len(set(looks))


@pytest.mark.slow
def test_requests_are_under_way_together(local: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(bucket.upload(local, "c"))
    fs = cache.storage._fs  # type: ignore[attr-defined]
    fetch, under_way, peak = fs._cat_file, 0, 0

    async def counting(*arguments: Any, **options: Any) -> bytes:
        nonlocal under_way, peak
        under_way += 1
        peak = max(peak, under_way)
        await asyncio.sleep(0.3)  # as long as it takes for all that do not wait for each other to begin
        under_way -= 1
        found: bytes = await fetch(*arguments, **options)
        return found

    monkeypatch.setattr(fs, "_cat_file", counting)
    streams = len(cache.manifest.row_format.shapes(0))
    shard = open_shard(cache.storage, cache.manifest, cache.commits[0])
    assert peak == (3 + 2 * streams + 2 if cache.manifest.store == "zarr" else 2)
    peak = 0
    shard.read(3)
    assert peak == (streams if cache.manifest.store == "zarr" else 1)
    peak = 0
    list(cache.read_rows(range(0, 15, 4)))
    assert peak >= 4


def read_one(cache: Any, index: int, answers: Any) -> None:
    answers.put(cache[index].tokens.tolist())


@pytest.mark.parametrize("context", [multiprocessing.get_context("fork"), READY], ids=["fork", "ready-made"])
def test_an_open_cache_works_in_a_child(cache: Path, bucket: Bucket, context: Any) -> None:
    opened = open_cache(bucket.upload(cache, "c"))
    _ = opened[3]  # its connections are open
    index = len(opened) - 1  # of a row that is yet to be fetched
    answers = context.Queue()
    child = context.Process(target=read_one, args=(opened, index, answers))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of forks beside threads; DataLoader forks
        child.start()
    assert answers.get(timeout=PATIENCE) == open_cache(cache)[index].tokens.tolist()
    child.join()
    answers.close()


# what cannot be


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
    return result.exit_code, result.stderr


@pytest.fixture
def fresh_connections() -> Any:
    """Connections know the environment of their making."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_bucket_that_does_not_exist(endpoint: Endpoint, teacher: Path, corpus: Path) -> None:
    url = "s3://no-such-bucket/c"
    dumping = ("dump-teacher", "--teacher", teacher, "--corpus", corpus, "--seq-len", 64, "--out", url)
    for arguments in (("verify", url), dumping):
        code, words = invoke(*arguments)
        assert code == 2 and url in words and "bucket does not exist" in words
    with pytest.raises(CacheError, match="bucket does not exist"):
        RemoteStorage(url).create("x", b"")


def test_keys_that_the_endpoint_does_not_know(
    cache: Path, bucket: Bucket, endpoint: Endpoint, fresh_connections: None
) -> None:
    url = bucket.upload(cache, "c")
    endpoint.check_keys(True)
    try:
        code, words = invoke("verify", url)
    finally:
        endpoint.check_keys(False)
    assert code == 2 and words.startswith(f"error: {url}/kdcache.json cannot be read: ")


def test_no_keys(bucket: Bucket, monkeypatch: pytest.MonkeyPatch, fresh_connections: None) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    code, words = invoke("inspect-shard", f"{bucket.url}/c")
    assert code == 2 and "Unable to locate credentials" in words


def test_an_endpoint_that_is_not_there(monkeypatch: pytest.MonkeyPatch, fresh_connections: None) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    code, words = invoke("verify", "s3://bucket/c")
    assert code == 2 and "Could not connect to the endpoint" in words


def test_an_endpoint_that_goes_away_while_it_is_read(
    cache: Path, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_cache(bucket.upload(cache, "c"))

    async def gone(*_: Any, **__: Any) -> bytes:
        raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr(opened.storage._fs, "_cat_file", gone)  # type: ignore[attr-defined]
    with pytest.raises(CacheError, match="cannot be read: Connection reset by peer") as caught:
        opened[0]
    assert not isinstance(caught.value, CorruptCacheError)


@pytest.mark.parametrize("url", ["nosuch://bucket/c", "s3://", "gs://bucket/c"])
def test_urls_that_cannot_be_used(url: str) -> None:
    with pytest.raises(ConfigError, match=url):
        open_storage(url)


def test_other_objects_under_the_prefix(bucket: Bucket, cache: Path) -> None:
    bucket.put("c/thesis.tex", b"years of work")
    with pytest.raises(CacheError, match=r"holds no cache but other files, such as thesis\.tex"):
        require_free_or_same(RemoteStorage(f"{bucket.url}/c"), open_cache(cache).manifest)


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GB", 20 * 10**9), ("512MiB", 512 << 20), ("7", 7), (" 1.5 kb", 1500), ("2T", 2 * 10**12), (9, 9)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "many", "-1GB", "1 2GB", "nan", "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="local_limit"):
        parse_size(text)
