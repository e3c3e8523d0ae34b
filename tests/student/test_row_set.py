"""Sets of rows as bits read as the ascending list of row numbers that they stand for; orders and splits stay small."""

from __future__ import annotations

import pickle
import subprocess
import sys

import numpy as np
import pytest

from kdcache.student.row_set import RowSet, set_bits


@pytest.mark.parametrize("total", [0, 1, 7, 8, 511, 512, 513, 5000])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 1.0])
def test_it_reads_as_the_list_of_its_rows(total: int, share: float) -> None:
    flags = np.random.default_rng(total).random(total) < share
    rows, expected = RowSet.where(total, lambda start, stop: flags[start:stop]), np.flatnonzero(flags)
    assert len(rows) == len(expected) and rows.tolist() == list(rows) == expected.tolist()
    assert [rows[i] for i in range(len(rows))] == expected.tolist()
    assert np.array_equal(np.asarray(rows), expected) and rows[3:9].tolist() == expected[3:9].tolist()
    order = np.random.default_rng(1).permutation(len(expected))
    assert rows[order].tolist() == expected[order].tolist()
    if len(expected):
        assert rows[-1] == expected[-1]
    copy = pickle.loads(pickle.dumps(rows))
    assert copy.tolist() == rows.tolist() and copy.digest() == rows.digest()
    for beyond in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            rows[beyond]


def test_blocks_of_building_and_of_reading_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = np.random.default_rng(0).random(100_000) < 0.3
    whole = RowSet.where(100_000, lambda start, stop: flags[start:stop])
    monkeypatch.setattr("kdcache.student.row_set._STEP", 1 << 10)
    parts = RowSet.where(100_000, lambda start, stop: flags[start:stop])
    assert parts.digest() == whole.digest() and parts.tolist() == np.flatnonzero(flags).tolist()
    assert whole[np.arange(len(whole))].tolist() == np.flatnonzero(flags).tolist()


def test_ranges_count_as_those_of_python() -> None:
    for ranges in (
        (slice(None),),
        (slice(3, 9), slice(7, 12)),
        (slice(-5, None),),
        (slice(40, 2),),
        (slice(None, 99),),
    ):
        expected = sorted({row for part in ranges for row in range(20)[part]})
        assert RowSet.of_ranges(20, ranges).tolist() == expected


def test_bits_and_intersections() -> None:
    bits = np.zeros(3, np.uint8)
    set_bits(bits, np.array([3, 17, 3, 8]))
    rows = RowSet(20, bits)
    assert rows.tolist() == [3, 8, 17]
    assert (rows & RowSet.of_ranges(20, (slice(4, 18),))).tolist() == [8, 17]
    assert rows.digest() != RowSet(21, bits).digest()


PROGRAM = """
import itertools, sys
import numpy as np
from kdcache.planning.memory import peak_resident as peak
from kdcache.student.data import RunOrder, split_heldout
from kdcache.student.mixture import Mixture
from kdcache.student.row_set import RowSet

split_heldout(100_000, 0.02)
before, rows = peak(), int(sys.argv[1])
train, held = split_heldout(rows, 0.0002)
inside = train & RowSet.of_ranges(rows, (slice(0, -1),))
mixture = Mixture([len(inside)], 3)
order = iter(RunOrder(mixture, rows, rows - 1000))
last = [row for row in itertools.islice(order, rows - 1000, None)]
assert len(last) == 1000 and len(train) + len(held) == rows
assert len(set(inside[np.array(last)].tolist())) == 1000
print(peak() - before)
"""


@pytest.mark.slow
def test_an_order_and_a_split_take_less_than_a_byte_a_row() -> None:
    """Three sets and the order of a run: 3 x 9/64 bytes a row and what building them takes, never 8 bytes a row."""
    rows = 50_000_000
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(rows)], capture_output=True, text=True, check=True)
    assert int(done.stdout) < rows
