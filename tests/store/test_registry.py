"""A store that is registered from outside passes the suite and works wherever a store is named."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kdcache import open_cache, register_store, verify_cache
from kdcache.convert import convert
from kdcache.errors import ConfigError
from kdcache.store.arrow_store import ArrowShard, ArrowShardWriter
from kdcache.store.registry import registered_stores
from kdcache.store.row_format import RowFormat
from kdcache.store.storage import Storage
from kdcache.teacher.dump import dump
from kdcache.testing.store_conformance import Objects, StoreConformance
from tests.examples.loading import EXAMPLES
from tests.making import dump_options

SOURCE = EXAMPLES / "extending" / "lines_store.py"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lines_store", SOURCE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def stores() -> Iterator[None]:
    with registered_stores.restored():
        yield


with registered_stores.restored():
    LINES = load()


@pytest.mark.long
class TestLines(StoreConformance):
    store, writer, reader = "lines", LINES.LinesWriter, LINES.LinesShard
    flips = 24  # in the one stretch of bytes that a row is

    def streams(self, storage: Storage, objects: Objects, form: RowFormat) -> list[dict[str, NDArray[Any]]]:
        types = {name: dtype for name, (dtype, _) in form.shapes(0).items()}
        lines = b"".join(storage.chunks(objects[0]["name"])).splitlines()
        return [
            {
                n: np.frombuffer(bytes.fromhex(s), t)
                for (n, t), s in zip(types.items(), json.loads(x[9:])[1:], strict=True)
            }
            for x in lines
        ]

    def spans(self, storage: Storage, objects: Objects, row: int) -> Iterator[tuple[str, int, int]]:
        lines = b"".join(storage.chunks(objects[0]["name"])).splitlines(keepends=True)
        start = sum(map(len, lines[:row]))
        yield objects[0]["name"], start, start + len(lines[row]) - 1


def test_a_cache_in_it_is_dumped_verified_and_converted(
    stores: None, teacher: Path, corpus: Path, tmp_path: Path
) -> None:
    register_store("lines", LINES.LinesWriter, LINES.LinesShard)
    dump(dump_options(teacher, corpus, tmp_path / "l", store="lines"))
    assert open_cache(tmp_path / "l").manifest.store == "lines" and verify_cache(tmp_path / "l").ok
    convert(tmp_path / "l", tmp_path / "a", store="arrow")
    convert(tmp_path / "a", tmp_path / "back", store="lines")
    one, two = (open_cache(tmp_path / name).commits for name in ("l", "back"))
    assert [c.objects for c in one.values()] == [c.objects for c in two.values()]


def test_a_cache_of_an_unknown_store_says_so(stores: None, cache: Path, tmp_path: Path) -> None:
    register_store("lines", LINES.LinesWriter, LINES.LinesShard)
    convert(cache, tmp_path / "l", store="lines")
    with registered_stores.restored(), pytest.raises(Exception, match="store lines is not one of arrow, zarr"):
        registered_stores._values.pop("lines")
        open_cache(tmp_path / "l")


def test_what_cannot_be_registered_is_refused(stores: None) -> None:
    register_store("again", ArrowShardWriter, ArrowShard)
    with pytest.raises(ConfigError, match="store named again is registered already"):
        register_store("again", LINES.LinesWriter, LINES.LinesShard)
    with pytest.raises(ConfigError, match="store named arrow is registered already"):
        register_store("arrow", LINES.LinesWriter, LINES.LinesShard)
    for name in ("", "A", "a b", "../a", "a" * 33):
        with pytest.raises(ConfigError, match="cannot name a store"):
            register_store(name, ArrowShardWriter, ArrowShard)
    with pytest.raises(ConfigError, match="not a ShardWriter"):
        register_store("x", ArrowShard, ArrowShard)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not a Shard"):
        register_store("x", ArrowShardWriter, object)  # type: ignore[arg-type]


def test_loading_it_twice_is_refused_by_name(stores: None) -> None:
    load()
    with pytest.raises(ConfigError, match="store named lines is registered already"):
        load()
    assert "lines_store" not in sys.modules
