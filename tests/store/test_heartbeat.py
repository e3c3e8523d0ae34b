"""Heartbeats: there while a shard is made, gone when it is committed, harmless whatever becomes of them."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from kdcache import CacheWriter, open_cache, verify_cache
from kdcache.convert import convert
from kdcache.errors import ConfigError, CorruptCacheError, IncompleteCacheError
from kdcache.store.commit import commit_name
from kdcache.store.heartbeat import MOST_BYTES, Heartbeat, heartbeat_name
from kdcache.store.open_storage import open_storage
from kdcache.store.sealed_json import seal
from kdcache.store.storage import Storage
from tests.processes import PATIENCE
from tests.store.test_cache_writer import some, write_all, writer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.store.pulse._EVERY", 0.02)
    monkeypatch.setattr("kdcache.store.pulse._EVERY_REMOTE", 0.02)


@pytest.fixture(params=["folder", "memory"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> CacheWriter:
    """A writer of three shards that nobody has begun."""
    return writer(tmp_path / "c" if request.param == "folder" else f"memory://{tmp_path.name}/c")


def beat(made: CacheWriter, shard: int, true: Callable[[Heartbeat], bool] = lambda _: True) -> Heartbeat:
    """The heartbeat of a shard, when it says what is awaited."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        found = Heartbeat.read(made.storage, shard, made.manifest.sha256)
        if found is not None and true(found):
            return found
        time.sleep(0.005)
    raise AssertionError("it is not written")


def left(made: CacheWriter) -> list[str]:
    return made.storage.names("running")


def test_it_is_there_while_a_shard_is_made_and_says_how_far_that_is(made: CacheWriter) -> None:
    with made.shard(1) as shard:
        first = beat(made, 1)
        shard.planned_rows = 4
        shard.write(*some())
        second = beat(made, 1, lambda found: found.rows == 1)
        assert left(made) == ["running/00001.json"]
    assert (first.shard, first.pid, first.rows, first.share, first.failure) == (1, os.getpid(), 0, None, "")
    assert (second.share, second.labels, second.made) == (0.25, 9, 0) and second.seconds > first.seconds > 0
    assert shard.committed and left(made) == []
    with made.shard(2) as shard:
        third = beat(made, 2)
    assert (third.made, third.made_labels, third.rows) == (1, 9, 0) and third.busy_seconds > second.busy_seconds


def test_a_failure_leaves_its_reason_until_the_shard_is_made(made: CacheWriter) -> None:
    class OddError(Exception):
        pass

    for error, reason in (
        (ConfigError("k is\x1b[2J 3,\nabove 2"), "k is [2J 3, above 2"),
        (OddError("first\nsecond"), "OddError: first"),
        (OddError("x" * 300), f"OddError: {'x' * 187}..."),
    ):
        with pytest.raises(type(error)), made.shard(0) as shard:
            shard.write(*some())
            raise error
        assert Heartbeat.read(made.storage, 0, made.manifest.sha256).failure == reason  # type: ignore[union-attr]
    with made.shard(0) as shard:
        beat(made, 0, lambda found: not found.failure)
        shard.write(*some())
    assert left(made) == []


def test_who_is_stopped_leaves_nothing(made: CacheWriter) -> None:
    with pytest.raises(KeyboardInterrupt), made.shard(0):
        beat(made, 0)
        raise KeyboardInterrupt
    assert left(made) == []


