"""Anything at all, given to what parses: records, names, frames, and the streams of a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kdcache.codec.streams import deflate
from kdcache.errors import CacheError, CorruptCacheError
from kdcache.store.commit import Commit, commit_name
from kdcache.store.local import LocalStorage
from kdcache.store.manifest import NAME, Manifest
from kdcache.store.row_format import Record, read_stream
from kdcache.store.sealed_json import parse, read_record, seal
from kdcache.store.storage import inside
from kdcache.testing.example_rows import SELECTIONS, example_manifest, example_rows, same_rows, write_cache
from tests.attacks.mutator import Mutator
from tests.attacks.test_mutations import Given, Target

quick = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip

NUMBERS = st.sampled_from([0, 1, -1, 2, 63, 1 << 31, 1 << 53, (1 << 63) - 1, 1 << 63, 1 << 70, 0.5, 1e300, -0.0, 2.5])
SCALARS = st.none() | st.booleans() | NUMBERS | st.integers() | st.text(max_size=20)
JSON = st.recursive(
    SCALARS | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> LocalStorage:
    """An honest cache whose records are replaced."""
    storage, manifest = LocalStorage(tmp_path_factory.mktemp("parsers") / "c"), example_manifest("arrow")
    write_cache(storage, manifest, example_rows(manifest, 3))
    return storage


@pytest.mark.slow
@quick
@given(st.binary(max_size=80) | st.text(max_size=60).map(lambda text: text.encode(errors="replace")))
@example(b"[" * 200_000)
@example(b'{"a":' * 50_000)
@example(b'"\\ud800"')
@example(b"1" * 5000)
@example(b"\xef\xbb\xbf{}")
@example("{}".encode("utf-16"))
@example(b'{"a": 1, "a": 1}')
@example(b"[NaN]")
@example(b"[-Infinity]")
def test_json_is_parsed_or_refused(data: bytes) -> None:
    try:
        value = parse(data)
    except ValueError:
        return
    assert json.dumps(value) == json.dumps(json.loads(data))


@quick
@given(st.dictionaries(st.text(max_size=8).filter(lambda key: key != "checksum"), JSON, max_size=5))
def test_a_sealed_record_reads_back(storage: LocalStorage, fields: dict[str, Any]) -> None:
    storage.delete("r.json")
    storage.create("r.json", seal(fields))
    found = read_record(storage, "r.json")
    del found["checksum"]
    assert found == fields


@settings(quick, max_examples=400)
@given(st.data())
@pytest.mark.parametrize("which", ["manifest", "commit"])
def test_a_sealed_record_of_anything_is_read_or_refused(storage: LocalStorage, which: str, data: st.DataObject) -> None:
    name = NAME if which == "manifest" else commit_name(0)
    path = storage.folder / name
    honest = path.read_bytes()
    fields = json.loads(honest)
    changed = data.draw(st.dictionaries(st.sampled_from(sorted(fields)), JSON, min_size=1, max_size=2))
    if which == "commit" and data.draw(st.booleans()):
        changed["objects"] = [
            {**fields["objects"][0], data.draw(st.sampled_from(["name", "bytes", "sha256"])): data.draw(JSON)}
        ]
    lie = {**fields, **changed}
    path.write_bytes(seal(lie))
    try:
        if which == "manifest":
            found = Manifest.read(storage)
            _ = found.row_format.most_bytes, found.shards, found.sha256
        else:
            assert Commit.read(storage, 0, fields["manifest_sha256"]) is not None
    except CacheError as error:
        assert str(path) in str(error) and "\n" not in str(error) and len(str(error)) < 600
    finally:
        path.write_bytes(honest)


@quick
@given(
    st.text(max_size=30)
    | st.lists(st.sampled_from(["a", "..", ".", "", "/", "\\", "C:", "\0", "~", "shards"])).map("/".join)
)
def test_a_name_leads_nowhere_else(name: str) -> None:
    try:
        inside(name)
    except CorruptCacheError:
        return
    root = Path("/cache")
    assert (root / name).resolve().is_relative_to(root) and (root / name) != root


@quick
@given(
    st.binary(max_size=60) | st.binary(max_size=200).map(lambda raw: deflate(np.frombuffer(raw, np.uint8))),
    st.integers(0, 300),
)
def test_a_frame_unfolds_within_its_shape_or_not_at_all(frame: bytes, most: int) -> None:
    try:
        found = read_stream(frame, np.dtype("<u2"), (most,))
    except CorruptCacheError:
        return
    assert found.dtype == np.dtype("<u2") and found.size <= most


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> list[Target]:
    folder = tmp_path_factory.mktemp("rows")
    cases = [(kind, precision) for kind in SELECTIONS for precision in ("float32", "float16", "6")]
    cases += [(kind, "6", "entropy>1") for kind in ("topk", "ipps")]
    return [Target(folder / "-".join(case), "arrow", *case) for case in cases]


@pytest.mark.slow
@settings(quick, max_examples=400)
@given(st.data())
def test_streams_of_anything_are_a_sound_row_or_refused(targets: list[Target], data: st.DataObject) -> None:
    """Honest streams, some of them changed or replaced; what is accepted is accepted alike each time."""
    target = data.draw(st.sampled_from(targets))
    record = target.records[0]
    mutator = Mutator(data.draw(st.integers(0, 1 << 32)))
    streams = dict(record.streams)
    for name in data.draw(st.sets(st.sampled_from(sorted(streams)), max_size=3)):
        raw = data.draw(st.binary(max_size=400)) if data.draw(st.booleans()) else mutator(streams[name].tobytes())
        dtype = streams[name].dtype
        streams[name] = np.frombuffer(raw[: len(raw) - len(raw) % dtype.itemsize], dtype)
    positions = data.draw(st.sampled_from([record.positions, 0, 1, target.form.seq_len, (1 << 32) - 1]))
    shard = Given(target.form, Record(positions=positions, streams=streams))
    try:
        found = shard.read(0)
    except CacheError:
        return
    target.require_sound(found)
    assert same_rows(found, shard.read(0))
