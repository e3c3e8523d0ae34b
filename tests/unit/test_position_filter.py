"""The rule of positions, and the histogram from which its threshold is chosen."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kdcache import Selection, SparseTargets, select
from kdcache.errors import ConfigError, TargetError
from kdcache.position_filter import PositionFilter
from kdcache.store.commit import LEVELS, MOST_BINS, add_histograms, histogram, quantiles


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("all", "all"), ("entropy>0.5", "entropy>0.5"), ("entropy>0.50", "entropy>0.5"), ("entropy>1.0", "entropy>1"),
        ("entropy > .25", "entropy>0.25"), ("entropy>-0", "entropy>0"), ("entropy>1e-5", "entropy>1e-05"),
        ("entropy>100", "entropy>100"),
    ],
)  # fmt: skip
def test_a_rule_has_one_spelling(given: str, told: str) -> None:
    assert PositionFilter(given).rule == PositionFilter(told).rule == told
    assert PositionFilter(given) == PositionFilter(told)


@pytest.mark.parametrize(
    "rule",
    ["", "some", "entropy", "entropy>", "entropy>-1", "entropy>nan", "entropy>inf", "entropy<1", "entropy>=1",
     "entropy>1>2", "ALL", "entropy>101", "mass>1", "entropy>0,5"],
)  # fmt: skip
def test_no_other_rule(rule: str) -> None:
    with pytest.raises(ConfigError, match="is neither all nor entropy>X") as error:
        PositionFilter(rule)
    assert repr(rule) in str(error.value)


def test_what_is_chosen_lies_strictly_above() -> None:
    targets = select(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), Selection(k=2))
    targets = dataclasses.replace(targets, entropy=torch.tensor([0.0, 0.5, 0.5000001, 0.1, 3.0]))
    assert PositionFilter().mask(targets) is None
    for rule, chosen in (
        ("entropy>0.5", [0, 0, 1, 0, 1]),
        ("entropy>0", [0, 1, 1, 1, 1]),
        ("entropy>0.1", [0, 1, 1, 0, 1]),
    ):
        found = PositionFilter(rule).mask(targets)
        assert found is not None and found.tolist() == [bool(x) for x in chosen], rule


def test_entropy_is_asked_for_only_where_the_rule_needs_it() -> None:
    unknown = SparseTargets.from_topk(torch.tensor([[1, 2]]), torch.tensor([[-0.5, -2.0]]))
    assert PositionFilter().apply(unknown) is unknown
    with pytest.raises(TargetError, match=r"entropy.*position filter entropy>1"):
        PositionFilter("entropy>1").mask(unknown)


def test_quantiles_are_right_within_their_bin() -> None:
    """Peaked at 0 with a long tail, as teachers are; in parts, as shards are."""
    generator = torch.Generator().manual_seed(0)
    entropy = torch.randn(20_000, generator=generator).exp().mul(torch.rand(20_000, generator=generator) ** 4)
    found = quantiles(add_histograms([histogram(part) for part in entropy.split(7_001)]))
    assert add_histograms([histogram(part) for part in entropy.split(300)]) == histogram(entropy)
    assert found is not None and set(found) == {f"{level:g}" for level in LEVELS}
    for level in LEVELS:
        exact = float(entropy.double().quantile(level))
        width = ((int(32 * exact**0.5) + 1) ** 2 - int(32 * exact**0.5) ** 2) / 1024
        assert abs(found[f"{level:g}"] - exact) <= width, level


def test_histograms_of_the_least_and_the_most() -> None:
    assert histogram(torch.zeros(0)) == [] and add_histograms([]) == []
    assert quantiles([]) is None and quantiles([0, 0]) is None
    assert histogram(torch.tensor([0.0, 1e-9, -1e-9])) == [3]
    assert len(histogram(torch.tensor([21.4875626]))) == MOST_BINS - 1  # the entropy of 2^31 equally likely tokens
    assert len(histogram(torch.tensor([1e9]))) == MOST_BINS
    assert quantiles([10]) == {f"{level:g}": pytest.approx(level / 1024) for level in LEVELS}