@pytest.mark.parametrize("broken", ["replace", "delete_object"])
def test_a_heartbeat_that_cannot_be_written_harms_nothing(
    made: CacheWriter, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def fail(self: Storage, name: str, *_: Any) -> None:
        tried.append(name)
        raise OSError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(type(made.storage), broken, fail)
        write_all(made)
    assert set(tried) == {heartbeat_name(shard) for shard in range(3)}
    assert left(made) == ([] if broken == "replace" else sorted(tried))
    summary = made.finish()
    assert summary["complete"] and left(made) == [] and verify_cache(made.storage.url).ok


def test_a_folder_that_takes_no_heartbeats_takes_shards(tmp_path: Path) -> None:
    made = writer(tmp_path / "c")
    (tmp_path / "c/running").write_text("a file")
    write_all(made)
    assert made.finish()["complete"] and verify_cache(tmp_path / "c").ok


def test_of_a_writer_that_died_one_stays_until_the_shard_is_there(made: CacheWriter, tmp_path: Path) -> None:
    with made.shard(0) as shard:
        beat(made, 0)
        killed = made.storage.read(heartbeat_name(0), MOST_BYTES)
        shard.write(*some())
    made.storage.replace(heartbeat_name(0), killed)  # died between its commit and the deletion
    made.storage.replace(heartbeat_name(2), killed)
    assert verify_cache(made.storage.url).problems[0]["what"] == "the shard is not committed"
    assert len(open_cache(made.storage.url, partial=True)) == 1
    made.finish()
    assert left(made) == [heartbeat_name(2)]
    with pytest.raises(IncompleteCacheError):
        convert(made.storage.url, tmp_path / "copy")
    write_all(made)
    assert made.finish()["complete"] and left(made) == []


def test_a_complete_cache_has_no_folder_of_them(tmp_path: Path) -> None:
    made = writer(tmp_path / "c")
    write_all(made)
    made.finish()
    assert not (tmp_path / "c/running").exists()
    assert convert(tmp_path / "c", tmp_path / "d", store="zarr")["complete"]
    assert not (tmp_path / "d/running").exists()


def test_convert_has_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = writer(tmp_path / "c")
    write_all(made)
    made.finish()
    with monkeypatch.context() as patch:
        patch.setattr("kdcache.convert.publish_shard", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            convert(tmp_path / "c", tmp_path / "d", worker="1/2")
    storage = open_storage(tmp_path / "d")
    found = Heartbeat.read(storage, 1, open_cache(tmp_path / "d", partial=True).manifest.sha256)
    assert found is not None and found.failure == "ZeroDivisionError: division by zero"
    assert (found.worker, found.share) == ("1/2", 1.0)
    assert convert(tmp_path / "c", tmp_path / "d")["complete"] and not (tmp_path / "d/running").exists()


def test_a_writer_in_another_process_counts_anew(tmp_path: Path) -> None:
    made = writer(tmp_path / "c")
    made.worker = "1/4"
    write_all(made)
    other = pickle.loads(pickle.dumps(made))
    assert (other.worker, other.manifest) == ("1/4", made.manifest)
    (tmp_path / "c" / commit_name(0)).unlink()
    with other.shard(0):
        found = beat(other, 0)
    assert (found.made, found.made_labels, found.worker) == (0, 0, "1/4")


GOOD: dict[str, Any] = {
    "format": 1, "shard": 0, "failure": "", "host": "node-1", "pid": 7, "worker": "", "job": "", "every": 5.0,
    "seconds": 1.5, "rows": 1, "planned_rows": None, "labels": 9, "made": 0, "made_labels": 0, "busy_seconds": 1.5,
}  # fmt: skip

LIES: dict[str, dict[str, Any]] = {
    "of another shard": {"shard": 1},
    "of another cache": {"manifest_sha256": "0" * 64},
    "of another format": {"format": 2},
    "an escape": {"host": "\x1b[2J"},
    "a line end": {"failure": "a\nb"},
    "text turned around": {"job": "\u202e"},
    "too long": {"worker": "1" * 201},
    "no number": {"every": "5"},
    "true": {"made": True},
    "below 0": {"seconds": -1.0},
    "for ever": {"busy_seconds": 1e300},
    "infinite": {"seconds": float("inf")},
    "of many digits": {"busy_seconds": 10**400},
    "more in a part": {"seconds": 2.0},
    "rare": {"every": 1e6},
    "too large": {"rows": 1 << 63},
    "a field more": {"x": 1},
}


def record(writer: CacheWriter, changes: dict[str, Any]) -> bytes:
    return seal({**GOOD, "manifest_sha256": writer.manifest.sha256, **changes})


def test_its_schema_refuses_what_a_reader_refuses(tmp_path: Path) -> None:
    schema = json.loads((Path(__file__).parents[2] / "docs/schema/heartbeat.json").read_text())
    Draft202012Validator.check_schema(schema)
    made = writer(tmp_path / "c")
    with made.shard(0):
        beat(made, 0)
        written = json.loads(made.storage.read(heartbeat_name(0), MOST_BYTES))
    fields = {field.name for field in dataclasses.fields(Heartbeat)} | {"format", "checksum"}
    assert set(written) == set(schema["required"]) == set(schema["properties"]) == fields
    valid = Draft202012Validator(schema).is_valid
    assert valid(written) and valid({**written, **GOOD})
    for name in LIES.keys() - {"of another shard", "of another cache", "more in a part"}:  # beyond a schema
        assert not valid({**written, **GOOD, **LIES[name]}), name
    assert not any(valid({k: v for k, v in written.items() if k != field}) for field in fields)


@pytest.mark.parametrize("name", [*LIES, "unsealed", "large", "no JSON", "empty", "twice"])
def test_what_is_no_heartbeat_is_refused(tmp_path: Path, name: str) -> None:
    made = writer(tmp_path / "c")
    (tmp_path / "c/running").mkdir()
    good = record(made, {})
    path = tmp_path / "c" / heartbeat_name(0)
    path.write_bytes(good)
    assert beat(made, 0).host == "node-1"
    hostile = {
        "unsealed": good.replace(b"node-1", b"node-2"), "large": good + b" " * MOST_BYTES, "no JSON": b"\xff",
        "empty": b"", "twice": good.replace(b'"pid"', b'"made"'),
    }  # fmt: skip
    if name in hostile:
        path.write_bytes(hostile[name])
    elif name == "infinite":
        path.write_text(json.dumps({**json.loads(good), **LIES[name]}))
    else:
        path.write_bytes(record(made, LIES[name]))
    with pytest.raises(CorruptCacheError, match=r"running/00000\.json"):
        Heartbeat.read(made.storage, 0, made.manifest.sha256)
    write_all(made)
    assert made.finish()["complete"] and verify_cache(tmp_path / "c").ok
