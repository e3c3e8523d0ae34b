"""The plan object: what is written is read again, and no lie in it is believed."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kdcache import open_cache, verify_cache
from kdcache.convert import convert
from kdcache.corpus.plan import CorpusFile, Plan
from kdcache.errors import CacheError, CacheMismatchError, CorpusError, CorruptCacheError
from kdcache.store.local import LocalStorage
from kdcache.store.manifest import NAME, PLAN, Manifest
from kdcache.store.plan import create_plan, decode_plan, encode_plan, read_plan
from kdcache.store.seal import SEAL
from kdcache.store.sealed_json import canonical, seal
from kdcache.teacher.dump import dump
from kdcache.testing.example_rows import example_manifest, example_plan
from tests.making import dump_options


def change(plan: Plan, **fields: Any) -> Plan:
    return Plan(**{**vars(plan), **fields})


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    plan = change(
        example_plan(example_manifest("arrow")),
        files=(CorpusFile(name="a b/ü.txt", size=1 << 40), CorpusFile(name="c.txt", size=3)),
        file=np.array([0, 1], np.int32),
        offset=np.array([1 << 33, 2]),
    )
    again = decode_plan(encode_plan(plan))
    assert again == plan
    assert encode_plan(again) == encode_plan(plan)
    table = pa.ipc.open_file(pa.BufferReader(encode_plan(plan))).read_all()
    assert table.column("last").to_pylist() == [19, 39]
    assert table.column("sha256").to_pylist()[1] == bytes(range(32, 64))


def test_who_comes_second_takes_the_same_plan_and_no_other(tmp_path: Path) -> None:
    storage, plan = LocalStorage(tmp_path), example_plan(example_manifest("arrow"))
    first = create_plan(storage, plan)
    assert create_plan(storage, plan) == first
    (tmp_path / PLAN).write_bytes(relaid(encode_plan(plan)))  # as another version of Arrow might lay it out
    assert create_plan(storage, plan)["sha256"] == hashlib.sha256(relaid(encode_plan(plan))).hexdigest()
    with pytest.raises(CacheError, match=r"plan\.arrow is of another plan; delete it"):
        create_plan(storage, change(plan, rule={"docs_per_shard": 21}))


def relaid(data: bytes, **options: Any) -> bytes:
    table = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema, **options) as writer:
        writer.write_batch(table.combine_chunks().to_batches()[0])
    return sink.getvalue() if options else sink.getvalue()[:-10] + b"\0" * 8 + sink.getvalue()[-10:]


def column(name: str, values: Any) -> Callable[[Plan], bytes]:
    def forge(plan: Plan) -> bytes:
        changed = getattr(plan, name).copy()
        changed[1] = values
        return encode_plan(change(plan, **{name: changed}))

    return forge


def about(**fields: Any) -> Callable[[Plan], bytes]:
    """Another JSON object in the schema."""

    def forge(plan: Plan) -> bytes:
        table = pa.ipc.open_file(pa.BufferReader(encode_plan(plan))).read_all()
        told = {**json.loads(table.schema.metadata[b"kdcache"]), **fields}
        told = {key: value for key, value in told.items() if value is not ...}
        return written(table.replace_schema_metadata({b"kdcache": canonical(told)}))

    return forge


def written(table: Any) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def cast(name: str, kind: Any) -> Callable[[Plan], bytes]:
    def forge(plan: Plan) -> bytes:
        table = pa.ipc.open_file(pa.BufferReader(encode_plan(plan))).read_all()
        place, values = table.schema.get_field_index(name), table.column(name).to_pylist()
        values = list(map(str, values)) if kind == pa.string() else values
        return written(table.set_column(place, name, pa.array(values, kind)))

    return forge


def patched(old: bytes, new: bytes) -> Callable[[Plan], bytes]:
    def forge(plan: Plan) -> bytes:
        data = encode_plan(plan)
        assert old in data
        return data.replace(old, new)

    return forge


def shorter(plan: Plan) -> bytes:
    return encode_plan(change(plan, **{n: v[:1] for n, v in vars(plan).items() if isinstance(v, np.ndarray)}))


LIES: dict[str, Callable[[Plan], bytes]] = {
    "a gap between shards": column("first", 7),
    "shards that overlap": column("first", 5),
    "a shard without documents": column("last", 5),
    "a shard of 2^62 documents": column("last", 1 << 62),
    "more documents than the manifest has": column("last", 12),
    "fewer documents than the manifest has": column("last", 10),
    "a length below 0": column("characters", -1),
    "a file that is not there": column("file", 1),
    "a file below 0": column("file", -1),
    "a place below 0": column("offset", -1),
    "a place before the shard before": column("offset", 0),
    "one shard": shorter,
    "no files": about(files=[[], []]),
    "a file without a size": about(files=[["a"], []]),
    "a file twice": about(files=[["a", "a"], [1, 2]]),
    "a size of text": about(files=[["a"], ["1"]]),
    "a size of true": about(files=[["a"], [True]]),
    "a size below 0": about(files=[["a"], [-1]]),
    "a name that is a number": about(files=[[1], [1]]),
    "files in a map": about(files={}),
    "files that are null": about(files=None),
    "no word of files": about(files=...),
    "a rule of text": about(rule="docs"),
    "a rule of two": about(rule={"docs_per_shard": 1, "chars_per_shard": 1}),
    "a rule below 0": about(rule={"docs_per_shard": -1}),
    "a reading that is a list": about(reading=[]),
    "a field more": about(surprise=1),
    "numbers of 32 bits": cast("first", pa.int32()),
    "numbers of floats": cast("characters", pa.float64()),
    "a hash of any length": cast("sha256", pa.binary()),
    "documents that are text": cast("last", pa.string()),
    "compressed": lambda plan: relaid(encode_plan(plan), options=pa.ipc.IpcWriteOptions(compression="zstd")),
    "a column less": lambda plan: written(
        pa.ipc.open_file(pa.BufferReader(encode_plan(plan))).read_all().drop_columns(["offset"])
    ),
    "another file": lambda plan: b"PAR1" + encode_plan(plan)[4:],
    "half": lambda plan: encode_plan(plan)[: len(encode_plan(plan)) // 2],
    "nothing": lambda plan: b"",
    "the first bytes": lambda plan: encode_plan(plan)[:20],
    "a schema of 2^31 bytes": lambda plan: encode_plan(plan)[:12] + b"\xff\xff\xff\x7f" + encode_plan(plan)[16:],
    "JSON that nests": patched(b'{"files"', b"{[[[[[[["),
}


def forge(folder: Path, data: bytes, **fields: Any) -> None:
    """Another plan in a cache that is not sealed, and records that belong to it."""
    (folder / SEAL).unlink()
    (folder / PLAN).write_bytes(data)
    record = json.loads((folder / NAME).read_text())
    (folder / NAME).write_bytes(
        seal({**record, "plan": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}, **fields})
    )
    sha256 = json.loads((folder / NAME).read_text())["checksum"]
    for path in (folder / "commits").iterdir():
        path.write_bytes(seal({**json.loads(path.read_text()), "manifest_sha256": sha256}))


@pytest.fixture(scope="module")
def small(teacher: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of two shards of six documents."""
    out = tmp_path_factory.mktemp("small") / "c"
    dump(dump_options(teacher, corpus, out, limit_docs=12, docs_per_shard=6))
    return out


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_sentence_that_names_the_plan(small: Path, tmp_path: Path, lie: str) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "c"))
    storage = LocalStorage(copy)
    plan = read_plan(storage, Manifest.read(storage))
    assert plan is not None
    forge(copy, LIES[lie](plan))
    with pytest.raises(CacheError, match=r"plan\.arrow") as caught:
        read_plan(storage, Manifest.read(storage))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    problems = verify_cache(copy).problems
    assert any(problem["object"] == PLAN for problem in problems)


