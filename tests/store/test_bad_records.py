"""Bad records: they are listed as far as a commit has room, once more in a file when the cache is complete, and nothing
of a reason does more than stand there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kdcache import CacheWriter, create_cache, open_cache, verify_cache
from kdcache.convert import convert
from kdcache.errors import ConfigError
from kdcache.report.inspect import inspect_summary
from kdcache.store.bad_records import LISTING, MOST_LISTED, by_plain_reason, fit, plain_reason, require_reason
from kdcache.store.commit import commit_name
from kdcache.store.local import LocalStorage
from kdcache.store.seal import SEAL, unseal
from tests.objects import Bucket, Endpoint
from tests.store.test_cache_writer import LENGTH, RULE, VOCAB, some

DOCUMENTS = 10


def made(path: Path | str, shards: int = 3, documents: int = DOCUMENTS) -> CacheWriter:
    return create_cache(
        path, vocab_size=VOCAB, seq_len=LENGTH, selection=RULE, shards=shards, teacher="t", temperatures=(1.0, 2.0),
        documents=shards * documents,
    )  # fmt: skip


def write(writer: CacheWriter, number: int, bad: int = 2) -> None:
    with writer.shard(number) as shard:
        shard.write(*some(seed=number))
        first = number * DOCUMENTS
        shard.bad_records = [{"document": first + n, "reason": f"refused: é {n}"} for n in reversed(range(bad))]
        shard.dropped_by = {"refused": bad, "too short": 3} if bad else {}
        shard.cut, shard.truncated, shard.eos_labels = 1, number % 4, number


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_they_are_listed_when_the_cache_is_complete_and_not_before(tmp_path: Path) -> None:
    writer = made(tmp_path)
    for number in (2, 0):
        write(writer, number)
        assert not writer.finish()["complete"] and not (tmp_path / LISTING).exists()
    write(writer, 1)
    summary = writer.finish()
    expected: list[dict[str, Any]] = [
        {"document": 10 * s + n, "reason": f"refused: é {n}"} for s in range(3) for n in range(2)
    ]
    assert summary["bad_records"] == expected and (summary["bad"], summary["documents"]) == (6, 30)
    assert summary["dropped"] == {"too short": 9, "refused": 6} and list(summary["dropped"]) == ["too short", "refused"]
    assert (summary["cut"], summary["truncated"], summary["eos_labels"]) == (3, 3, 3)
    assert lines(tmp_path / LISTING) == [{**bad, "shard": bad["document"] // 10} for bad in expected]
    assert verify_cache(tmp_path).ok
    asked = inspect_summary(str(tmp_path))
    assert {name: asked[name] for name in ("dropped", "bad", "bad_records", "cut", "truncated", "eos_labels")} == {
        name: summary[name] for name in ("dropped", "bad", "bad_records", "cut", "truncated", "eos_labels")
    }
    assert inspect_summary(str(tmp_path), 2)["truncated"] == 2


def test_who_comes_later_lists_them_if_the_one_who_sealed_died(tmp_path: Path) -> None:
    writer = made(tmp_path)
    for number in range(3):
        write(writer, number)
    writer.finish()
    listed = (tmp_path / LISTING).read_bytes()
    (tmp_path / LISTING).unlink()
    made(tmp_path).finish()
    assert (tmp_path / LISTING).read_bytes() == listed
    (tmp_path / LISTING).write_text("a person's own notes\n")  # create-only, and nobody reads it
    assert made(tmp_path).finish()["bad"] == 6 and open_cache(tmp_path).commits.total("bad") == 6
    assert (tmp_path / LISTING).read_text() == "a person's own notes\n" and verify_cache(tmp_path).ok


def test_the_list_goes_with_the_seal(tmp_path: Path) -> None:
    writer = made(tmp_path)
    for number in range(3):
        write(writer, number)
    writer.finish()
    (tmp_path / commit_name(1)).unlink()
    for data in (tmp_path / "shards").glob("00001*"):
        data.unlink()
    write(writer, 1, bad=0)
    assert not (tmp_path / SEAL).exists() and not (tmp_path / LISTING).exists()
    assert writer.finish()["bad"] == len(lines(tmp_path / LISTING)) == 4


def test_a_cache_of_good_records_has_no_list(tmp_path: Path) -> None:
    writer = made(tmp_path)
    for number in range(3):
        write(writer, number, bad=0)
    summary = writer.finish()
    assert summary["complete"] and summary["dropped"] == {} and summary["bad_records"] == []
    assert not (tmp_path / LISTING).exists()


@pytest.mark.parametrize("store", ["arrow", "zarr"])
def test_a_conversion_knows_them_too(tmp_path: Path, store: str) -> None:
    writer = made(tmp_path / "a")
    for number in range(3):
        write(writer, number)
    before = writer.finish()
    after = convert(tmp_path / "a", tmp_path / "b", store=store, k=2)
    for name in ("documents", "dropped", "bad", "bad_records", "cut", "truncated", "eos_labels"):
        assert after[name] == before[name]
    assert (tmp_path / "b" / LISTING).read_bytes() == (tmp_path / "a" / LISTING).read_bytes()
    assert verify_cache(tmp_path / "b").ok


def test_a_worker_of_an_unfinished_cache_reads_its_own_commits(bucket: Bucket, endpoint: Endpoint) -> None:
    writer = made(f"{bucket.url}/c", shards=6)
    for number in range(5):
        write(writer, number)
    before = len(endpoint.requests())
    summary = writer.finish([0, 3, 5])
    asked = {path for _, path in endpoint.asked(bucket.url, before) if path.startswith("c/commits/")}
    assert asked == {f"c/{commit_name(number)}" for number in (0, 3)}
    assert summary["shards"] == {"planned": 6, "committed": 5} and not summary["complete"]
    assert (summary["documents"], summary["bad"], summary["truncated"], summary["rows"]) == (20, 4, 3, 2)
    assert writer.finish()["documents"] == 50
    write(writer, 5)
    complete = writer.finish([5])
    assert (complete["complete"], complete["documents"], complete["bad"]) == (True, 60, 12)
    assert bucket.get(f"c/{LISTING}").count(b"\n") == 12
    assert verify_cache(f"{bucket.url}/c").ok


AWKWARD: dict[str, str] = {
    "commas": "a, b, " * 33,
    "quotes": '"\\' * 100,
    "Chinese": "語" * 200,
    "short": "r",
}


@pytest.mark.parametrize("name", AWKWARD)
def test_a_shard_of_any_number_of_any_reasons_can_be_committed(tmp_path: Path, name: str) -> None:
    writer, count = made(tmp_path, shards=1, documents=20_000), 12_000
    with writer.shard(0) as shard:
        shard.write(*some())
        shard.bad_records = [{"document": n, "reason": AWKWARD[name]} for n in range(count)]
        shard.dropped_by = {AWKWARD[name]: count}
    summary, commit = writer.finish(), open_cache(tmp_path).commits[0]
    listed = commit.bad_records
    assert (summary["bad"], summary["bad_records"]) == (count, listed[:1000])
    assert 200 < len(listed) <= MOST_LISTED and (name != "short" or len(listed) == MOST_LISTED)
    assert listed == [{"document": n, "reason": plain_reason(AWKWARD[name])} for n in range(len(listed))]
    assert len(lines(tmp_path / LISTING)) == len(listed) and verify_cache(tmp_path).ok


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.text(max_size=300))
@example("")
@example("\x1b]0;title\x07")
@example("\ud800")
@example("\u202edneirf\u2069")
@example(" \n\t ")
def test_any_text_becomes_a_reason(text: str) -> None:
    reason = plain_reason(text)
    require_reason(reason)
    assert plain_reason(reason) == reason and reason.encode().decode() == reason


BAD: dict[str, tuple[Mapping[str, Any], str]] = {
    "beyond the documents": ({"bad_records": [{"document": 30, "reason": "r"}]}, "bad record 30 is not one of the 30"),
    "twice": ({"bad_records": [{"document": 3, "reason": "r"}] * 2}, "bad record 3 stands after bad record 3"),
    "no reason": ({"bad_records": [{"document": 3}]}, "its fields differ by"),
    "no number": ({"bad_records": [{"document": "3", "reason": "r"}]}, "document is '3'"),
    "no record": ({"bad_records": [3]}, "int"),
    "more than dropped": ({"dropped_by": {"r": 1}}, "2 bad records among 1 dropped"),
    "a reason of text": ({"dropped_by": {"r": "2"}}, "unsupported operand"),
    "below zero": ({"dropped_by": {"r": -2}}, "dropped is -2"),
    "cut too often": ({"cut": 9}, "9 cut and 0 truncated of 10 documents, 2 of them dropped"),
    "cut of text": ({"cut": "many"}, "cut is 'many'"),
    "ends of sequence": ({"eos_labels": 11}, "11 ends of sequence among 9 labels"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_no_reader_would_take_is_not_committed(tmp_path: Path, name: str) -> None:
    writer, (fields, words) = made(tmp_path), BAD[name]
    with pytest.raises(ConfigError, match=f"shard 1 cannot be committed: .*{words}"), writer.shard(1) as shard:
        shard.write(*some())
        shard.dropped_by = {"r": 2}
        shard.bad_records = [{"document": n, "reason": "r"} for n in (12, 11)]
        for field, value in fields.items():
            setattr(shard, field, value)
    assert writer.missing() == [0, 1, 2]


def test_a_writer_without_reasons_says_how_many(tmp_path: Path) -> None:
    writer = made(tmp_path, shards=1)
    with writer.shard(0) as shard:
        shard.write(*some())
        shard.dropped = 4
        assert shard.dropped == 4
    summary = writer.finish()
    assert summary["dropped"] == {"no reason given": 4} and summary["eos_labels"] is None


def test_a_reason_for_each_document_leaves_room_for_the_rest(tmp_path: Path) -> None:
    writer = made(tmp_path, shards=1, documents=20_000)
    with writer.shard(0) as shard:
        shard.write(*some())
        shard.dropped_by = {f"{n}{', ' * 95}": 1 + (n == 17) for n in range(15_000)}
    dropped = writer.finish()["dropped"]
    first, second, *_ = dropped
    assert len(dropped) == 65 and sum(dropped.values()) == 15_001 and first == "other reasons"
    assert second.startswith("17,") and verify_cache(tmp_path).ok


def test_reasons_that_are_alike_when_plain_count_together() -> None:
    long = "x" * 300
    found = fit([{"document": 5, "reason": f"{long}b"}, {"document": 4, "reason": "two\nlines"}])
    assert [bad["reason"] for bad in found] == ["two lines", "x" * 197 + "..."]
    assert by_plain_reason({f"{long}a": 1, f"{long}b": 2, "c": 0}) == {"x" * 197 + "...": 3}


@pytest.fixture
def sealed(tmp_path: Path) -> Iterator[Path]:
    writer = made(tmp_path / "c")
    for number in range(3):
        write(writer, number)
    writer.finish()
    yield tmp_path / "c"


def test_a_copy_without_the_list_is_the_same_cache(sealed: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(sealed, tmp_path / "d", ignore=shutil.ignore_patterns(LISTING)))
    one, two = verify_cache(sealed), verify_cache(copy)
    assert one.ok and two.ok and one.content_sha256 == two.content_sha256
    unseal(LocalStorage(copy))
    assert dict(open_cache(copy).commits) == dict(open_cache(sealed).commits)
