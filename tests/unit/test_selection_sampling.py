"""`ipps` and `sample` against their laws: dense, float64, over many seeds."""

from __future__ import annotations

import math

import pytest
import torch

from kdcache import Selection, SparseTargets, select
from kdcache.errors import ConfigError
from kdcache.selection import solve_adaptive_tau
from kdcache.selection.uniforms import SELECT, default_keys, uniforms
from tests.sampling import KINDS, Moments, dense, draws_of, logits_of, tau_of

SEEDS = 4000
ROWS = {17: 64, 512: 64, 32_000: 12, 262_144: 2}


def lights(targets: SparseTargets) -> torch.Tensor:
    return targets.logprobs.isnan()


def distinct(targets: SparseTargets) -> bool:
    ids = torch.where(targets.valid, targets.ids, -1 - torch.arange(targets.ids.shape[-1]))
    return bool((ids.sort(-1).values.diff(dim=-1) > 0).all())


@pytest.mark.parametrize("vocab", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_ipps_against_the_dense_solution(kind: str, vocab: int) -> None:
    logits, k = logits_of(kind, vocab, ROWS[vocab]), 12
    found = select(logits, Selection(kind="ipps", k=k))
    logp = logits.double().log_softmax(-1)
    p = logp.exp()
    assert torch.equal(found.count, (p > 0).sum(-1).clamp(max=k))
    assert distinct(found)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(len(p)), atol=1e-5, rtol=0)
    tau, light, heavy = tau_of(p, k), lights(found), found.valid & ~lights(found)
    kept, kept_p = dense(found, vocab) > 0, p.gather(-1, found.ids)
    torch.testing.assert_close(found.weights[heavy].double(), kept_p[heavy], atol=1e-30, rtol=1e-5)
    torch.testing.assert_close(found.logprobs[heavy].double(), logp.gather(-1, found.ids)[heavy], atol=4e-6, rtol=1e-6)
    torch.testing.assert_close(
        found.weights.double()[light], tau[:, None].expand_as(light)[light], atol=1e-30, rtol=1e-4
    )
    assert kept[(p > 1e-30) & (p >= (tau * (1 + 1e-4))[:, None])].all()
    assert (kept_p <= (tau * (1 + 1e-4))[:, None])[light].all()
    # Heavies fall; lights rise by id, and come after.
    assert (found.weights.diff(dim=-1) <= 0)[heavy[:, 1:]].all()
    assert (found.ids.diff(dim=-1) > 0)[light[:, 1:] & light[:, :-1]].all()
    assert not (light[:, :-1] & heavy[:, 1:]).any()


