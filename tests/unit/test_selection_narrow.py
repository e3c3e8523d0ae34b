"""Fewer entries from entries: exact for truncated kinds, unbiased and no worse than a direct draw for the others."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from kdcache import Selection, SparseTargets, select
from kdcache.errors import ConfigError, TargetError
from kdcache.selection import narrow
from tests.sampling import KINDS, Moments, dense, draws_of, logits_of, tau_of

TEMPERATURES = (1.0, 2.0, 0.5)


def same(a: SparseTargets, b: SparseTargets, slack: float = 2e-6) -> None:
    assert torch.equal(a.ids, b.ids) and torch.equal(a.count, b.count) and a.kind == b.kind
    for name in ("logprobs", "log_partition", "log_tail", "entropy", "label_logprob"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=slack, rtol=1e-6, equal_nan=True)
    torch.testing.assert_close(a.weights, b.weights, atol=0, rtol=1e-5)


def shuffled(targets: SparseTargets) -> SparseTargets:
    """The same entries in another order, as a codec may give them."""
    key = torch.rand(targets.ids.shape, generator=torch.Generator().manual_seed(3))
    order = torch.where(targets.valid, key, 2.0).argsort(-1)
    fields = {name: getattr(targets, name).gather(-1, order) for name in ("ids", "logprobs", "weights")}
    return dataclasses.replace(targets, **fields)  # type: ignore[arg-type]


NARROWER = [
    (Selection(k=40), Selection(k=40)),
    (Selection(k=40), Selection(k=7)),
    (Selection(k=40), Selection(kind="topp", k=9, top_p=0.8, min_k=2)),
    (Selection(kind="full"), Selection(k=7)),
    (Selection(kind="full"), Selection(kind="full")),
    (Selection(kind="full"), Selection(kind="topp", k=9, top_p=0.8)),
    (Selection(kind="topp", k=20, top_p=0.9, min_k=3), Selection(kind="topp", k=6, top_p=0.7, min_k=2)),
    (Selection(k=40, force_label=True), Selection(k=7, force_label=True)),
    (Selection(kind="full"), Selection(k=7, force_label=True)),
    (
        Selection(kind="topp", k=20, top_p=0.9, force_label=True),
        Selection(kind="topp", k=6, top_p=0.7, force_label=True),
    ),
]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "flat"])  # whose order float32 log-probabilities lose
@pytest.mark.parametrize(("old", "new"), NARROWER, ids=str)
def test_truncated_targets_become_what_a_dump_would_have_made(old: Selection, new: Selection, kind: str) -> None:
    logits = logits_of(kind, 200)
    labels = torch.randint(200, (64,), generator=torch.Generator().manual_seed(1))
    labels[::7] = -100
    wide = select(logits, old, labels=labels, temperatures=TEMPERATURES)
    direct = select(logits, new, labels=labels, temperatures=TEMPERATURES)
    same(narrow(shuffled(wide), new, source=old, labels=labels), direct)


def test_a_position_without_a_target_stays_one() -> None:
    for old, new in (
        (Selection(k=9), Selection(k=4)),
        (Selection(kind="ipps", k=9), Selection(kind="ipps", k=4)),
        (Selection(kind="sample", draws=9), Selection(kind="sample", draws=4)),
    ):
        wide = select(logits_of("random", 50, 3), old).spread(torch.tensor([0, 2, 3]), 5)
        found = narrow(wide, new, source=old)
        assert (found.count > 0).tolist() == [True, False, True, True, False]
        assert (found.weights[[1, 4]] == 0).all() and torch.isneginf(found.logprobs[[1, 4]]).all()
        assert (found.ids[[1, 4]] == 0).all()


RAGGED = Selection(kind="ipps", k=8, tau=0.04, min_k=2)
SAMPLED = [
    (Selection(kind="ipps", k=12), Selection(kind="ipps", k=5)),
    (Selection(kind="ipps", k=12, force_label=True), Selection(kind="ipps", k=5, force_label=True)),
    (RAGGED, Selection(kind="ipps", k=5)),
    (RAGGED, Selection(kind="ipps", k=6, tau=0.09, min_k=2)),
    (Selection(kind="sample", draws=20), Selection(kind="sample", draws=8)),
    (Selection(kind="sample", draws=20, force_label=True), Selection(kind="sample", draws=8, force_label=True)),
]


@pytest.mark.long
@pytest.mark.parametrize(("old", "new"), SAMPLED, ids=str)
def test_sampled_targets_keep_their_mean_and_get_the_variance_of_a_direct_draw(old: Selection, new: Selection) -> None:
    vocab, seeds = 64, 2000
    logits = torch.cat([logits_of("random", vocab, 15), logits_of("tied", vocab, 15)])
    labels = torch.randint(vocab, (30,), generator=torch.Generator().manual_seed(0))
    labels[:5], labels[5:10] = logits[:5].argmin(-1), -100
    p = logits.double().softmax(-1)
    moments = Moments()
    errors, expected = [], []
    for row, wide in enumerate(draws_of(logits, old, seeds, labels)):
        keys = torch.tensor([[3, row, 0]]).repeat(seeds, 1)
        keys[:, 2] = torch.arange(seeds)  # the keys of the first draw
        known = labels[row].expand(seeds)
        found = narrow(shuffled(wide), new, source=old, labels=known if new.force_label else None, keys=keys)
        ids = torch.where(found.valid, found.ids, -1 - torch.arange(found.ids.shape[-1]))
        assert (ids.sort(-1).values.diff(dim=-1) > 0).all() and found.ids.shape[-1] <= new.width(vocab)
        torch.testing.assert_close(found.weights.sum(-1), torch.ones(seeds), atol=1e-5, rtol=0)
        own = torch.zeros(vocab, dtype=torch.bool)
        if new.force_label and labels[row] != -100:
            own[labels[row]] = True
        others = torch.where(own, 0.0, p[row])
        if new.kind == "sample":
            q = others / others.sum()
            variance, inclusion = others.sum() ** 2 * q * (1 - q) / 8, torch.where(own, 1.0, 1 - (1 - q) ** 8)
        else:
            count = int(found.count[0])
            assert (found.count == count).all() and count <= (wide.count[0] if new.tau else min(5, int(wide.count[0])))
            tau = tau_of(others[None], count - int(own.any()))
            light = ~own & (p[row] < tau)
            variance = torch.where(light, others * (tau - others), 0.0)
            inclusion = torch.where(light, others / tau, 1.0)
        weights = dense(found, vocab)
        moments.add(weights, p[row], variance, inclusion)
        errors.append((weights - p[row]).square().sum(-1).mean().item())
        expected.append(variance.sum().item())
    moments.check(least=350)
    assert sum(errors) == pytest.approx(sum(expected), rel=0.03)


def test_narrowing_twice_is_narrowing_once() -> None:
    logits = logits_of("random", 200)
    wide = select(logits, Selection(k=40), temperatures=TEMPERATURES)
    middle = narrow(wide, Selection(k=20), source=Selection(k=40))
    same(
        narrow(middle, Selection(k=5), source=Selection(k=20)),
        narrow(wide, Selection(k=5), source=Selection(k=40)),
    )


@pytest.mark.parametrize("kind", ["ipps", "sample"])
def test_sampled_targets_may_be_narrowed_twice(kind: str) -> None:
    """Each time with numbers of its own: the same twice would be biased."""
    vocab, seeds = 64, 4000
    size = "k" if kind == "ipps" else "draws"
    rules = [Selection(kind=kind, **{size: n}) for n in (16, 9, 5)]  # type: ignore[arg-type]
    logits = logits_of("random", vocab, 12)
    p = logits.double().softmax(-1)
    moments = Moments()
    for row, targets in enumerate(draws_of(logits, rules[0], seeds)):
        keys = torch.tensor([[3, row, 0]]).repeat(seeds, 1)
        keys[:, 2] = torch.arange(seeds)
        for old, new in itertools.pairwise(rules):
            targets = narrow(targets, new, source=old, keys=keys)
        tau = tau_of(p[row : row + 1], 5)
        if kind == "ipps":
            light = p[row] < tau
            law = torch.where(light, p[row] * (tau - p[row]), 0.0), torch.where(light, p[row] / tau, 1.0)
        else:
            law = p[row] * (1 - p[row]) / 5, 1 - (1 - p[row]) ** 5
        moments.add(dense(targets, vocab), p[row], *law)
    moments.check(least=100)


def test_narrowing_is_a_function_of_seed_and_key() -> None:
    old, new = Selection(kind="ipps", k=12), Selection(kind="ipps", k=5)
    wide = select(logits_of("random", 200), old)
    keys = torch.randint(1000, (64, 3), generator=torch.Generator().manual_seed(0))
    whole = narrow(wide, new, source=old, keys=keys)
    assert torch.equal(narrow(wide, new, source=old, keys=keys).ids, whole.ids)
    assert not torch.equal(narrow(wide, new, source=old, keys=keys, seed=1).ids, whole.ids)
    parts = [narrow(wide[i : i + 5], new, source=old, keys=keys[i : i + 5]) for i in range(0, 64, 5)]
    assert torch.equal(SparseTargets.cat(parts).ids, whole.ids)


REFUSED = [
    (Selection(k=4), Selection(k=5), "k is 5, but the entries were kept with 4; it can be lowered, not raised"),
    (Selection(kind="ipps", k=4), Selection(kind="ipps", k=5), "k is 5"),
    (Selection(kind="sample", draws=4), Selection(kind="sample", draws=5), "draws is 5"),
    (Selection(kind="topp", k=4, top_p=0.5), Selection(kind="topp", k=4, top_p=0.6), "top_p is 0.6"),
    (Selection(kind="topp", k=4, top_p=0.5), Selection(kind="topp", k=4, top_p=0.5, min_k=2), "min_k is 2"),
    (Selection(kind="topp", k=4, top_p=0.5), Selection(k=2), "kind topk cannot be made from the entries of topp"),
    (Selection(k=4), Selection(kind="ipps", k=2), "kind ipps cannot be made from the entries of topk"),
    (Selection(k=4), Selection(kind="full"), "kind full cannot be made"),
    (Selection(k=4), Selection(k=2, force_label=True), "force_label cannot be changed"),
    (Selection(k=4, force_label=True), Selection(k=2), "force_label cannot be changed"),
    (
        Selection(kind="ipps", k=4),
        Selection(kind="ipps", k=2, sample_temperature=2.0),
        "sample_temperature is 2, but the entries were drawn at 1",
    ),
    (
        Selection(kind="ipps", k=4),
        Selection(kind="ipps", k=2, tau=0.4),
        "tau is 0.4, but the entries were kept with k",
    ),
    (Selection(kind="ipps", k=4, tau=0.3), Selection(kind="ipps", k=2, tau=0.2), "kept with tau 0.3; it can only be"),
]


@pytest.mark.parametrize(("old", "new", "words"), REFUSED, ids=str)
def test_what_the_entries_cannot_give_is_refused(old: Selection, new: Selection, words: str) -> None:
    wide = select(logits_of("random", 50, 3), old, temperatures=(1.0, 2.0))
    with pytest.raises(ConfigError, match=words):
        narrow(wide, new, source=old)


def test_damaged_or_missing_facts_are_refused() -> None:
    logits, labels = logits_of("random", 50, 3), torch.tensor([1, 2, 3])
    forced = Selection(k=9, force_label=True)
    wide = select(logits, forced, labels=labels)
    with pytest.raises(ConfigError, match="force_label needs the true next tokens"):
        narrow(wide, Selection(k=4, force_label=True), source=forced)
    absent = next(i for i in range(50) if i not in wide.ids[1].tolist())
    with pytest.raises(TargetError, match="the label of position 1 is not among its entries"):
        narrow(wide, Selection(k=4, force_label=True), source=forced, labels=torch.tensor([1, absent, 3]))
    drawn = select(logits, Selection(kind="sample", draws=9))
    with pytest.raises(TargetError, match="not shares of 7 draws"):
        narrow(drawn, Selection(kind="sample", draws=3), source=Selection(kind="sample", draws=7))