def test_every_bit_of_a_plan_counts(small: Path, tmp_path: Path) -> None:
    """Flipped bits are found by the hash; with the hash forged, they are refused or are another plan."""
    storage = LocalStorage(Path(shutil.copytree(small, tmp_path / "c")))
    data = (small / PLAN).read_bytes()
    honest, random = decode_plan(data), np.random.default_rng(0)
    for at in random.choice(len(data), 300, replace=False):
        flipped = bytearray(data)
        flipped[at] ^= 1 << int(random.integers(8))
        (tmp_path / "c" / PLAN).write_bytes(flipped)
        with pytest.raises(CorruptCacheError, match="sha256"):
            read_plan(storage, Manifest.read(storage))
        try:
            assert isinstance(decode_plan(bytes(flipped)) == honest, bool)
        except CorruptCacheError:
            continue


def test_a_plan_that_is_missing_cut_or_changed_is_found(
    small: Path, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    for number, (words, harm) in enumerate({
        "is missing": lambda path: path.unlink(),
        "bytes, not the": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "is larger than": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        "the sha256 of": lambda path: path.write_bytes(path.read_bytes().replace(b"texts", b"tests")),
    }.items()):  # fmt: skip
        copy = Path(shutil.copytree(small, tmp_path / str(number)))
        harm(copy / PLAN)
        assert [p["object"] for p in verify_cache(copy).problems] == [PLAN]
        with pytest.raises(CorruptCacheError, match=words):
            dump(dump_options(teacher, corpus, copy, limit_docs=12, docs_per_shard=6))
        with pytest.raises(CorruptCacheError, match=words):
            convert(copy, tmp_path / "out", store="zarr")
        assert not (tmp_path / "out/kdcache.json").exists()


def test_commits_are_checked_against_the_plan(small: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "c"))
    storage = LocalStorage(copy)
    plan = read_plan(storage, Manifest.read(storage))
    assert plan is not None
    forge(copy, encode_plan(change(plan, first=np.array([0, 5]), last=np.array([4, 11]))))
    problems = verify_cache(copy).problems
    assert {p["object"] for p in problems} == {"commits/00000.json", "commits/00001.json"}
    assert "it claims 6 documents, 0 dropped, of 5" in problems[0]["what"]