@pytest.mark.parametrize("vocab", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_lights_are_those_that_the_points_fall_on(kind: str, vocab: int) -> None:
    """Systematic sampling along a float64 cumulative sum of everything, from the same uniforms."""
    logits = logits_of(kind, vocab, ROWS[vocab])
    found = select(logits, Selection(kind="ipps", k=12), seed=5)
    light = lights(found)
    p = logits.double().softmax(-1)
    line = p.scatter(-1, torch.where(light, found.ids[:, :1], found.ids), 0.0)  # a light first entry has no heavies
    line = torch.where(light[:, :1], p, line)
    start = uniforms(5, default_keys(len(p), p.device), SELECT)
    wrong = 0
    for row in range(len(p)):
        picked = found.ids[row][light[row]]
        number = len(picked)
        cdf = line[row].cumsum(-1) / line[row].sum()
        points = (start[row] + torch.arange(number)) / max(1, number)
        expected = torch.searchsorted(cdf, points, right=True).clamp(max=vocab - 1)
        # Rounding moves an edge by a millionth of the line at most; a point may then lie on its other side.
        before = torch.where(expected > 0, cdf[expected - 1], 0.0)
        near = (cdf[expected] - points < 1e-6) | (points - before < 1e-6)
        assert near[picked != expected].all()
        wrong += int((picked != expected).sum())
    assert wrong <= 0.03 * light.sum() + 1


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("vocab", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_draws_are_those_that_the_points_fall_on(kind: str, vocab: int, temperature: float) -> None:
    logits, number = logits_of(kind, vocab, ROWS[vocab]), 40
    rule = Selection(kind="sample", draws=number, sample_temperature=temperature)
    found = select(logits, rule, seed=5, temperatures=(1.0, 2.0))
    assert distinct(found)
    assert torch.isnan(found.logprobs[found.valid]).all()
    cdf = (logits.double() / temperature).softmax(-1).cumsum(-1)
    points = uniforms(5, default_keys(len(logits), logits.device), SELECT, number)
    expected = torch.searchsorted(cdf, points, right=True).clamp(max=vocab - 1)
    counts = torch.zeros_like(cdf).scatter_add_(-1, expected, torch.full_like(points, 1 / number))
    differ = (dense(found, vocab) - counts).abs().sum(-1) > 1e-5
    assert differ.sum() <= 1 + 0.02 * len(logits)  # a point within rounding of an edge moves one draw


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("power", [0.5, 0.8, 2.0])
@pytest.mark.parametrize("vocab", ROWS)
@pytest.mark.parametrize("kind", KINDS)
def test_importance_weights_make_up_for_the_proposal(kind: str, vocab: int, power: float, temperature: float) -> None:
    """The entries are those that draws at T / t find; each weighs its share of the draws times p_T over q."""
    logits = logits_of(kind, vocab, ROWS[vocab])
    rule = Selection(kind="sample", draws=40, proposal_power=power, sample_temperature=temperature)
    found = select(logits, rule, seed=5, temperatures=(1.0, 2.0))
    drawn = temperature / power
    plain = select(
        logits, Selection(kind="sample", draws=40, sample_temperature=drawn), seed=5,
        temperatures=tuple({1.0, 2.0, drawn}),
    )  # fmt: skip
    assert torch.equal(found.ids, plain.ids)
    assert torch.equal(found.count, plain.count)
    assert torch.equal(found.log_partition, select(logits, Selection(k=1), temperatures=(1.0, 2.0)).log_partition)
    log_p, log_q = ((logits.double() / t).log_softmax(-1).gather(-1, found.ids) for t in (temperature, drawn))
    expected = torch.where(found.valid, plain.weights * (log_p - log_q).exp(), 0.0)
    torch.testing.assert_close(found.weights.double(), expected.double(), atol=1e-30, rtol=2e-5)
    assert found.logprobs[found.valid].isnan().all()
    assert found.sample_temperature == temperature


def law(rule: Selection, p: torch.Tensor, label: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Variance of each weight, and the probability that the id is an entry; `[V]` each."""
    own = torch.zeros_like(p, dtype=torch.bool)
    if rule.force_label and label is not None:
        own[label] = True
    others = torch.where(own, 0.0, p)
    if rule.kind == "sample":
        assert rule.draws is not None
        q = others**rule.proposal_power
        q = q / q.sum()
        ratio = torch.where(own, 0.0, others / q)
        return ratio**2 * q * (1 - q) / rule.draws, torch.where(own, 1.0, 1 - (1 - q) ** rule.draws)
    count = rule.k if rule.tau is None else max(rule.min_k, round((p / rule.tau).clamp(max=1).sum().item()))
    tau = tau_of(others[None], count - int(own.any()))
    light = ~own & (p < tau)
    return torch.where(light, p * (tau - p), 0.0), torch.where(light, p / tau, 1.0)


RULES = (
    Selection(kind="ipps", k=5),
    Selection(kind="sample", draws=8),
    Selection(kind="ipps", k=5, force_label=True),
    Selection(kind="ipps", k=5, sample_temperature=2.0),
    Selection(kind="ipps", k=6, tau=0.06, min_k=2),
    Selection(kind="sample", draws=8, force_label=True),
    Selection(kind="sample", draws=8, sample_temperature=2.0),
    Selection(kind="sample", draws=8, proposal_power=0.8),
    Selection(kind="sample", draws=8, proposal_power=1.5, sample_temperature=2.0, force_label=True),
)


@pytest.mark.parametrize(
    "rule", [*RULES[:2], *(pytest.param(rule, marks=pytest.mark.long) for rule in RULES[2:])],
    ids=lambda rule: "-".join(f"{v}" for v in rule.to_fields().values()),
)  # fmt: skip
def test_weights_are_unbiased_with_the_known_variance(rule: Selection) -> None:
    logits = torch.cat([logits_of("random", 64, 25), logits_of("tied", 64, 25)])
    labels = torch.randint(64, (50,), generator=torch.Generator().manual_seed(0))
    labels[:10] = logits[:10].argmin(-1)  # labels that would hardly ever be drawn
    labels[10:15] = logits[10:15].argmax(-1)
    labels[15:20] = -100
    p = (logits.double() / rule.sample_temperature).softmax(-1)
    moments = Moments()
    for row, targets in enumerate(draws_of(logits, rule, SEEDS, labels, (1.0, 2.0))):
        assert distinct(targets)
        label = None if labels[row] == -100 else int(labels[row])
        moments.add(dense(targets, 64), p[row], *law(rule, p[row], label))
    moments.check(least=800)


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule", [Selection(kind="ipps", k=12), Selection(kind="sample", draws=50)], ids=lambda r: r.kind
)
def test_no_part_of_a_large_vocabulary_is_favoured(rule: Selection) -> None:
    """The mass that falls on each 64th of 262,144 ids: what rounding along the vocabulary would bend."""
    vocab, parts = 262_144, 64
    logits = logits_of("random", vocab, 1)
    p = logits[0].double().softmax(-1)
    targets = next(draws_of(logits, rule, SEEDS))
    part = torch.div(targets.ids.long() * parts, vocab, rounding_mode="floor")
    shares = torch.zeros(SEEDS, parts, dtype=torch.float64).scatter_add_(-1, part, targets.weights.double())
    exact = p.view(parts, -1).sum(-1)
    if rule.kind == "sample":
        assert rule.draws is not None
        variance = exact * (1 - exact) / rule.draws
    else:  # of points at equal distances, a piece of the line gets the number that fits, or one more
        tau = tau_of(p[None], rule.k)
        fits = torch.where(p < tau, p, 0).view(parts, -1).sum(-1) / tau
        variance = tau**2 * fits.frac() * (1 - fits.frac())
    z = (shares.mean(0) - exact) / (variance / SEEDS).sqrt()
    assert z.abs().max() < 4.2  # of 64 it is beyond once in 600
    torch.testing.assert_close(shares.var(0), variance, rtol=0.2, atol=0)


def test_the_squared_error_is_the_least_and_below_that_of_sampling() -> None:
    logits, k = logits_of("random", 200, 20), 6
    p = logits.double().softmax(-1)
    tau = tau_of(p, k)[:, None]
    expected = torch.where(p < tau, p * (tau - p), 0.0).sum(-1)

    def error(rule: Selection) -> tuple[torch.Tensor, float]:
        each = [(dense(t, 200), t.count) for t in draws_of(logits, rule, 1000)]
        errors = torch.stack([(w - q).square().sum(-1).mean() for (w, _), q in zip(each, p, strict=True)])
        return errors, torch.stack([c for _, c in each]).double().mean().item()

    found, entries = error(Selection(kind="ipps", k=k))
    assert entries == k
    assert found.sum().item() == pytest.approx(expected.sum().item(), rel=0.03)
    draws = next(n for n in range(k, 100) if (1 - (1 - p) ** n).sum(-1).mean() >= k)  # no fewer entries than k
    sampled, more = error(Selection(kind="sample", draws=draws))
    assert more >= k * 0.99
    assert found.sum() < 0.8 * sampled.sum()


@pytest.mark.parametrize("rule", [*RULES, Selection(kind="topk", k=5), Selection(kind="topp", k=9, top_p=0.8)], ids=str)
def test_a_target_depends_on_nothing_but_its_own_position(rule: Selection, monkeypatch: pytest.MonkeyPatch) -> None:
    vocab = 500
    logits = torch.cat([logits_of(kind, vocab, 8).float() for kind in KINDS])
    n = len(logits)
    g = torch.Generator().manual_seed(1)
    keys = torch.randint(1 << 40, (n, 3), generator=g)
    labels = torch.randint(vocab, (n,), generator=g)
    whole = select(logits, rule, labels=labels, keys=keys, temperatures=(1.0, 2.0))
    order = torch.randperm(n, generator=g)
    monkeypatch.setattr("kdcache.selection.select_logits.TILE_ELEMENTS", 5 * vocab)
    monkeypatch.setattr("kdcache.selection.scan_cpu._THREAD_ELEMENTS", 2 * vocab)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for parts in (order.split(n), order.split(1), order.split(7)):
        again = SparseTargets.cat(
            [select(logits[i], rule, labels=labels[i], keys=keys[i], temperatures=(1.0, 2.0)) for i in parts]
        )[order.argsort()]
        for name in ("ids", "logprobs", "weights", "count", "log_partition", "log_tail", "entropy", "label_logprob"):
            a, b = getattr(whole, name), getattr(again, name)
            if a is None or b is None:  # sampled targets have no tail
                assert a is b and rule.sampled and name == "log_tail"
            else:
                assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), name


def test_keys_and_seeds_decide_the_draw() -> None:
    logits = logits_of("random", 512, 1).expand(6, -1)
    keys = torch.tensor([[0, 0, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]])
    for rule in (Selection(kind="ipps", k=12), Selection(kind="sample", draws=30)):
        ids = select(logits, rule, keys=keys).ids.tolist()
        assert ids[0] == ids[1] == ids[5]
        assert len({str(i) for i in ids}) == 4
        assert select(logits, rule, keys=keys, seed=1).ids.tolist()[0] != ids[0]
        ours = select(logits, rule, keys=torch.tensor([[0, 0, i] for i in range(6)]))
        assert torch.equal(select(logits, rule).ids, ours.ids)


@pytest.mark.parametrize("kind", ["ipps", "sample"])
def test_positions_without_a_label_are_as_without_force_label(kind: str) -> None:
    settings = {"k": 5} if kind == "ipps" else {"draws": 9}
    logits = logits_of("random", 64)
    labels = torch.where(torch.arange(64) % 2 == 0, torch.arange(64), -100)
    plain = select(logits, Selection(kind=kind, **settings), labels=labels)  # type: ignore[arg-type]
    forced = select(logits, Selection(kind=kind, force_label=True, **settings), labels=labels)  # type: ignore[arg-type]
    width = plain.ids.shape[-1]
    for name in ("ids", "weights", "logprobs"):
        a, b = getattr(plain, name)[1::2], getattr(forced, name)[1::2, :width]
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), name
    entry = (forced.ids == labels[:, None]) & forced.valid
    assert entry.any(-1)[::2].all()
    torch.testing.assert_close(forced.weights[entry].log(), forced.label_logprob[::2])
    torch.testing.assert_close(forced.logprobs[entry], forced.label_logprob[::2])


def test_a_forced_label_that_is_all_there_is() -> None:
    logits = torch.full((2, 40), -2000.0)
    logits[:, 7] = 0
    for rule in (Selection(kind="ipps", k=4, force_label=True), Selection(kind="sample", draws=4, force_label=True)):
        found = select(logits, rule, labels=torch.tensor([7, 8]))
        assert found.count[0] == 1 and found.ids[0, 0] == 7 and found.weights[0, 0] == 1
        assert found.count[1] == 2 and set(found.ids[1, :2].tolist()) == {7, 8}
        assert dense(found, 40)[1, 7] == 1


def test_probabilities_that_float32_cannot_hold() -> None:
    """The support is what is above zero in float64: 1, e^-300, and many of e^-600; e^-800 is nobody."""
    logits = torch.full((1, 400), -800.0)
    logits[0, 5], logits[0, 50], logits[0, 100:300] = 0, -300, -600
    found = select(logits, Selection(kind="ipps", k=6))
    assert found.ids[0, :2].tolist() == [5, 50]
    assert found.count[0] == 6 and ((found.ids[0, 2:] >= 100) & (found.ids[0, 2:] < 300)).all()
    assert select(logits[:, :100], Selection(kind="ipps", k=6)).ids[0, :3].tolist() == [5, 50, 0]
    assert select(logits[:, :100], Selection(kind="ipps", k=6)).count.tolist() == [2]


def test_ties_at_tau_are_heavy() -> None:
    p = torch.tensor([[0.25, 0.125, 0.25, 0.125, 0.25]])  # tau of 4 entries is 0.25
    found = select(p.log(), Selection(kind="ipps", k=4))
    assert found.ids[0, :3].tolist() == [0, 2, 4]
    assert (~lights(found))[0].tolist() == [True, True, True, False]
    torch.testing.assert_close(found.weights, torch.full((1, 4), 0.25))
    even = select(torch.zeros(300, 8), Selection(kind="ipps", k=4))  # all alike: all light, all equally likely
    assert lights(even).all()
    assert even.ids.flatten().bincount().min() > 100
    whole = select(torch.zeros(1, 8), Selection(kind="ipps", k=8))
    assert whole.ids.tolist() == [list(range(8))] and not lights(whole).any()


@pytest.mark.parametrize("rule", [*RULES, Selection(kind="topp", k=5, top_p=0.5, force_label=True)], ids=str)
def test_scalars_do_not_depend_on_the_rule(rule: Selection) -> None:
    logits, labels = logits_of("random", 512), torch.arange(64)
    logp = logits.double().log_softmax(-1)
    found = select(logits, rule, labels=labels, temperatures=(2.0, 1.0, 0.5))
    torch.testing.assert_close(found.entropy.double(), -(logp.exp() * logp).sum(-1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.label_logprob.double(), logp[labels, labels], atol=2e-6, rtol=0)
    for column, t in enumerate((2.0, 1.0, 0.5)):
        torch.testing.assert_close(found.log_partition[:, column].double(), (logp / t).logsumexp(-1), atol=2e-6, rtol=0)
    assert (found.log_tail is None) == (rule.kind != "topp")


def test_adaptive_counts() -> None:
    logits = torch.cat([logits_of("random", 300, 40), logits_of("peaked", 300, 40)])
    p = logits.double().softmax(-1)
    rule = Selection(kind="ipps", k=12, tau=0.02, min_k=2)
    found = select(logits, rule)
    assert found.ids.shape[-1] == 51
    expected = (p / 0.02).clamp(max=1).sum(-1)
    assert ((found.count - expected.clamp(min=2)).abs() <= 0.5 + 1e-4).all()
    assert found.count.min() == 2 and found.count.max() > 20
    assert distinct(found)
    torch.testing.assert_close(found.weights.sum(-1), torch.ones(80), atol=1e-5, rtol=0)
    # The same entries as a fixed k of that many: tau is solved anew for the count.
    for count in found.count.unique().tolist():
        rows = found.count == count
        fixed = select(logits[rows], Selection(kind="ipps", k=count), keys=default_keys(80, logits.device)[rows])
        assert torch.equal(fixed.ids, found.ids[rows][:, :count])


def test_the_pilots_tau_gives_the_mean() -> None:
    logits = torch.cat([logits_of("random", 300, 40), logits_of("peaked", 300, 40)])
    p = logits.double().softmax(-1)
    tau = solve_adaptive_tau(logits, 12)
    assert (p / tau).clamp(max=1).sum(-1).mean().item() == pytest.approx(12, rel=1e-4)
    assert solve_adaptive_tau((logits[i : i + 7] for i in range(0, 80, 7)), 12) == pytest.approx(tau, rel=1e-6)
    assert solve_adaptive_tau(p.log().float(), 12) == pytest.approx(tau, rel=1e-4)
    soft = solve_adaptive_tau(logits, 12, sample_temperature=2.0)
    assert ((logits.double() / 2).softmax(-1) / soft).clamp(max=1).sum(-1).mean().item() == pytest.approx(12, rel=1e-4)
    assert solve_adaptive_tau(torch.zeros(3, 40), 10) == pytest.approx(0.1)
    assert 0 < solve_adaptive_tau(torch.zeros(3, 40), 100) <= 1 / 40 * (1 + 1e-6)
    with pytest.raises(ConfigError, match="no position"):
        solve_adaptive_tau([], 10)


def test_entries_are_the_same_whatever_the_number_of_threads() -> None:
    logits, threads = logits_of("random", 32_000, 300), torch.get_num_threads()
    try:
        found = []
        for number in (1, 3):
            torch.set_num_threads(number)
            found.append(select(logits, Selection(kind="ipps", k=12)))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0].ids, found[1].ids) and torch.equal(found[0].weights, found[1].weights)


def test_a_sampling_temperature_must_be_stored() -> None:
    with pytest.raises(ConfigError, match=r"sample_temperature is 2, but the temperatures are 1, 3"):
        select(torch.zeros(1, 9), Selection(kind="ipps", k=2, sample_temperature=2.0), temperatures=(1.0, 3.0))
    assert math.isfinite(select(torch.zeros(1, 9), Selection(kind="ipps", k=2)).entropy.item())
