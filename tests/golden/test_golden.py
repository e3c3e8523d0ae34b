"""Caches that version 0.2 wrote are read, and mean the same, in every later version."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kdcache import verify_cache
from tests.golden.make import EXPECTED, FOLDER, names, read

GOLDEN: dict[str, Any] = json.loads(EXPECTED.read_text())


def close(found: Any, expected: Any) -> None:
    """Equal, but for the last digits that another machine's exp and log may give."""
    if isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            close(one, other)
    elif isinstance(expected, float) and isinstance(found, float):
        assert found == pytest.approx(expected, rel=2e-6, abs=2e-6)
    else:
        assert found == expected


@pytest.mark.parametrize("name", names())
def test_it_is_read_as_it_was_written(name: str) -> None:
    report = verify_cache(FOLDER / name)
    assert report.ok, report.problems
    found, expected = read(name), GOLDEN[name]
    assert found["content_sha256"] == expected["content_sha256"]
    assert found["documents"] == expected["documents"]
    for one, other in zip(found["rows"], expected["rows"], strict=True):
        for field, value in other.items():
            close(one[field], value)


def test_there_is_one_of_every_kind() -> None:
    assert set(GOLDEN) == set(names()) == {p.name for p in FOLDER.iterdir() if (p / "kdcache.json").exists()}
    pairs = {name.rsplit("-", 1)[0] for name in names()}
    for pair in pairs:
        if f"{pair}-zarr" in GOLDEN:
            assert GOLDEN[f"{pair}-arrow"]["content_sha256"] == GOLDEN[f"{pair}-zarr"]["content_sha256"]