def test_bad_records_are_checked_against_the_plan(small: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(small, tmp_path / "c")) / "commits/00001.json"
    (tmp_path / "c" / SEAL).unlink()
    fields = {**json.loads(path.read_text()), "dropped": 1, "dropped_by": {"r": 1}, "bad": 1}
    for document, words in ((6, None), (11, None), (5, "bad record 5"), (1 << 60, f"bad record {1 << 60}")):
        path.write_bytes(seal({**fields, "bad_records": [{"document": document, "reason": "r"}]}))
        problems = verify_cache(tmp_path / "c").problems
        assert [p["object"] for p in problems] == ["commits/00001.json"] * (words is not None)
        assert words is None or f"it lists the {words}, but has the documents 6 to 11" in problems[0]["what"]


def test_convert_carries_the_plan(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "c", store="zarr")
    assert (tmp_path / "c" / PLAN).read_bytes() == (small / PLAN).read_bytes()
    assert verify_cache(tmp_path / "c").ok


def test_a_worker_of_another_corpus_stops_before_the_teacher_is_loaded(
    small: Path, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    other = tmp_path / corpus.name
    other.write_bytes(corpus.read_bytes() + b"\n")
    with pytest.raises(CorpusError, match=r"texts\.jsonl has a size of"):
        dump(dump_options(teacher, other, small, limit_docs=12, docs_per_shard=6))


def test_a_worker_whose_documents_changed_names_the_shard(
    small: Path, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    copy, other = Path(shutil.copytree(small, tmp_path / "c")), tmp_path / corpus.name
    (copy / "commits/00001.json").unlink()
    (copy / "shards/00001.arrow").unlink()
    lines = corpus.read_bytes().split(b"\n")
    lines[8] = lines[8].replace(b"The fox", b"The fax")
    other.write_bytes(b"\n".join(lines))
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    with pytest.raises(CorpusError, match=r"the documents of shard 1 in .*texts\.jsonl are not those"):
        dump(dump_options(teacher, other, copy, limit_docs=12, docs_per_shard=6))
    (copy / "running/00001.json").unlink()  # which says so, for `kdcache status`
    assert {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()} == before


def test_a_cache_that_no_corpus_made_takes_no_dump(small: Path, teacher: Path, corpus: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "c"))
    forge(copy, b"", plan={})
    (copy / PLAN).unlink()
    assert verify_cache(copy).ok
    with pytest.raises(CacheMismatchError, match="was not made from a corpus"):
        dump(dump_options(teacher, corpus, copy, limit_docs=12, docs_per_shard=6))


@pytest.mark.slow
def test_shards_of_two_plans_do_not_mix(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    """Two caches of one corpus with as many shards, which end elsewhere."""
    one, two, out = (tmp_path / name for name in ("one", "two", "out"))
    dump(dump_options(teacher, corpus, one, limit_docs=12, docs_per_shard=6))
    size, last = 64, 5
    while last == 5 or len(open_cache(two).commits) != 2:
        size = size * 5 // 4
        shutil.rmtree(two, ignore_errors=True)
        dump(dump_options(teacher, corpus, two, limit_docs=12, docs_per_shard=None, chars_per_shard=size))
        found = read_plan(LocalStorage(two), open_cache(two).manifest)
        assert found is not None
        last = int(found.last[0])
    convert(one, out, worker="0/2")
    with pytest.raises(CacheMismatchError, match="shards have other documents"):
        convert(two, out, worker="1/2")
    assert convert(one, out)["complete"] and verify_cache(out).ok
