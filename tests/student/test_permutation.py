"""The permutation is a bijection, the same everywhere, answered for place by place, and looks random."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kdcache.student.permutation import Permutation


@pytest.mark.parametrize("n", [*range(1, 40), 255, 256, 257, 1000, 65_537, 1_000_003])
@pytest.mark.parametrize("seed", [(0,), (7, 3, 1)])
def test_it_is_a_bijection(n: int, seed: tuple[int, ...]) -> None:
    found = Permutation(n, seed)(np.arange(n))
    assert np.array_equal(np.sort(found), np.arange(n))


def test_any_place_is_answered_alone_and_a_seed_says_all() -> None:
    n, places = 10**9 + 7, np.array([0, 5, 10**9, 123_456_789])
    found = Permutation(n, (3, 1))(places)
    assert [int(Permutation(n, (3, 1))(places[i : i + 1])[0]) for i in range(4)] == found.tolist()
    assert all(0 <= row < n for row in found)
    others = [Permutation(n, seed)(places).tolist() for seed in ((3, 2), (4, 1), (3,), (3, 1, 1))]
    assert found.tolist() not in others


def test_it_does_not_change_from_version_to_version() -> None:
    """A run that is resumed reads what it would have read."""
    assert Permutation(10, (0,))(np.arange(10)).tolist() == [9, 7, 8, 3, 4, 5, 6, 0, 1, 2]
    assert Permutation(10**12, (1, 2, 3))(np.array([0, 1, 10**12 - 1])).tolist() == [
        738754957881,
        156560728978,
        879206865734,
    ]


@pytest.mark.parametrize("n", [2, 3, 7, 10, 24])
def test_every_row_comes_at_every_place_as_often(n: int) -> None:
    """Chi-squared over many seeds, of where each row lands: within six standard deviations."""
    seeds = 4000
    counts = np.zeros((n, n))
    for seed in range(seeds):
        counts[np.arange(n), Permutation(n, (seed, 5))(np.arange(n))] += 1
    expected, freedom = seeds / n, (n - 1) ** 2
    chi = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi - freedom) < 6 * math.sqrt(2 * freedom)


def test_all_orders_of_four_rows_come_as_often() -> None:
    seeds = 12_000
    orders = [tuple(Permutation(4, (seed,))(np.arange(4)).tolist()) for seed in range(seeds)]
    _, counts = np.unique(np.array(orders), axis=0, return_counts=True)
    assert len(counts) == 24
    chi = ((counts - seeds / 24) ** 2 / (seeds / 24)).sum()
    assert abs(chi - 23) < 6 * math.sqrt(46)


@pytest.mark.parametrize("n", [1 << 20, 10**6 + 3, 10**9, 10**12])
def test_neighbours_are_strangers(n: int) -> None:
    """Rows one place apart, or one in the high half of the pair, are no more alike than in a shuffled list."""
    found = Permutation(n, (11,))(np.arange(100_000)) / n
    high = math.isqrt(n - 1) + 1
    column = np.arange(100_000) % high * -(-n // high) + np.arange(100_000) // high
    far = Permutation(n, (11,))(column % n) / n
    noise = 6 / math.sqrt(100_000)
    for one, other in ((found[:-1], found[1:]), (far[:-1], far[1:]), (found, np.arange(100_000) / 100_000)):
        assert abs(np.corrcoef(one, other)[0, 1]) < noise
    for values in (found, far):
        bins = np.bincount((values * 256).astype(int), minlength=256)
        chi = ((bins - 100_000 / 256) ** 2 / (100_000 / 256)).sum()
        assert chi < 255 + 6 * math.sqrt(510)


def test_the_share_of_fixed_points_and_of_ascents() -> None:
    fixed, ascents = 0, 0
    for seed in range(200):
        found = Permutation(1000, (seed, 9))(np.arange(1000))
        fixed += int((found == np.arange(1000)).sum())
        ascents += int((np.diff(found) > 0).sum())
    assert abs(fixed - 200) < 6 * math.sqrt(200)  # one in the mean, with variance 1
    assert abs(ascents - 200 * 999 / 2) < 6 * math.sqrt(200 * 1001 / 12)
