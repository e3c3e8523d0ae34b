"""What --rows and --where say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kdcache.errors import ConfigError
from kdcache.student.row_filter import parse_rows, parse_where


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, range(20)),
        ("3:6", [3, 4, 5]),
        (":2,18:", [0, 1, 18, 19]),
        ("-2:", [18, 19]),
        ("5:7, 6:8", [5, 6, 7]),
        (":", range(20)),
        ("15:99", [15, 16, 17, 18, 19]),
        ("9:3", []),
    ],
)
def test_ranges_are_python_s(text: str | None, expected: list[int]) -> None:
    inside = np.zeros(20, bool)
    for part in parse_rows(text):
        inside[part] = True
    assert np.flatnonzero(inside).tolist() == list(expected)


@pytest.mark.parametrize("text", ["", "5", "a:b", "1:2:3", "1:2,", "-:3", "1.5:2", "0:10;20:30"])
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"rows .* is not a range of rows such as 0:1000"):
        parse_rows(text)


@pytest.mark.parametrize(
    ("text", "kept"),
    [("entropy<2", [0.5, 1.0]), ("entropy>1", [2.0, 3.0]), ("entropy > 0.5, entropy < 3", [1.0, 2.0]), (None, None)],
)
def test_bounds_are_strict_and_all_must_hold(text: str | None, kept: list[float] | None) -> None:
    bounds = parse_where(text)
    values = [0.5, 1.0, 2.0, 3.0]
    assert [v for v in values if all(b.holds(v) for b in bounds)] == (values if kept is None else kept)
    assert not any(bound.holds(math.nan) for bound in bounds)


@pytest.mark.parametrize("text", ["", "entropy", "entropy=1", "entropy<", "entropy<a", "entropy<nan", "nll<1", "1<a"])
def test_what_is_no_bound_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"where .* is not a bound such as entropy<2\.5"):
        parse_where(text)
