"""The numbers that decide every draw: known values, uniform, and independent in every word of the key."""

from __future__ import annotations

import math

import pytest
import torch

from kdcache.selection.uniforms import NARROW, SELECT, default_keys, uniforms

MASK = (1 << 64) - 1
N = 100_000
GOLDEN = [0.3511908829267062, 0.8679725742854634, 0.6965643524431387]


def reference(words: list[int]) -> float:
    """The same generator in Python's integers."""
    state = words[0]
    for word in words[1:]:
        z = ((state ^ (word & MASK)) + 0x9E3779B97F4A7C15) & MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        state = z ^ (z >> 31)
    return (state >> 11) * 2.0**-53


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 2**64 + 5, 123456789])
def test_values(seed: int) -> None:
    keys = torch.tensor([[0, 0, 0], [1, 2, 3], [7, -1, 2**62], [2**63 - 1, 5, 0]])
    one = uniforms(seed, keys, SELECT)
    assert one.tolist() == [reference([SELECT, seed, *key]) for key in keys.tolist()]
    several = uniforms(seed, keys, NARROW, 3)
    assert several.tolist() == [[reference([NARROW, seed, *key, d]) for d in range(3)] for key in keys.tolist()]


def test_golden_values() -> None:
    """Those of the first release: a cache made today and its shard re-made tomorrow draw the same entries."""
    found = uniforms(0, default_keys(3, torch.device("cpu")), SELECT)
    assert found.tolist() == GOLDEN


def streams() -> dict[str, torch.Tensor]:
    """Many numbers that differ in one word of the key, counted up from 0, as a dump does."""
    made = {}
    for column, name in enumerate(("shard", "row", "position")):
        keys = torch.zeros(N, 3, dtype=torch.int64)
        keys[:, column] = torch.arange(N)
        made[name] = uniforms(0, keys, SELECT)
    made["draw"] = uniforms(0, default_keys(1, torch.device("cpu")), SELECT, N)[0]
    first = default_keys(1, torch.device("cpu"))
    made["seed"] = torch.cat([uniforms(seed, first, SELECT) for seed in range(10_000)])
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(50), torch.arange(500))
    made["grid"] = uniforms(0, grid, SELECT)
    return made


@pytest.fixture(scope="module")
def numbers() -> dict[str, torch.Tensor]:
    return streams()


NAMES = ("shard", "row", "position", "draw", "seed", "grid")


def chi_square(cells: torch.Tensor, count: int) -> float:
    """How far cell counts are from equal, in standard deviations of chi-square."""
    seen = torch.bincount(cells, minlength=count).double()
    expected = len(cells) / count
    return ((seen - expected).square().sum().item() / expected - (count - 1)) / math.sqrt(2 * (count - 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_they_are_uniform(name: str, numbers: dict[str, torch.Tensor]) -> None:
    u = numbers[name]
    n = len(u)
    assert u.min() >= 0 and u.max() < 1
    assert u.unique().numel() == n
    steps = torch.arange(1, n + 1) / n
    distance = (u.sort().values - steps).abs().max().item()
    assert distance * math.sqrt(n) < 2.0  # Kolmogorov: exceeded once in 1,500
    assert abs(chi_square((u * 1000).long(), 1000)) < 4.5
    # The low bits too: they decide between neighbours inside a block.
    assert abs(chi_square(((u * 2.0**43) % 1 * 256).long(), 256)) < 4.5


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 500])
@pytest.mark.parametrize("name", NAMES)
def test_neighbours_are_independent(name: str, lag: int, numbers: dict[str, torch.Tensor]) -> None:
    u = numbers[name]
    a, b = u[:-lag], u[lag:]
    n = len(a)
    correlation = (12 * (a - 0.5) * (b - 0.5)).mean().item() * math.sqrt(n)
    assert abs(correlation) < 4.5
    cells = (a[::2] * 16).long() * 16 + (b[::2] * 16).long()
    assert abs(chi_square(cells, 256)) < 4.5
    for bit in (1, 2, 8, 30, 52):
        same = ((a * 2.0**bit).long() % 2 == (b * 2.0**bit).long() % 2).double().mean().item()
        assert abs(same - 0.5) * 2 * math.sqrt(n) < 4.5, bit


def test_seeds_and_domains_are_independent() -> None:
    keys = default_keys(N, torch.device("cpu"))
    base = uniforms(0, keys, SELECT)
    for other in (uniforms(1, keys, SELECT), uniforms(1 << 40, keys, SELECT), uniforms(0, keys, NARROW)):
        assert abs((12 * (base - 0.5) * (other - 0.5)).mean().item()) * math.sqrt(N) < 4.5
        assert not (base == other).any()


def test_words_do_not_mix_up() -> None:
    """(a, b) is not (b, a), and their sums or exclusive ors do not decide."""
    keys = torch.cartesian_prod(torch.arange(30), torch.arange(30), torch.arange(30))
    assert uniforms(0, keys, SELECT).unique().numel() == len(keys)


def test_any_batch_gives_the_same() -> None:
    keys = torch.randint(1 << 50, (1000, 3), generator=torch.Generator().manual_seed(0))
    whole = uniforms(9, keys, SELECT, 4)
    assert torch.equal(torch.cat([uniforms(9, k, SELECT, 4) for k in keys.split(7)]), whole)
    assert torch.equal(uniforms(9, keys, SELECT, 9)[:, :4], whole)
