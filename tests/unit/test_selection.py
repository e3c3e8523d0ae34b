"""Selection against a dense float64 oracle."""

from __future__ import annotations

import math

import pytest
import torch

from kdcache import Selection, select
from kdcache.errors import ConfigError, LogitsError, TargetError

TEMPERATURES = (1.0, 2.0, 0.5)


def logits_of(kind: str, vocab: int, rows: int = 64) -> torch.Tensor:
    torch.manual_seed(vocab)
    if kind == "random":
        return 3 * torch.randn(rows, vocab)
    if kind == "flat":
        return 1e-3 * torch.randn(rows, vocab)
    peaked = torch.randn(rows, vocab)
    peaked[torch.arange(rows), torch.randint(vocab, (rows,))] += 20 + 10 * torch.rand(rows)
    return peaked


def oracle(logits: torch.Tensor, ids: torch.Tensor, t: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense float64: log p of every id, log-partition at T, log tail at T over the complement itself."""
    logp = logits.double().log_softmax(-1)
    partition = (logp / t).logsumexp(-1)
    tail = (logp / t).scatter(-1, ids, -torch.inf).logsumexp(-1) - partition
    return logp, partition, tail


@pytest.mark.parametrize("vocab", [17, 512, 32_000])
@pytest.mark.parametrize("kind", ["random", "flat", "peaked"])
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


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused_by_position(poison: float) -> None:
    logits = torch.zeros(9, 40)
    logits[7, 3] = poison
    with pytest.raises(LogitsError, match="position 7") as caught:
        select(logits, Selection(k=4))
    assert caught.value.position == 7


def test_tiles_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = logits_of("random", 100), torch.arange(64)
    whole = select(logits, Selection(k=4), labels=labels)
    monkeypatch.setattr("kdcache.selection._TILE_ELEMENTS", 700)
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


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Selection(kind="best"), "--select best is not one of"),
        (lambda: Selection(k=0), "--k is 0"),
        (lambda: select(torch.zeros(1, 5), Selection(k=6)), "--k is 6, above the vocabulary of 5"),
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
