"""Selection against a dense float64 oracle."""

from __future__ import annotations

import json
import math

import pytest
import torch

from kdcache import Selection, select
from kdcache.errors import ConfigError, LogitsError, TargetError
from kdcache.selection.scan_torch import largest
from tests.sampling import KINDS, logits_of

TEMPERATURES = (1.0, 2.0, 0.5)


def oracle(logits: torch.Tensor, ids: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense float64: log p of every id, log-partition at T, log tail at T over the complement itself."""
    logp = logits.double().log_softmax(-1)
    partition = (logp / t).logsumexp(-1)
    tail = (logp / t).scatter(-1, ids, -torch.inf).logsumexp(-1) - partition
    return logp, partition, tail


@pytest.mark.parametrize("vocab", [17, 512])
@pytest.mark.parametrize("kind", ["random", "flat", "peaked", "tied", "half"])
def test_topk_against_the_dense_oracle(kind: str, vocab: int) -> None:
    logits = logits_of(kind, vocab)
    labels = torch.randint(vocab, (len(logits),))
    found = select(logits, Selection(kind="topk", k=12), labels=labels, temperatures=TEMPERATURES)
    logp = logits.double().log_softmax(-1)
    assert (found.logprobs.diff(dim=-1) <= 0).all()
    best = logp.topk(12).values
    torch.testing.assert_close(found.logprobs.double(), best, atol=4e-6, rtol=0)
    torch.testing.assert_close(found.logprobs.double(), logp.gather(-1, found.ids), atol=4e-6, rtol=0)
    torch.testing.assert_close(found.weights.double(), best.exp(), atol=0, rtol=1e-5)
    torch.testing.assert_close(found.entropy.double(), -(logp.exp() * logp).sum(-1), atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(found.label_logprob.double(), logp.gather(-1, labels[:, None])[:, 0], atol=4e-6, rtol=0)
    for column, t in enumerate(TEMPERATURES):
        _, partition, tail = oracle(logits, found.ids, t)
        # float32 rounds the log-probabilities themselves by up to 2 ulp of the largest logit's size.
        slack = 8e-6 / t
        torch.testing.assert_close(found.log_partition[:, column].double(), partition, atol=slack, rtol=0)
        torch.testing.assert_close(found.log_tail[:, column].double(), tail, atol=slack, rtol=0)
    assert (found.count == 12).all()


def test_the_tail_of_a_peaked_position_does_not_cancel() -> None:
    logits = torch.full((1, 1000), 0.0)
    logits[0, :2] = torch.tensor([30.0, 12.0])
    found = select(logits, Selection(kind="topk", k=2))
    exact = math.log(998) - torch.logsumexp(logits.double(), -1).item()
    assert found.log_tail.item() == pytest.approx(exact, abs=1e-5)
    assert (1 - found.weights.sum()).item() != pytest.approx(math.exp(exact), rel=0.5)  # what the naive way gives


def test_keeping_everything_leaves_no_tail_and_softens_exactly() -> None:
    logits = logits_of("random", 50)
    for rule in (Selection(kind="full"), Selection(kind="topk", k=50)):
        found = select(logits, rule)
        assert torch.isneginf(found.log_tail).all()
        soft, tail = found.at_temperature(3.0)
        expected = (logits.double() / 3).log_softmax(-1).gather(-1, found.ids)
        torch.testing.assert_close(soft.double(), expected, atol=1e-5, rtol=0)
        assert torch.isneginf(tail).all()


def test_a_temperature_that_is_not_stored_is_refused() -> None:
    found = select(logits_of("random", 50), Selection(kind="topk", k=5), temperatures=(1.0, 2.0))
    with pytest.raises(TargetError, match=r"temperature 3 is not exact.*1, 2 only"):
        found.at_temperature(3.0)
    for t in (0.0, -1.0):
        with pytest.raises(TargetError, match="is not positive"):
            select(logits_of("random", 50), Selection(kind="full")).at_temperature(t)


def test_probabilities_and_tail_at_a_stored_temperature_sum_to_one() -> None:
    found = select(logits_of("peaked", 512), Selection(kind="topk", k=5), temperatures=TEMPERATURES)
    for t in TEMPERATURES:
        logprobs, tail = found.at_temperature(t)
        torch.testing.assert_close(logprobs.exp().sum(-1) + tail.exp(), torch.ones(64), atol=2e-6, rtol=0)


@pytest.mark.parametrize("label", [50, -1, -101])
def test_a_label_outside_the_vocabulary_is_refused_by_position(label: int) -> None:
    labels = torch.tensor([3, -100, label, 49])
    with pytest.raises(TargetError, match=f"label {label} at position 2 is outside the vocabulary of 50 tokens"):
        select(logits_of("random", 50, 4), Selection(k=3), labels=labels)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused_by_position(poison: float) -> None:
    logits = torch.zeros(9, 40)
    logits[7, 3] = poison
    with pytest.raises(LogitsError, match="position 7") as caught:
        select(logits, Selection(k=4))
    assert caught.value.position == 7


SHAPES = {
    r"logits are torch.float32 of shape \(50,\), expected floating \[N, V\]": (torch.zeros(50), {}),
    r"of shape \(2, 3, 50\), expected": (torch.zeros(2, 3, 50), {}),
    "logits are torch.int64": (torch.zeros(2, 50, dtype=torch.int64), {}),
    r"labels have shape \(3,\), expected \(2,\) for 2 positions": (torch.zeros(2, 50), {"labels": torch.zeros(3)}),
    r"keys have shape \(2, 2\), expected \(2, 3\)": (torch.zeros(2, 50), {"keys": torch.zeros(2, 2)}),
}


@pytest.mark.parametrize("message", SHAPES)
def test_a_tensor_of_another_shape_is_refused(message: str) -> None:
    logits, rest = SHAPES[message]
    with pytest.raises(TargetError, match=message):
        select(logits, Selection(k=2), **rest)


def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = logits_of("random", 100), torch.arange(64)
    whole = select(logits, Selection(k=4), labels=labels)
    monkeypatch.setattr("kdcache.selection.select_logits.TILE_ELEMENTS", 700)
    tiled = select(logits, Selection(k=4), labels=labels)
    for name in ("ids", "logprobs", "log_tail", "entropy", "label_logprob"):
        assert torch.equal(getattr(whole, name), getattr(tiled, name)), name


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    logits = logits_of("random", 3000).bfloat16()
    found = select(logits, Selection(k=4))
    torch.testing.assert_close(
        found.logprobs.double(), logits.double().log_softmax(-1).gather(-1, found.ids), atol=4e-6, rtol=0
    )


def test_no_positions() -> None:
    found = select(torch.zeros(0, 30), Selection(k=4))
    assert found.ids.shape == (0, 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [17, 500, 4097])
def test_the_largest_are_in_order_and_ties_go_to_the_smaller_id(vocab: int, kind: str) -> None:
    logits = logits_of(kind, vocab).float()
    logits[0, ::2], logits[0, 1::2] = 0.0, -0.0  # alike
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    for k in (1, 5, 17, min(vocab, 70), vocab):
        values, ids = largest(logits, k)
        assert torch.equal(ids, order[:, :k])
        assert torch.equal(values, logits.gather(-1, ids))


@pytest.mark.parametrize("force_label", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_topp_against_the_dense_oracle(kind: str, force_label: bool) -> None:
    logits = logits_of(kind, 512)
    labels = torch.randint(512, (64,), generator=torch.Generator().manual_seed(0))
    labels[::5], labels[1::5] = -100, logits[1::5].argmax(-1)
    rule = Selection(kind="topp", k=20, min_k=3, top_p=0.9, force_label=force_label)
    found = select(logits, rule, labels=labels, temperatures=TEMPERATURES)
    logp = logits.double().log_softmax(-1)
    order = logits.float().sort(dim=-1, descending=True, stable=True).indices
    for row in range(64):
        mass = logp[row, order[row]].exp().cumsum(-1)
        count = min(20, max(3, int((mass < 0.9).sum()) + 1))
        expected = order[row, :count].tolist()
        if force_label and labels[row] != -100 and labels[row] not in expected:
            expected[-1] = int(labels[row])
        assert found.count[row] == count and found.ids[row, :count].tolist() == expected
        outside = torch.ones(512, dtype=torch.bool)
        outside[expected] = False
        for column, t in enumerate(TEMPERATURES):
            tail = (logp[row, outside] / t).logsumexp(-1) - (logp[row] / t).logsumexp(-1)
            assert found.log_tail[row, column].item() == pytest.approx(tail.item(), abs=1e-5 / t, rel=1e-6)
    torch.testing.assert_close(
        torch.where(found.valid, found.logprobs, 0.0).double(),
        torch.where(found.valid, logp.gather(-1, found.ids), 0.0), atol=4e-6, rtol=1e-6,
    )  # fmt: skip
    past = ~found.valid
    assert past.any() == (kind not in ("flat", "tied"))  # whose 20 largest are not nine tenths
    assert (found.ids[past] == 0).all() and (found.weights[past] == 0).all()
    assert torch.isneginf(found.logprobs[past]).all()
    assert (found.weights.double() - torch.where(past, 0.0, found.logprobs.double().exp())).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_forced_label_displaces_the_smallest_of_topk(kind: str) -> None:
    logits = logits_of(kind, 300)
    labels = torch.randint(300, (64,), generator=torch.Generator().manual_seed(0))
    labels[::5] = -100
    plain = select(logits, Selection(k=6), labels=labels, temperatures=TEMPERATURES)
    found = select(logits, Selection(k=6, force_label=True), labels=labels, temperatures=TEMPERATURES)
    absent = (labels != -100) & ~(plain.ids == labels[:, None]).any(-1)
    assert torch.equal(found.ids[~absent], plain.ids[~absent]) and absent.any()
    torch.testing.assert_close(found.log_tail[~absent], plain.log_tail[~absent], atol=1e-6, rtol=1e-6)
    assert torch.equal(found.ids[absent, :-1], plain.ids[absent, :-1])
    assert torch.equal(found.ids[absent, -1], labels[absent])
    torch.testing.assert_close(found.logprobs[absent, -1], found.label_logprob[absent])
    for column, t in enumerate(TEMPERATURES):
        _, _, tail = oracle(logits, found.ids, t)
        torch.testing.assert_close(found.log_tail[:, column].double(), tail, atol=8e-6 / t, rtol=1e-6)


def test_scalars_of_peaked_positions_are_exact_to_their_last_digits() -> None:
    logits = torch.zeros(3, 1000)
    logits[:, 3] = torch.tensor([20.0, 40.0, 80.0])
    p = (999 * torch.exp(-logits[:, 3].double())) / (1 + 999 * torch.exp(-logits[:, 3].double()))  # all but the peak
    entropy = -torch.log1p(-p) * (1 - p) - p * (p / 999).log()
    for rule in (Selection(k=1), Selection(kind="ipps", k=2), Selection(kind="sample", draws=3)):
        found = select(logits, rule, labels=torch.full((3,), 3))
        torch.testing.assert_close(found.entropy.double(), entropy, atol=0, rtol=1e-6)
        torch.testing.assert_close(found.label_logprob.double(), torch.log1p(-p), atol=0, rtol=1e-6)
    assert select(logits, Selection(k=1)).log_tail[:, 0].double().tolist() == pytest.approx(p.log().tolist(), rel=1e-6)


RULES = [
    (Selection(), {"kind": "topk", "k": 64}),
    (Selection(k=3, force_label=True), {"kind": "topk", "k": 3, "force_label": True}),
    (Selection(kind="topp", k=9, top_p=0.9), {"kind": "topp", "k": 9, "top_p": 0.9}),
    (
        Selection(kind="topp", k=9, top_p=0.9, min_k=2, force_label=True),
        {"kind": "topp", "k": 9, "top_p": 0.9, "min_k": 2, "force_label": True},
    ),
    (Selection(kind="sample", draws=50), {"kind": "sample", "draws": 50}),
    (
        Selection(kind="sample", draws=50, sample_temperature=2.0),
        {"kind": "sample", "draws": 50, "sample_temperature": 2.0},
    ),
    (Selection(kind="ipps", k=12), {"kind": "ipps", "k": 12}),
    (
        Selection(kind="ipps", k=12, min_k=2, tau=0.01),
        {"kind": "ipps", "k": 12, "min_k": 2, "adaptive": True, "tau": 0.01},
    ),
    (Selection(kind="full"), {"kind": "full"}),
]


@pytest.mark.parametrize(("rule", "fields"), RULES, ids=str)
def test_fields_of_a_rule(rule: Selection, fields: dict[str, object]) -> None:
    assert rule.to_fields() == fields
    again = Selection(**json.loads(json.dumps(fields)))
    assert again == rule or rule.kind == "full"
    assert again.to_fields() == fields


def test_widths() -> None:
    for rule, width in (
        (Selection(k=5), 5),
        (Selection(kind="topp", k=5, top_p=0.5), 5),
        (Selection(kind="sample", draws=7), 7),
        (Selection(kind="sample", draws=7, force_label=True), 8),
        (Selection(kind="sample", draws=700), 40),
        (Selection(kind="ipps", k=5), 5),
        (Selection(kind="ipps", k=5, tau=0.1), 11),
        (Selection(kind="ipps", k=5, tau=0.01), 40),
        (Selection(kind="ipps", k=5, tau=0.9, min_k=4), 4),
        (Selection(kind="full"), 40),
    ):
        assert rule.width(40) == width
        found = select(torch.randn(5, 40), rule, labels=torch.arange(5))
        assert found.ids.shape == (5, width) and found.count.max() <= width
        assert rule.form.ragged or (found.count == width).all()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Selection(kind="best"), "kind best is not one of"),
        (lambda: Selection(k=0), "k is 0, but must be at least 1"),
        (lambda: Selection(k=2.5), "k is 2.5, but must be a whole number"),  # type: ignore[arg-type]
        (lambda: Selection(kind="topp", k=5), "top_p is not given, but kind topp needs"),
        (lambda: Selection(kind="topp", k=5, top_p=float("nan")), "top_p is nan"),
        (lambda: Selection(kind="topp", k=5, top_p=1.1), "top_p is 1.1"),
        (lambda: Selection(kind="topp", k=5, top_p=0.5, min_k=6), "min_k is 6, above k, which is 5"),
        (lambda: Selection(k=5, min_k=2), "min_k is 2, but kind topk has no such setting"),
        (lambda: Selection(k=5, top_p=0.5), "top_p is 0.5, but kind topk has no such"),
        (lambda: Selection(kind="sample"), "draws is not given, but kind sample needs it"),
        (lambda: Selection(kind="sample", draws=0), "draws is 0"),
        (lambda: Selection(kind="sample", draws=9, k=5), "k is 5, but kind sample has no such setting"),
        (lambda: Selection(kind="full", k=5), "k is 5, but kind full has no such setting"),
        (lambda: Selection(draws=5), "draws is 5, but kind topk has no such setting"),
        (lambda: Selection(tau=0.5), "tau is 0.5, but kind topk"),
        (lambda: Selection(kind="ipps", tau=0.0), "tau is 0, but must be above 0 and at most 1"),
        (lambda: Selection(kind="ipps", proposal_power=0.8), "proposal_power is 0.8, but kind ipps"),
        (
            lambda: Selection(kind="sample", draws=5, proposal_power=3.0),
            "proposal_power is 3, but must",
        ),
        (lambda: Selection(sample_temperature=2.0), "sample_temperature is 2.0, but kind topk"),
        (
            lambda: Selection(kind="ipps", sample_temperature=1e9),
            "sample_temperature is 1e.09, but must be",
        ),
        (
            lambda: Selection(kind="ipps", k=1, force_label=True),
            "force_label needs k to be at least 2",
        ),
        (lambda: Selection(force_label=1), "force_label is 1, but must be true or false"),  # type: ignore[arg-type]
        (lambda: select(torch.zeros(1, 5), Selection(kind="ipps", k=6)), "k is 6, above the vocabulary of 5"),
        (lambda: select(torch.zeros(1, 5), Selection(k=6)), "k is 6, above the vocabulary of 5"),
        (
            lambda: select(torch.zeros(1, 5), Selection(kind="ipps", k=2, adaptive=True)),
            "tau of kind ipps",
        ),
        (lambda: Selection(k=2, colour="red"), "colour is red, but kind topk has no such setting"),
        (lambda: select(torch.zeros(1, 5), Selection(k=2), temperatures=()), "temperatures"),
        (lambda: select(torch.zeros(1, 5), Selection(k=2), temperatures=(0.0,)), "temperature 0"),
        (lambda: select(torch.zeros(1, 5), Selection(k=2), temperatures=(1e-40, 1.0)), "temperature 1e-40"),
    ],
)
def test_bad_settings(make: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()  # type: ignore[operator]


def test_missing_labels_are_not_a_number() -> None:
    found = select(torch.zeros(2, 5), Selection(k=2), labels=torch.tensor([3, -100]))
    assert found.label_logprob[0].item() == pytest.approx(-math.log(5))
    assert torch.isnan(found.label_logprob[1])
