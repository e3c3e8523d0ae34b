"""Files of a corpus: whatever they are packed in and wherever they lie, their documents are the same."""

from __future__ import annotations

import bz2
import functools
import gzip
import http.server
import json
import lzma
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from kdcache.corpus.find_files import find_files
from kdcache.corpus.json_records import parse_record, value_spans
from kdcache.corpus.open_source import Source, open_source
from kdcache.corpus.records import Unreadable
from kdcache.corpus.sources import Corpus, open_corpus
from kdcache.corpus.survey import Survey, survey
from kdcache.corpus.text_files import TextFiles
from kdcache.errors import ConfigError, CorpusError
from tests.objects import Bucket, Endpoint

TEXTS = [f'Text {n}, \\ {"länger"[: n % 7]} \n {{[🦆]" {"x" * (n * n % 97)}' for n in range(120)]


def zstd(data: bytes) -> bytes:
    """In two frames, as the tools write that use all cores."""
    sink = pa.BufferOutputStream()
    for half in (data[: len(data) // 2], data[len(data) // 2 :]):
        with pa.CompressedOutputStream(pa.PythonFile(written := _Sink(), mode="w"), "zstd") as stream:
            stream.write(half)
        sink.write(written.data)
    return sink.getvalue().to_pybytes()


class _Sink:
    def __init__(self) -> None:
        self.data, self.closed = b"", False

    def write(self, data: Any) -> int:
        self.data += bytes(data)
        return len(data)

    def flush(self) -> None: ...

    def close(self) -> None: ...


def gzip_members(data: bytes) -> bytes:
    return b"".join(gzip.compress(data[at : at + 999]) for at in range(0, len(data), 999))


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip_members,
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def as_lines(records: list[Any]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=n % 2 == 0) + "\n" for n, record in enumerate(records)).encode()


def as_arrow(texts: list[str], file: bool) -> bytes:
    table, sink = pa.table({"n": range(len(texts)), "text": texts}), pa.BufferOutputStream()
    with (pa.ipc.new_file if file else pa.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=17)
    return sink.getvalue().to_pybytes()


def as_parquet(texts: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.table({"n": range(len(texts)), "text": texts}), sink, row_group_size=29)
    return sink.getvalue().to_pybytes()


RECORDS = [{"text": text, "n": n} for n, text in enumerate(TEXTS)]
CONTENT = {
    ".jsonl": as_lines(RECORDS),
    ".ndjson": as_lines(RECORDS),
    ".json": json.dumps(RECORDS).encode(),
    ".arrow": as_arrow(TEXTS, True),
}


def plan_of(spec: str, **options: Any) -> Survey:
    return survey(open_corpus(spec), {"chars_per_shard": 900}, **options)


def everything(corpus: Corpus) -> list[Any]:
    return [corpus.document(record) for part in corpus.parts() for record in corpus.read(part)[0]]


def by_shards(corpus: Corpus, found: Survey, order: list[int]) -> dict[int, list[Any]]:
    parts = {shard: [records for _, _, records, _ in corpus.read_shard(found.plan, shard)] for shard in order}
    return {shard: [corpus.document(each) for records in read for each in records] for shard, read in parts.items()}


@pytest.fixture(scope="module")
def wanted(tmp_path_factory: pytest.TempPathFactory) -> Survey:
    """What a survey of JSON lines finds."""
    path = tmp_path_factory.mktemp("wanted") / "c.jsonl"
    path.write_bytes(CONTENT[".jsonl"])
    return plan_of(str(path))


@pytest.mark.parametrize("suffix", CONTENT)
@pytest.mark.parametrize("packed", COMPRESS)
def test_compression_and_suffix_change_no_document(
    tmp_path: Path, wanted: Survey, suffix: str, packed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in small steps, from start to end and shard by shard in any order."""
    monkeypatch.setattr(TextFiles, "step", 700)
    monkeypatch.setattr("kdcache.corpus.text_files._WINDOW", 100)
    monkeypatch.setattr("kdcache.corpus.file_bytes._BLOCK", 512)
    path = tmp_path / f"C{suffix}{packed}".upper()
    path.write_bytes(COMPRESS[packed](CONTENT[suffix]))
    found = plan_of(str(path), processes=1)
    assert found.corpus_sha256 == wanted.corpus_sha256
    assert found.plan.sha256.tobytes() == wanted.plan.sha256.tobytes()
    assert [file.size for file in found.plan.files] == [path.stat().st_size]
    if suffix in (".jsonl", ".ndjson"):  # addresses are those of the text, whatever it is packed in
        assert found.plan.offset.tolist() == wanted.plan.offset.tolist()
    order = random.Random(0).sample(range(len(found.plan)), len(found.plan))
    shards = by_shards(open_corpus(str(path)), found, order)
    assert [text for shard in range(len(order)) for text in shards[shard]] == TEXTS


@pytest.mark.parametrize("packed", COMPRESS)
def test_text_by_paragraph_line_and_file(tmp_path: Path, packed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextFiles, "step", 7)
    monkeypatch.setattr("kdcache.corpus.text_files._WINDOW", 5)
    text = "\ufeffone\ntwo\n\n\n  \nthree\r\n\r\nfour  \n"
    (tmp_path / f"t.txt{packed}").write_bytes(COMPRESS[packed](text.encode()))
    for split, documents in (
        ("paragraph", ["one\ntwo", "three", "four  "]),
        ("line", ["one", "two", "three", "four  "]),
        ("file", ["one\ntwo\n\n\n  \nthree\n\nfour  \n"]),
    ):
        assert everything(open_corpus(str(tmp_path / f"t.txt{packed}"), split_text=split)) == documents


def test_processes_share_compressed_files_and_change_nothing(tmp_path: Path, wanted: Survey) -> None:
    for n in range(4):
        packed = list(COMPRESS)[n]
        (tmp_path / f"{n}.jsonl{packed}").write_bytes(COMPRESS[packed](as_lines(RECORDS[30 * n : 30 * n + 30])))
    (tmp_path / "4.json").write_bytes(b" [ ] ")
    alone, both = (plan_of(str(tmp_path), processes=n) for n in (1, 2))
    assert both.plan == alone.plan and both.corpus_sha256 == alone.corpus_sha256 == wanted.corpus_sha256
    assert [file.name for file in both.plan.files] == ["0.jsonl", "1.jsonl.gz", "2.jsonl.zst", "3.jsonl.bz2", "4.json"]


@pytest.mark.parametrize("packed", COMPRESS)
@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (CONTENT[".jsonl"], "records"),
        (b" [ " + CONTENT[".json"][1:], "records"),
        (CONTENT[".arrow"], "arrow"),
        (as_arrow(TEXTS, False), "arrow"),
        ("\ufeff[Chapter 1]\n\nÜber".encode(), "text"),
    ],
    ids=["lines", "array", "file", "stream", "text"],
)
def test_a_file_without_a_suffix_is_looked_at(
    tmp_path: Path, wanted: Survey, packed: str, data: bytes, kind: str
) -> None:
    (tmp_path / "part-00000").write_bytes(COMPRESS[packed](data))
    assert [file.kind for file in find_files(str(tmp_path))] == [kind]
    if kind == "text":
        assert everything(open_corpus(str(tmp_path))) == ["[Chapter 1]", "Über"]
    else:
        assert plan_of(str(tmp_path / "part-*")).corpus_sha256 == wanted.corpus_sha256


def test_parquet_without_a_suffix(tmp_path: Path, wanted: Survey) -> None:
    (tmp_path / "data").write_bytes(as_parquet(TEXTS))
    assert plan_of(str(tmp_path / "data")).corpus_sha256 == wanted.corpus_sha256


def test_a_folder_is_its_data_and_nothing_else(tmp_path: Path) -> None:
    for name in (
        "a.jsonl", "deep/er/b.JSONL", "deep/c.ndjson", "README.md", "LICENSE", "readme.txt", "dataset_infos.json",
        ".d.jsonl", ".cache/e.jsonl", "_SUCCESS", "_tmp/f.jsonl", "empty.jsonl", "notes.pdf", "bare",
    ):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("" if name == "empty.jsonl" else json.dumps({"text": name}) + "\n")
    read = ["a.jsonl", "deep/c.ndjson", "deep/er/b.JSONL"]
    for spec in (tmp_path, f"{tmp_path}/", f"{tmp_path}/**", f"file://{tmp_path}", f"{tmp_path}/**/*.*"):
        corpus = open_corpus(str(spec))
        assert [file.name for file in corpus.files] == read
        assert everything(corpus) == read
    assert everything(open_corpus(str(tmp_path / "bare"))) == ["bare"]
    assert everything(open_corpus(str(tmp_path / ".d.jsonl"))) == [".d.jsonl"]  # named by itself


@pytest.mark.parametrize(
    ("names", "spec", "words"),
    [
        (
            ["a.txt", "b.parquet"],
            "",
            r"several kinds, .*a\.txt \(text\) and .*b\.parquet \(parquet\); name those .*/\*\*/",
        ),
        (["train-0.jsonl", "test-0.jsonl"], "", r"several splits, .*train-0\.jsonl and .*test-0\.jsonl; name those to"),
        (["data/train/0.jsonl", "data/validation/0.jsonl"], "", "several splits"),
        (["x.csv", "y.csv"], "", r"must be files of one kind of \.txt.*; it has \.csv"),
        (["x.jsonl.lz4"], "x.jsonl.lz4", r"it has \.lz4"),
        (["x.parquet.gz"], "x.parquet.gz", "is Parquet inside gzip; decompress it first"),
        (["README.md"], "", "holds no files of data"),
        (["gone/README.md"], "none", "does not exist"),
        ([".x.jsonl"], "*", "does not exist"),
    ],
)
def test_what_is_no_corpus_is_refused_by_name(tmp_path: Path, names: list[str], spec: str, words: str) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"text": "a"}\n')
    with pytest.raises(CorpusError, match=words) as caught:
        open_corpus(str(tmp_path / spec))
    assert "\n" not in str(caught.value)


def test_a_glob_takes_one_split(tmp_path: Path) -> None:
    for name in ("train-0.jsonl", "test-0.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    assert everything(open_corpus(f"{tmp_path}/**/train-*")) == ["train-0.jsonl"]


@pytest.mark.parametrize("packed", [".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("fault", ["short", "flipped", "plain"])
def test_a_damaged_file_is_named(tmp_path: Path, packed: str, fault: str) -> None:
    data = COMPRESS[packed](CONTENT[".jsonl"])
    middle = len(data) // 2
    damaged = {
        "short": data[:middle],
        "flipped": data[:middle] + bytes(255 - byte for byte in data[middle : middle + 9]) + data[middle + 9 :],
        "plain": CONTENT[".jsonl"],
    }[fault]
    (tmp_path / f"c.jsonl{packed}").write_bytes(damaged)
    with pytest.raises(CorpusError, match=rf"c\.jsonl\{packed} cannot be read as") as caught:
        plan_of(str(tmp_path / f"c.jsonl{packed}"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["c.parquet", "c.arrow", "c.arrow.gz"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.97])
def test_a_damaged_table_is_named(tmp_path: Path, name: str, kept: float) -> None:
    data = as_parquet(TEXTS) if name == "c.parquet" else CONTENT[".arrow"]
    for path, content in (("a" + name[1:], data), ("b" + name[1:], data[: int(len(data) * kept)])):
        (tmp_path / path).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    if name == "c.arrow.gz" and kept > 0.9:  # only its footer is missing, which a stream does without
        assert everything(open_corpus(str(tmp_path))) == 2 * TEXTS
        return
    with pytest.raises(CorpusError, match=rf"b\{name[1:]} cannot be read") as caught:
        plan_of(str(tmp_path))
    assert "\n" not in str(caught.value)


UNEQUAL = [
    {"text": "a", "n": 1},
    {"m": {"x": [1, {"y": "]}"}]}, "text": "b"},
    {"text": "c", "n": "one"},
    {"text": 'd"\\'},
]


@pytest.mark.parametrize(
    "data",
    [
        json.dumps(UNEQUAL),
        json.dumps(UNEQUAL, indent=2),
        "\ufeff\n" + json.dumps(UNEQUAL, separators=(",\r\n", ":")),
        "[" + "\n,".join(json.dumps(record) for record in UNEQUAL) + "]",
        "\n".join(json.dumps(record, indent=1) for record in UNEQUAL),
        "".join(json.dumps(record) for record in UNEQUAL),
        "\n".join(json.dumps(record) for record in UNEQUAL),
    ],
    ids=["array", "indented", "returns", "lines-in-array", "indented-values", "values", "lines"],
)
def test_json_files_of_unequal_records(tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.json").write_text(data, encoding="utf-8")
    for step in (1, 5, 50, 1 << 20):
        monkeypatch.setattr(TextFiles, "step", step)
        corpus = open_corpus(str(tmp_path / "c.json"))
        assert everything(corpus) == ["a", "b", "c", 'd"\\']
        found = survey(corpus, {"docs_per_shard": 1})
        assert by_shards(corpus, found, [2, 0, 3]) == {2: ["c"], 0: ["a"], 3: ['d"\\']}


def test_json_lines_that_are_an_array_are_read_as_one(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps(UNEQUAL, indent=2))
    assert everything(open_corpus(str(tmp_path / "c.jsonl"))) == ["a", "b", "c", 'd"\\']


def test_values_are_found_however_the_text_is_cut() -> None:
    """What a cut gives as whole is what the whole gives, and the next value begins behind it."""
    data = json.dumps(UNEQUAL, indent=1).encode()[1:]
    whole = [json.loads(data[a:b]) for a, b in value_spans(data, True)]
    assert whole == UNEQUAL
    for cut in range(len(data)):
        spans = value_spans(data[:cut], False)
        behind = spans[-1][1] if spans else 0
        rest = [(behind + a, behind + b) for a, b in value_spans(data[behind:], True)]
        assert [json.loads(data[a:b]) for a, b in spans + rest] == UNEQUAL


def reasons(source: Source) -> list[str]:
    source.choose(("text",))
    records, _ = source.read(0, source.begin(0), source.cut(0, source.begin(0)))
    return [re.split(": ", r.reason)[0] if isinstance(r, Unreadable) else r["text"] for r in records]  # type: ignore[index]


def test_a_bad_value_of_an_array_refuses_no_other(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_bytes(
        b'[{"text": "a"}, 3, "x,]", [{"text": "no"}], {"text": }, {"text": "\xff"}, {"text": "b"}] 4'
    )
    found = reasons(open_source(str(tmp_path / "c.json"), "train", "paragraph")[0])
    assert found == ["a", "not JSON", "not an object", "not JSON", "not UTF-8", "b", "not an object"]


def test_another_column_refuses_no_text(tmp_path: Path) -> None:
    lines = [
        b'{"text": "a", "other": "\\ud800"}', b'{"text": "b", "other": ' + b"9" * 5000 + b"}",
        b'{"text": "c", "other": NaN}',
        b'{"other": [1, {"x": 2}], "text": "d"}', b'{"text": "e", "\\udc00": 1}',
        b'{"text": "\\ud83e\\udd86", "o": "\\udfff"}',
        b'{"text": "\\ud800"}', b'{"text": "f", "other": "\xff"}', b'{"text": "g"', b'["text"]', b'{"text": "h"}',
    ]  # fmt: skip
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines))
    source, _ = open_source(str(tmp_path / "c.jsonl"), "train", "paragraph")
    assert reasons(source) == [
        "a", "b", "c", "d", "e", "🦆", "lone surrogate", "not UTF-8", "not JSON", "not an object", "h"
    ]  # fmt: skip
    records, addresses = source.read(0, 0, source.cut(0, 0))
    bad = next(n for n, record in enumerate(records) if isinstance(record, Unreadable))
    assert isinstance(records[bad], Unreadable) and records[bad].data == lines[bad]  # type: ignore[union-attr]
    assert records[bad].reason == f"lone surrogate: byte {addresses[bad]} of c.jsonl, column 'text'"  # type: ignore[union-attr]


def test_a_number_that_is_too_long_is_no_text() -> None:
    found = parse_record(b'{"text": ' + b"9" * 5000 + b"}", ("text",), "here")
    assert found == {"text": float("inf")}


def test_text_that_is_not_utf_8_refuses_no_other(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes("one\n\nzwölf".encode("latin-1") + b"\n\nthree")
    source, _ = open_source(str(tmp_path / "c.txt"), "train", "paragraph")
    records, addresses = source.read(0, 0, source.cut(0, 0))
    assert records == ["one", Unreadable(b"zw\xf6lf", "not UTF-8: byte 5 of c.txt, invalid start byte"), "three"]
    assert list(addresses) == [0, 5, 12]
    (tmp_path / "w.txt").write_text("one", encoding="utf-16")
    with pytest.raises(CorpusError, match=r"w\.txt is UTF-16 or UTF-32, not UTF-8"):
        plan_of(str(tmp_path / "w.txt"))


class TestTables:
    def bad(self) -> pa.Table:
        """A table whose row 1 is not UTF-8, and whose other column is nothing at all."""
        data = pa.array([b"a", b"\xff", b"c", None], pa.binary())
        text = pa.StringArray.from_buffers(4, *data.buffers()[1:3], data.buffers()[0], 1)
        return pa.table({"other": pa.array([b"\xff" * 9] * 4, pa.binary()), "text": text})

    @pytest.mark.parametrize("form", ["parquet", "arrow", "arrow.gz", "saved"])
    def test_a_row_that_is_not_utf_8_refuses_no_other(self, tmp_path: Path, form: str) -> None:
        path, table = tmp_path / f"c.{form}", self.bad()
        if form == "parquet":
            parquet.write_table(table, path)
        elif form == "saved":
            import datasets

            datasets.Dataset(table).save_to_disk(str(path))
        else:
            sink = pa.BufferOutputStream()
            with pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)
            path.write_bytes((gzip.compress if form == "arrow.gz" else bytes)(sink.getvalue().to_pybytes()))
        source, names = open_source(str(path), "train", "paragraph")
        assert names == ["other", "text"] and source.fills_nulls
        source.choose(("text",))
        records, addresses = source.read(0, 0, source.cut(0, 0))
        assert list(addresses) == [0, 1, 2, 3]
        assert [records[n] for n in (0, 2, 3)] == [{"text": "a"}, {"text": "c"}, {}]
        assert isinstance(records[1], Unreadable) and records[1].data
        assert re.fullmatch(r"not UTF-8: row 1 of c\S+, column 'text', .*", records[1].reason)

    @pytest.mark.parametrize("form", ["parquet", "arrow", "arrow.xz"])
    def test_a_file_may_lack_a_column(self, tmp_path: Path, form: str) -> None:
        for name, table in (("a", {"text": ["x"], "n": [1]}), ("b", {"n": [2, 3]}), ("c", {"text": ["y"]})):
            if form == "parquet":
                parquet.write_table(pa.table(table), tmp_path / f"{name}.parquet")
                continue
            with pa.ipc.new_file(sink := pa.BufferOutputStream(), pa.table(table).schema) as writer:
                writer.write_table(pa.table(table))
            packed = COMPRESS[".xz"] if form.endswith("xz") else bytes
            (tmp_path / f"{name}.{form}").write_bytes(packed(sink.getvalue().to_pybytes()))
        assert everything(open_corpus(str(tmp_path))) == ["x", None, None, "y"]

    def test_reads_that_go_forward_read_a_row_group_once(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "c.parquet").write_bytes(as_parquet(TEXTS))
        monkeypatch.setattr("kdcache.corpus.tables._BATCH", 5)
        asked: list[int] = []
        iterate = parquet.ParquetFile.iter_batches

        def note(self: Any, *values: Any, row_groups: list[int], **options: Any) -> Any:
            asked.extend(row_groups)
            return iterate(self, *values, row_groups=row_groups, **options)

        monkeypatch.setattr(parquet.ParquetFile, "iter_batches", note)
        corpus = open_corpus(str(tmp_path / "c.parquet"))
        assert everything(corpus) == TEXTS
        assert asked == [0, 1, 2, 3, 4]
        assert [part[2] for part in corpus.parts(units=True)] == [29, 58, 87, 116, 120]
        source, _ = open_source(str(tmp_path / "c.parquet"), "train", "paragraph")
        source.choose(("text",))
        for start, stop in ((100, 119), (3, 4), (4, 60), (20, 21), (118, 120), (0, 120)):
            assert source.read(0, start, stop)[0] == [{"text": text} for text in TEXTS[start:stop]]


@pytest.mark.parametrize("name", ["c.jsonl", "c.jsonl.gz", "c.json", "c.parquet", "c.arrow", "c.txt.zst"])
def test_an_object_store_is_read_like_a_disk(bucket: Bucket, endpoint: Endpoint, name: str, wanted: Survey) -> None:
    """A small file is one request beside its listing; a survey by processes asks for no more than each part."""
    texts = [text.replace("\n", " ") for text in TEXTS]
    data = {
        "c.parquet": as_parquet(TEXTS),
        "c.txt.zst": zstd("\n\n".join(texts).encode()),
        "c.jsonl.gz": gzip.compress(CONTENT[".jsonl"]),
    }.get(name) or CONTENT[name[1:]]
    bucket.put(f"data/{name}", data)
    bucket.put("data/README.md", b"not data")
    bucket.put("data/_SUCCESS", b"")
    for spec in (f"{bucket.url}/data/{name}", f"{bucket.url}/data", f"{bucket.url}/**/{name[:3]}*"):
        since = len(endpoint.requests())
        corpus = open_corpus(spec)
        assert [file.name for file in corpus.files] == [name]
        found = survey(corpus, {"chars_per_shard": 900}, processes=1)
        assert everything(open_corpus(spec)) == (texts if ".txt" in name else TEXTS)
        gets = [path for method, path in endpoint.asked(bucket.url, since) if method == "GET" and path.endswith(name)]
        assert len(gets) <= (14 if name == "c.parquet" else 2)
    if ".txt" not in name:
        assert found.corpus_sha256 == wanted.corpus_sha256
    if name == "c.jsonl.gz":
        assert survey(corpus, {"chars_per_shard": 900}, processes=2).plan == found.plan


def test_an_object_that_changes_or_goes_is_named(bucket: Bucket) -> None:
    bucket.put("c.jsonl", CONTENT[".jsonl"])
    corpus = open_corpus(f"{bucket.url}/c.jsonl")
    corpus._source._open = None  # type: ignore[attr-defined] - what it has kept of the first look
    bucket.put("c.jsonl", CONTENT[".jsonl"][:500])
    with pytest.raises(CorpusError, match=r"s3://\S+/c\.jsonl ends before byte"):
        everything(corpus)
    bucket.delete("c.jsonl")
    with pytest.raises(CorpusError, match=r"c\.jsonl does not exist"):
        open_corpus(f"{bucket.url}/c.jsonl")
    with pytest.raises(CorpusError, match="does not exist"):
        open_corpus(f"{bucket.url}/nothing/*.jsonl")


def test_large_objects_are_read_in_large_requests(bucket: Bucket, endpoint: Endpoint) -> None:
    data = as_lines([{"text": "word " * 2000}] * 1500)
    bucket.put("c.jsonl", data)
    bucket.put("p.jsonl.gz", gzip.compress(data, 0))
    for name in ("c.jsonl", "p.jsonl.gz"):
        corpus = open_corpus(f"{bucket.url}/{name}")
        since = len(endpoint.requests())
        assert survey(corpus, {"docs_per_shard": 100}, processes=1).plan.documents == 1500
        asked = [path for method, path in endpoint.asked(bucket.url, since) if method == "GET" and path == name]
        assert len(asked) <= len(data) / 4e6


class _Whole(http.server.SimpleHTTPRequestHandler):
    """Serves files whole, whatever range is asked for."""

    def log_message(self, *values: Any) -> None: ...


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Whole, directory=str(tmp_path)))
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    thread.join()
    made.server_close()


def test_a_server_without_ranges_is_refused(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small.jsonl").write_bytes(CONTENT[".jsonl"])
    assert everything(open_corpus(f"{server}/small.jsonl")) == TEXTS  # one request gives all of it
    monkeypatch.setattr("kdcache.corpus.file_bytes._BLOCK", 100)
    monkeypatch.setattr("kdcache.corpus.text_files._SNIFFED", 100)
    with pytest.raises(CorpusError, match="gives no ranges of files; download it first"):
        everything(open_corpus(f"{server}/small.jsonl"))
    with pytest.raises(CorpusError, match="does not exist"):
        open_corpus(f"{server}/gone.jsonl")


def test_a_url_of_another_place(tmp_path: Path) -> None:
    import fsspec

    fsspec.filesystem("memory").pipe_file("/kdcache-files/a/b.jsonl", CONTENT[".jsonl"])
    for spec in ("memory://kdcache-files", "memory://kdcache-files/*/*.jsonl", "memory://kdcache-files/a/b.jsonl"):
        assert everything(open_corpus(spec)) == TEXTS
    with pytest.raises((CorpusError, ConfigError), match="nowhere"):
        open_corpus("nowhere://a/b.jsonl")


def test_a_hub_data_set_of_plain_files_is_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of unequal keys and types are no reason to refuse it, and nothing is copied."""
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("it makes a copy of the whole"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.jsonl.gz").write_bytes(gzip.compress(as_lines(UNEQUAL)))
    (tmp_path / "data" / "test-0.jsonl").write_bytes(as_lines([{"text": "t"}]))
    corpus = open_corpus(f"hf:{tmp_path}")
    assert everything(corpus) == ["a", "b", "c", 'd"\\']
    assert [file.name for file in corpus.files] == ["train-0.jsonl.gz"]
    assert everything(open_corpus(f"hf:{tmp_path}", split="test")) == ["t"]


def test_a_hub_data_set_of_other_files_is_prepared(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text\na\nb\n")
    assert everything(open_corpus(f"hf:{tmp_path}")) == ["a", "b"]


READ_HUB = """
import json, sys
from kdcache.corpus.sources import open_corpus
corpus = open_corpus("hf:me/stories")
texts = [record["text"] for part in corpus.parts() for record in corpus.read(part)[0]]
sys.stdout.write(json.dumps([[file.name for file in corpus.files], texts]))
"""


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_data_set_of_the_hub_is_read_by_range(tmp_path: Path, form: str) -> None:
    """By the hub's own client, which takes the address of its server from the environment."""
    (tmp_path / "hub" / "data").mkdir(parents=True)
    if form == "jsonl":
        files = {"train-0.jsonl.gz": gzip.compress(as_lines(RECORDS[:60])), "train-1.jsonl": as_lines(RECORDS[60:])}
    else:
        files = {"train-0.parquet": as_parquet(TEXTS[:60]), "train-1.parquet": as_parquet(TEXTS[60:])}
    for name, data in {**files, f"test-0.{form}": next(iter(files.values()))}.items():
        (tmp_path / "hub" / "data" / name).write_bytes(data)
    (tmp_path / "hub" / "README.md").write_text("# Stories\n")
    log = tmp_path / "log"
    with log.open("w") as out:
        hub = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("hub.py")), str(tmp_path / "hub")], stdout=out
        )
    try:
        deadline = time.monotonic() + 300
        while not log.read_text().endswith("\n"):
            assert hub.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        url = log.read_text().split()[0]
        environment = {**os.environ, "HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-W", "error::ResourceWarning", "-c", READ_HUB]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    finally:
        hub.terminate()
        hub.wait(timeout=300)
    assert json.loads(done.stdout) == [list(files), TEXTS]
    given = [line.split()[0] for line in log.read_text().splitlines()[1:]]
    assert set(given) == {f"data/{name}" for name in files}
    assert len(given) <= (2 if form == "jsonl" else 14)
    assert not list((tmp_path / "home").rglob(f"*.{form}*"))
