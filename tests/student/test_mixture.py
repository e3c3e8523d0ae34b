"""Mixture: each cache's share in every window, each row once an epoch, and any slot without those before it."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from kdcache.student.mixture import Mixture
from kdcache.student.permutation import Permutation

SIZES = [(700, 300), (50, 1, 949), (5, 100, 40, 300, 7, 60), (1, 1)]


def owners(mixture: Mixture, rows: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.cumsum(mixture.sizes), rows, side="right")


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("seed", [0, 7])
def test_every_epoch_reads_every_row_once(sizes: tuple[int, ...], seed: int) -> None:
    mixture = Mixture(sizes, seed)
    assert len(mixture) == sum(sizes)
    for epoch in range(3):
        rows = mixture.rows(epoch * len(mixture), (epoch + 1) * len(mixture))
        assert sorted(rows.tolist()) == list(range(len(mixture)))


@pytest.mark.parametrize("weights", [None, (0.3, 0.7), (1.0, 2.0, 4.0), (5.0, 1.0, 1.0, 1.0, 1.0, 1.0), (1e-6, 1.0)])
@pytest.mark.parametrize("seed", range(5))
def test_every_window_holds_the_shares(weights: tuple[float, ...] | None, seed: int) -> None:
    sizes = (70, 30, 45, 5, 100, 11)[: len(weights or (1, 1, 1))]
    mixture = Mixture(sizes, seed, weights)
    shares = np.array(weights or sizes) / sum(weights or sizes)
    taken = owners(mixture, mixture.rows(0, 4000))
    counts = np.cumsum(taken[:, None] == np.arange(len(sizes)), axis=0)
    depth = len(sizes) - 1  # of the deepest leaf that a tree over so many can have
    for length in (1, 2, 3, 8, 64, 1000):
        windows = counts[length:] - counts[:-length]
        assert np.abs(windows - length * shares).max() < depth + 1e-4
    if len(sizes) == 2:  # within one row is as near as rows come
        assert np.ptp(counts[64:] - counts[:-64], axis=0).max() <= 1


def test_a_cache_goes_through_its_own_epochs() -> None:
    mixture = Mixture((6, 10), 3, (0.9, 0.1))
    rows = mixture.rows(0, 300)
    first = rows[rows < 6]
    for start in range(0, len(first) - 6, 6):
        assert sorted(first[start : start + 6].tolist()) == list(range(6))
    assert first[:6].tolist() != first[6:12].tolist()
    second = rows[rows >= 6] - 6
    assert sorted(second[:10].tolist()) == list(range(10)) and len(second) == pytest.approx(30, abs=1)


def test_one_cache_alone_is_read_in_plain_permutations_also_with_a_weight() -> None:
    expected = [row for epoch in range(3) for row in Permutation(8, (5, epoch, 0))(np.arange(8)).tolist()]
    assert Mixture([8], 5).rows(0, 24).tolist() == Mixture([8], 5, [0.3]).rows(0, 24).tolist() == expected


def test_any_slot_is_answered_alone() -> None:
    whole = Mixture((7, 20, 3), 1).rows(0, 500)
    alone = [int(Mixture((7, 20, 3), 1).rows(slot, slot + 1)[0]) for slot in range(0, 500, 17)]
    assert alone == whole[::17].tolist()
    assert Mixture((7, 20, 3), 1).rows(5, 5).tolist() == []
    assert not np.array_equal(whole, Mixture((7, 20, 3), 2).rows(0, 500))


def test_far_out_the_arithmetic_is_exact() -> None:
    """Against fractions: the slots of the lighter cache are those where its count steps up."""
    sizes, seed, start = (1 << 30, 3_000_001), 4, 10**8
    tree = Mixture((1, 1), seed, sizes)._tree
    assert not isinstance(tree, int)
    share, phase = Fraction(tree.light_parts, tree.parts), Fraction(tree.phase, tree.parts)
    mixture = Mixture((1, 1), seed, sizes)
    rows = mixture.rows(start, start + 2000)
    steps = [math.floor((t + 1) * share + phase) - math.floor(t * share + phase) for t in range(start, start + 2000)]
    assert rows.tolist() == steps  # row 1 is the lighter cache's only one
    assert sum(steps) > 2
