"""The seal: what it holds is what the commits say, it costs two reads to open, and a lie in it is refused."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from kdcache import open_cache, verify_cache
from kdcache.errors import CorruptCacheError
from kdcache.store.commits import Commits, read_commits
from kdcache.store.local import LocalStorage
from kdcache.store.manifest import Manifest
from kdcache.store.seal import _UNKNOWN, SEAL, _checksum, open_commits, read_seal, seal_cache, to_bytes, unseal
from kdcache.store.sealed_json import seal as seal_record
from kdcache.testing.example_rows import example_manifest, example_rows, of_shards, write_cache
from tests.objects import Bucket, Endpoint


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache, tmp_path / "copy"))


def both(folder: Path) -> tuple[Commits, Commits]:
    storage = LocalStorage(folder)
    manifest = Manifest.read(storage)
    sealed = read_seal(storage, manifest)
    assert sealed is not None
    return sealed, read_commits(storage, manifest)


def test_a_dump_seals_what_its_commits_say(cache: Path) -> None:
    sealed, read = both(cache)
    assert sealed.sealed and not read.sealed
    assert list(sealed) == list(read) == [0, 1, 2, 3] and dict(sealed) == dict(read)
    for name in ("rows", "tokens", "pieces", "labels", "positions", "entries", "documents", "dropped"):
        assert sealed.total(name) == sum(getattr(commit, name) for commit in read.values()) > -1
    assert sealed.bytes == sum(data["bytes"] for commit in read.values() for data in commit.objects)
    assert sealed.histogram() == read.histogram() and sum(sealed.histogram() or ()) == sealed.total("labels")
    assert pickle.loads(pickle.dumps(sealed.only([3, 1])))[3] == read[3]
    assert 4 not in sealed and sealed.get(4) is None


def test_a_seal_is_a_function_of_the_commits(cache: Path, copy: Path) -> None:
    (copy / SEAL).unlink()
    assert seal_cache(LocalStorage(copy)) and seal_cache(LocalStorage(copy))
    assert (copy / SEAL).read_bytes() == (cache / SEAL).read_bytes()


def test_any_arrow_reader_reads_a_seal(cache: Path) -> None:
    table = pa.ipc.open_file(cache / SEAL).read_all()
    assert table["rows"].to_pylist() == [json.loads(p.read_text())["rows"] for p in sorted(cache.glob("commits/*"))]


def test_what_is_not_complete_is_not_sealed(copy: Path) -> None:
    storage = LocalStorage(copy)
    unseal(storage)
    unseal(storage)
    kept = (copy / "commits/00002.json").read_bytes()
    (copy / "commits/00002.json").unlink()
    assert not seal_cache(storage) and not (copy / SEAL).exists()
    assert len(open_cache(copy, partial=True).commits) == 3
    (copy / "commits/00002.json").write_bytes(kept)
    assert seal_cache(storage) and open_cache(copy).commits.sealed


@pytest.mark.parametrize("store", ["arrow", "zarr"])
def test_unknown_sums_stay_unknown(tmp_path: Path, store: str) -> None:
    manifest = example_manifest(store)
    storage = LocalStorage(tmp_path)
    standing = write_cache(storage, manifest, example_rows(manifest, 3))
    path = tmp_path / "commits/00001.json"
    fields = json.loads(path.read_text())
    fields |= {"entropy_histogram": None, "sums": {"entropy": None, "label_logprob": None, "tail_mass": [None, 0.5]}}
    path.write_bytes(seal_record(fields))
    assert seal_cache(storage)
    sealed = open_commits(storage, standing)
    assert dict(sealed) == dict(read_commits(storage, standing))
    assert sealed.histogram() is sealed.sum("entropy") is sealed.sum("tail_mass", 0) is None
    assert sealed.sum("tail_mass", 1) == pytest.approx(0.5 + (sealed[0].sums["tail_mass"][1]))


def test_every_flipped_bit_of_a_seal_is_noticed(copy: Path) -> None:
    data = (copy / SEAL).read_bytes()
    for at in range(0, len(data), max(1, len(data) // 400)):
        (copy / SEAL).write_bytes(data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :])
        with pytest.raises(CorruptCacheError, match=r"seal\.arrow is damaged"):
            open_cache(copy)


def write_lie(folder: Path, table: pa.Table, options: Any = None) -> None:
    """A seal of this table, its checksum right."""
    sink = pa.BufferOutputStream()
    named = {**(table.schema.metadata or {}), b"checksum": _UNKNOWN}
    table = table.replace_schema_metadata(named)
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    (folder / SEAL).write_bytes(data.replace(_UNKNOWN, _checksum(data)))


def change(column: str, value: Any, at: int = 1) -> Callable[[pa.Table], pa.Table]:
    def lie(table: pa.Table) -> pa.Table:
        values = table[column].to_pylist()
        values[at] = value(values[at]) if callable(value) else value
        field = table.schema.field(column)
        number = table.schema.get_field_index(column)
        return table.set_column(number, field, pa.array(values, field.type))

    return lie


def metadata(name: str, value: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.replace_schema_metadata({**table.schema.metadata, name.encode(): value.encode()})


LIES: dict[str, tuple[Callable[[pa.Table], pa.Table], str]] = {
    "another cache": (metadata("manifest_sha256", "0" * 64), "another cache"),
    "another format": (metadata("format", "2"), "another format"),
    "no format": (lambda t: t.replace_schema_metadata({}), "another format"),
    "a shard less": (lambda t: t.slice(0, 3), "does not name each of the 4 shards"),
    "a shard more": (lambda t: pa.concat_tables([t, t.slice(3)]), "does not name each of the 4 shards"),
    "a shard twice": (change("shard", 2), "does not name each of the 4 shards"),
    "no shards": (lambda t: t.slice(0, 0), "does not name each of the 4 shards"),
    "a shard below zero": (change("shard", -1), "does not name each of the 4 shards"),
    "rows below zero": (change("rows", -1), "rows is below 0"),
    "rows of nothing": (change("rows", lambda rows: rows << 30), "it claims .* rows in .* bytes"),
    "2^62 rows": (change("rows", 1 << 62), "it claims .* rows in .* bytes"),
    "tokens beyond": (change("tokens", 1 << 50), "it claims .* tokens"),
    "cut below zero": (change("cut", -1), "cut is below 0"),
    "cut beyond": (change("cut", 1 << 62), "cut and .* truncated of .* documents"),
    "truncated beyond": (change("truncated", (1 << 63) - 1), "truncated of .* documents"),
    "dropped for no reason": (change("dropped", 1), "its reasons are of 0 documents"),
    "a reason for nothing": (change("dropped_by", [{"reason": "r", "documents": 0}]), "a reason for no document"),
    "a reason below zero": (change("dropped_by", [{"reason": "r", "documents": -1}]), "dropped_by is below 0"),
    "a reason for 2^62": (change("dropped_by", [{"reason": "r", "documents": 1 << 62}]), "2\\^55"),
    "a reason of no letters": (change("dropped_by", [{"reason": "", "documents": 1}]), "a reason is not one line"),
    "a reason of 201 letters": (change("dropped_by", [{"reason": "é" * 201, "documents": 1}]), "a reason is not"),
    "a reason that clears the screen": (
        change("dropped_by", [{"reason": "\x1b[2J", "documents": 1}]),
        "a reason is not",
    ),
    "a reason of two lines": (change("bad_records", [{"document": 1, "reason": "a\u2028b"}]), "a reason is not"),
    "a reason that turns around": (change("bad_records", [{"document": 1, "reason": "\u202ea"}]), "a reason is not"),
    "bad below zero": (change("bad", -1), "bad is below 0"),
    "bad beyond": (change("bad", 1), "1 bad records among 0 dropped"),
    "a bad record that is not counted": (change("bad_records", [{"document": 1, "reason": "r"}]), "lists 1 of 0 bad"),
    "a bad record below zero": (change("bad_records", [{"document": -1, "reason": "r"}]), "bad_records is below 0"),
    "a bad record twice": (change("bad_records", [{"document": 1, "reason": "r"}] * 2), "do not rise"),
    "ends of sequence beyond": (change("eos_labels", 1 << 40), "ends of sequence among .* labels"),
    "ends of sequence below zero": (change("eos_labels", -1), "-1 ends of sequence"),
    "pieces beyond": (change("pieces", 1 << 40), "pieces of .* tokens"),
    "more targets than labels": (change("positions", lambda n: n + 1), "targets for .* labels"),
    "one label less": (change("labels", lambda n: n - 1), "targets for .* labels"),
    "2^62 entries": (change("entries", 1 << 62), "it claims .* entries"),
    "no entries": (change("entries", 0), "it claims 0 entries"),
    "entropies of another count": (change("entropy_histogram", lambda h: [*h[:-1], h[-1] + 1]), "its histogram counts"),
    "entropies without end": (change("entropy_histogram", lambda h: [*h, *[0] * 151]), "its histogram has"),
    "entropy beyond any": (change("entropy", lambda x: x * 100 + 1e6), "it claims entropies"),
    "entropy not a number": (change("entropy", float("nan")), "entropy is not a number"),
    "entropy without end": (change("entropy", float("inf")), "it claims entropies"),
    "label log p above 0": (change("label_logprob", lambda x: -x), "of label log p"),
    "label log p without end": (change("label_logprob", float("-inf")), "of label log p"),
    "a tail below zero": (change("tail_mass", [-1.0, 0.0]), "tail mass of -1.0"),
    "a tail at another T": (change("tail_mass", [0.5]), "not of 2 temperature"),
    "a tail that is not a number": (change("tail_mass", [0.5, float("nan")]), "tail mass is not a number"),
    "no objects": (change("objects", []), "no object"),
    "bytes below zero": (change("objects", lambda o: [{**o[0], "bytes": -5}]), "bytes is below 0"),
    "bytes beyond": (change("objects", lambda o: [{**o[0], "bytes": 1 << 62}]), "2\\^55"),
    "a column less": (lambda t: t.drop_columns(["rows"]), "columns"),
    "a column of text": (lambda t: t.set_column(1, "rows", t["rows"].cast(pa.string())), "columns"),
    "a column of floats": (lambda t: t.set_column(1, "rows", t["rows"].cast(pa.float64())), "columns"),
    "signed histograms": (
        lambda t: t.set_column(
            t.schema.get_field_index("entropy_histogram"),
            "entropy_histogram",
            t["entropy_histogram"].cast(pa.list_(pa.field("item", pa.int64(), nullable=False))),
        ),
        "columns",
    ),
    "a null": (
        lambda t: t.set_column(1, t.schema.field("rows"), pc.if_else(pc.equal(t["shard"], 1), None, t["rows"])),
        "missing for a shard|columns",
    ),
    "a dictionary": (lambda t: t.set_column(1, "rows", t["rows"].dictionary_encode()), "columns"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_seal_that_lies_is_refused(copy: Path, name: str) -> None:
    lie, words = LIES[name]
    table = pa.ipc.open_file(pa.py_buffer((copy / SEAL).read_bytes())).read_all()
    write_lie(copy, lie(table))
    with pytest.raises(CorruptCacheError, match=f"seal\\.arrow .*{words}") as caught:
        open_cache(copy)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    report = verify_cache(copy)
    assert [problem["object"] for problem in report.problems] == [SEAL]


def test_a_compressed_seal_is_refused_before_it_unfolds(copy: Path) -> None:
    table = pa.ipc.open_file(pa.py_buffer((copy / SEAL).read_bytes())).read_all()
    write_lie(copy, table, pa.ipc.IpcWriteOptions(compression="zstd"))
    with pytest.raises(CorruptCacheError, match="compressed"):
        open_cache(copy)


@pytest.mark.parametrize(
    ("lie", "words"),
    [
        (change("objects", lambda o: [{**o[0], "name": "../../etc/passwd"}]), "outside of the cache"),
        (change("objects", lambda o: [{**o[0], "name": "shards/00003.arrow"}]), "not of shard 1"),
        (change("objects", lambda o: [o[0], o[0]]), "one twice"),
        (change("compute", "{"), "not JSON"),
    ],
)
def test_names_are_checked_before_they_are_used(copy: Path, lie: Callable[[pa.Table], pa.Table], words: str) -> None:
    table = pa.ipc.open_file(pa.py_buffer((copy / SEAL).read_bytes())).read_all()
    write_lie(copy, lie(table))
    opened = open_cache(copy)
    with pytest.raises(CorruptCacheError, match=words):
        opened[opened.index(1, 0)]
    assert [(p["shard"], p["object"]) for p in verify_cache(copy).problems] == [(1, SEAL)]


@pytest.mark.parametrize(
    "lie",
    [
        change("documents", lambda n: n + 1), change("cut", lambda n: n - 1), change("eos_labels", None),
        change("tokens_sha256", b"0" * 32), change("compute", "{}"),
        change("entropy", lambda x: np.nextafter(x, 0)), change("objects", lambda o: [{**o[0], "sha256": b"1" * 32}]),
    ],
)  # fmt: skip
def test_verify_compares_the_seal_with_the_commits(copy: Path, lie: Callable[[pa.Table], pa.Table]) -> None:
    assert verify_cache(copy).ok
    write_lie(copy, lie(pa.ipc.open_file(pa.py_buffer((copy / SEAL).read_bytes())).read_all()))
    assert [(p["shard"], p["object"]) for p in verify_cache(copy).problems] == [(1, SEAL)]


def test_verify_compares_the_sums_with_the_rows(copy: Path) -> None:
    unseal(LocalStorage(copy))
    path = copy / "commits/00001.json"
    fields = json.loads(path.read_text())
    fields["sums"]["entropy"] *= 0.9
    path.write_bytes(seal_record(fields))
    assert [(p["object"], p["what"]) for p in verify_cache(copy).problems] == [
        ("commits/00001.json", "its sum of entropy is not that of its rows")
    ]


def many(folder: Path, shards: int) -> Path:
    """A cache of so many commits, sealed, without objects."""
    manifest, storage = of_shards(example_manifest("arrow"), shards), LocalStorage(folder)
    one = write_cache(
        LocalStorage(folder / "one"), example_manifest("arrow"), example_rows(example_manifest("arrow"), 2)
    )
    commit = read_commits(LocalStorage(folder / "one"), one)[0]
    standing = manifest.create(storage)

    def described(shard: int) -> list[dict[str, Any]]:
        return [{**commit.objects[0], "name": f"shards/{shard:05d}.arrow"}]

    commits = Commits.of(
        (dataclasses.replace(commit, shard=shard, objects=described(shard)) for shard in range(shards)),
        standing.sha256,
    )
    assert storage.create(SEAL, to_bytes(commits))
    return folder


@pytest.mark.slow
def test_a_sealed_cache_of_many_shards_opens_without_a_look_at_them(tmp_path: Path) -> None:
    folder = many(tmp_path, 60_000)
    opened = open_cache(folder)
    assert len(opened) == 120_000 and len(opened.commits) == 60_000 and not opened.missing()
    assert opened.locate(119_999) == (59_999, 1) and opened.index(59_999, 1) == 119_999
    assert opened.commits[54_321].objects[0]["name"] == "shards/54321.arrow"
    assert opened.commits.table.nbytes < 60_000 * 1500
    with pytest.raises(CorruptCacheError, match=r"54321\.arrow cannot be read"):
        opened[opened.index(54_321, 0)]


@pytest.mark.slow
def test_opening_a_sealed_cache_takes_five_requests(cache: Path, bucket: Bucket, endpoint: Endpoint) -> None:
    url = bucket.upload(cache, "c")
    before = len(endpoint.requests())
    opened = open_cache(url)
    asked = endpoint.asked(url, before)
    assert opened.commits.sealed and len(asked) <= 5, asked
    assert opened[3].tokens.tolist() == open_cache(cache)[3].tokens.tolist()
