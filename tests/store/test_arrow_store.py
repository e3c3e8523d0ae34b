"""Arrow shards: bytes that depend on the rows alone, and readers that check."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from kdcache import Selection, SparseTargets, open_cache, select, verify_cache
from kdcache.codec.plain import PlainCodec
from kdcache.codec.streams import deflate
from kdcache.errors import CorruptCacheError
from kdcache.rows import PackedRow
from kdcache.store.arrow_store import _BYTES, _SCHEMA, ArrowShard, ArrowShardWriter, row_crc

CODEC = PlainCodec(kind="topk", width=3, vocab_size=50, temperatures=(1.0,))


def some_rows(count: int) -> list[tuple[PackedRow, SparseTargets]]:
    random = np.random.default_rng(0)
    found = []
    for i in range(count):
        row = PackedRow(
            tokens=random.integers(0, 50, 10, np.int32),
            piece_lengths=np.array([4, 6], np.int32),
            piece_documents=np.array([2 * i, 2 * i + 1], np.int64),
            supervised=random.random(10) < 0.7 if i % 2 else None,
        )
        n = int((row.labels(12) != -100).sum())
        torch.manual_seed(i)
        found.append((row, select(torch.randn(n, 50), Selection(k=3), labels=torch.zeros(n, dtype=torch.long))))
    return found


def write(folder: Path, rows: list[tuple[PackedRow, SparseTargets]]) -> dict[str, object]:
    with ArrowShardWriter(folder, 7, CODEC, 12) as writer:
        for row, targets in rows:
            writer.write(row, targets)
        return writer.publish()[0]


@pytest.mark.parametrize("count", [0, 1, 16, 37])
def test_rows_come_back_in_any_order(tmp_path: Path, count: int) -> None:
    rows = some_rows(count)
    data = write(tmp_path, rows)
    assert data["name"] == "shards/00007.arrow"
    shard = ArrowShard(tmp_path / "shards/00007.arrow", 7, CODEC, 12, count)
    for i in np.random.default_rng(1).permutation(count):
        row, targets = shard.read(int(i))
        assert row.tokens.tolist() == rows[i][0].tokens.tolist()
        assert row.piece_documents.tolist() == rows[i][0].piece_documents.tolist()
        expected = rows[i][0].supervised
        assert (row.supervised is None) if expected is None else row.supervised.tolist() == expected.tolist()
        assert torch.equal(targets.logprobs, rows[i][1].logprobs)


def test_the_same_rows_are_the_same_bytes(tmp_path: Path) -> None:
    one, two = write(tmp_path / "a", some_rows(20)), write(tmp_path / "b", some_rows(20))
    assert one == two
    assert (tmp_path / "a/shards/00007.arrow").read_bytes() == (tmp_path / "b/shards/00007.arrow").read_bytes()


def test_a_leftover_without_a_commit_stays_if_sound_and_goes_if_damaged(tmp_path: Path) -> None:
    rows = some_rows(20)
    first = write(tmp_path, rows)
    path = tmp_path / "shards/00007.arrow"
    assert write(tmp_path, rows) == first
    # Written on other hardware: the same tokens, slightly different values.
    path.unlink()
    other = [
        (
            row,
            select(torch.randn(len(old.count), 50), Selection(k=3), labels=old.ids[:, 0]),
        )  # other values, same tokens
        for row, old in rows
    ]
    theirs = write(tmp_path, other)
    assert write(tmp_path, rows) == theirs != first
    path.write_bytes(path.read_bytes()[:-100])
    assert write(tmp_path, rows) == first


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), ArrowShardWriter(tmp_path, 7, CODEC, 12) as writer:
        writer.write(*some_rows(1)[0])
        raise RuntimeError
    assert list((tmp_path / "shards").iterdir()) == []


def test_any_row_of_a_cache_reads_the_same_in_any_order(cache: Path) -> None:
    opened = open_cache(cache)
    first = [row.tokens.tolist() for row in opened]
    assert [opened[int(i)].tokens.tolist() == first[i] for i in torch.randperm(len(first))] == [True] * len(first)
    assert opened[-1].tokens.tolist() == first[-1]
    with pytest.raises(IndexError):
        opened[len(first)]


def lie_about(**columns: object) -> pa.RecordBatch:
    row, targets = some_rows(1)[0]
    honest = {
        "tokens": deflate(row.tokens.astype("<u2")),
        "piece_lengths": row.piece_lengths.astype("<i4").tobytes(),
        "piece_documents": row.piece_documents.astype("<i8").tobytes(),
        "supervised": b"",
        "positions": len(targets.count),
        **CODEC.encode(targets),
    }
    record = {**honest, **columns}
    data = [record[name] or b"" for name in _BYTES]
    record["crc32c"] = row_crc(7, 0, record["positions"], data)  # a liar seals its lies
    return pa.RecordBatch.from_pylist([record], schema=_SCHEMA)


def store(path: Path, batch: pa.RecordBatch) -> Path:
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(batch)
    return path


@pytest.mark.parametrize(
    "lie",
    [
        {"tokens": deflate(np.full(10, 50, "<u2"))},
        {"tokens": np.zeros(10, "<u2").tobytes()},
        {"tokens": b""},
        {"tokens": b"123"},
        {"tokens": deflate(np.zeros(13, "<u2"))},
        {"tokens": None},
        {"piece_lengths": np.array([4, 7], "<i4").tobytes()},
        {"piece_lengths": np.array([-4, 14], "<i4").tobytes()},
        {"piece_lengths": np.array([10], "<i4").tobytes()},
        {"piece_documents": b""},
        {"supervised": b"1"},
        {"supervised": b"123"},
        {"positions": 7},
        {"ids": b""},
        {"ids": np.full((8, 3), 50, "<u2").tobytes()},
        {"values": b"1234"},
        {"scalars": b"1234"},
    ],
    ids=lambda lie: next(iter(lie)),
)
def test_a_shard_that_lies_is_refused(tmp_path: Path, lie: dict[str, object]) -> None:
    path = store(tmp_path / "s.arrow", lie_about(**lie))
    with pytest.raises(CorruptCacheError, match="row 0"):
        ArrowShard(path, 7, CODEC, 12, 1).read(0)


def test_an_honest_shard_of_the_same_making_is_read(tmp_path: Path) -> None:
    assert ArrowShard(store(tmp_path / "s.arrow", lie_about()), 7, CODEC, 12, 1).read(0)[0].tokens.size == 10


@pytest.mark.parametrize("change", ["bit", "row", "shard"])
def test_a_row_knows_its_bytes_its_number_and_its_shard(tmp_path: Path, change: str) -> None:
    write(tmp_path, some_rows(20))
    path = tmp_path / "shards/00007.arrow"
    number, row = (8 if change == "shard" else 7), 0
    if change == "bit":
        ids = CODEC.encode(some_rows(1)[0][1])["ids"]
        data = path.read_bytes()
        at = data.index(ids)
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    elif change == "row":
        batch = pa.ipc.open_file(str(path)).get_batch(0)
        swapped = batch.take(pa.array([1, 0, *range(2, 16)]))
        rest = pa.ipc.open_file(str(path)).get_batch(1)
        path = tmp_path / "swapped.arrow"
        with pa.ipc.new_file(str(path), batch.schema) as writer:
            writer.write_batch(swapped)
            writer.write_batch(rest)
    with pytest.raises(CorruptCacheError, match=r"row 0: its crc32c does not match"):
        ArrowShard(path, number, CODEC, 12, 20).read(row)


def test_files_that_are_not_the_shard(tmp_path: Path) -> None:
    good = store(tmp_path / "s.arrow", lie_about())
    with pytest.raises(CorruptCacheError, match="not a shard of 40 rows"):
        ArrowShard(good, 7, CODEC, 12, 40)
    (tmp_path / "junk").write_bytes(b"junk")
    with pytest.raises(CorruptCacheError, match="cannot be read as a shard"):
        ArrowShard(tmp_path / "junk", 7, CODEC, 12, 1)
    other = store(tmp_path / "o.arrow", pa.RecordBatch.from_pydict({"tokens": [b"1"]}))
    with pytest.raises(CorruptCacheError, match="not a shard"):
        ArrowShard(other, 7, CODEC, 12, 1)


def test_verify_finds_every_kind_of_damage(cache: Path, tmp_path: Path) -> None:
    assert verify_cache(cache).ok
    broken = tmp_path / "c"
    shutil.copytree(cache, broken)
    flip(broken / "shards/00000.arrow")
    (broken / "shards/00001.arrow").unlink()
    flip(broken / "commits/00002.json")
    flip(broken / "tokenizer/tokenizer.json")
    (broken / "commits/00003.json").unlink()
    report = verify_cache(broken)
    assert {(p["shard"], p["object"]) for p in report.problems} == {
        (0, "shards/00000.arrow"), (1, "shards/00001.arrow"), (2, "commits/00002.json"),
        (None, "tokenizer/tokenizer.json"), (3, "commits/00003.json"),
    }  # fmt: skip


def test_verify_notices_swapped_shards(cache: Path, tmp_path: Path) -> None:
    broken = tmp_path / "c"
    shutil.copytree(cache, broken)
    one, two = broken / "shards/00000.arrow", broken / "shards/00001.arrow"
    one.rename(tmp_path / "t")
    two.rename(one)
    (tmp_path / "t").rename(two)
    assert {p["shard"] for p in verify_cache(broken).problems} == {0, 1}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
