"""Calibration error against its definition; the acceptance rate that stored targets bound against the dense one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kdcache import Selection, SparseTargets, select
from kdcache.losses import StoredLogits, measure, measure_labels
from kdcache.student.metrics import BINS, Calibration, acceptance_bounds, confidence
from tests.oracle import DIVERGENCES, coarse, targets_of


def calibration(logits: torch.Tensor, labels: torch.Tensor, parts: int = 1) -> Calibration:
    found = Calibration()
    for z, y in zip(logits.chunk(parts), labels.chunk(parts), strict=True):
        found.add(**measure_labels(StoredLogits(z), y, confidence))
    return found


def random_logits(n: int, vocab: int, seed: int) -> torch.Tensor:
    """Of every confidence, from flat to certain."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(n, 1, generator=generator) * 8
    return torch.randn(n, vocab, generator=generator) * scale


def test_it_is_the_definition() -> None:
    logits = random_logits(500, 12, 0)
    labels = torch.randint(12, (500,), generator=torch.Generator().manual_seed(1))
    labels[::3] = logits[::3].argmax(-1)
    z = logits.double().numpy()
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    confidence, right = p.max(-1), p.argmax(-1) == labels.numpy()
    total, bins = 0.0, []
    for m in range(1, 16):
        inside = [i for i in range(500) if (m - 1) / 15 < confidence[i] <= m / 15]
        if inside:
            accuracy, mean = np.mean([right[i] for i in inside]), np.mean([confidence[i] for i in inside])
            total += len(inside) / 500 * abs(accuracy - mean)
            bins.append((m - 1, len(inside), accuracy, mean))
    found = calibration(logits, labels, parts=7)
    assert found.error == pytest.approx(total, abs=1e-6)
    assert 0.1 < total < 0.6 and len(bins) > 10
    shown = found.bins()
    assert [(b["low"], b["high"]) for b in shown] == [(i / 15, (i + 1) / 15) for i in range(15)]
    for number, count, accuracy, mean in bins:
        assert shown[number]["positions"] == count
        assert shown[number]["accuracy"] == pytest.approx(accuracy)
        assert shown[number]["confidence"] == pytest.approx(mean, abs=1e-6)
    empty = [b for i, b in enumerate(shown) if i not in {n for n, *_ in bins}]
    assert all(b["positions"] == 0 and b["accuracy"] is None and b["confidence"] is None for b in empty)


@pytest.mark.parametrize("sharpened", [1.0, 1.7])
def test_a_calibrated_model_has_no_more_than_the_noise_and_an_overconfident_one_its_excess(sharpened: float) -> None:
    """Labels follow p. By bin, X = right ones - summed confidence has mean `bias` and variance sum c (1 - c), where c
    is the true probability of the most likely token; so |bias| <= E|X| <= |bias| + sd, and Var|X| <= Var X."""
    logits = random_logits(20_000, 10, 2)
    p = logits.double().softmax(-1)
    labels = torch.multinomial(p, 1, generator=torch.Generator().manual_seed(3))[:, 0]
    said, true = (sharpened * logits.double()).softmax(-1).amax(-1).numpy(), p.amax(-1).numpy()
    bins = np.clip(np.ceil(said * BINS).astype(int) - 1, 0, BINS - 1)
    variance = np.array([(true * (1 - true))[bins == b].sum() for b in range(BINS)])
    bias = sum(abs((true - said)[bins == b].sum()) for b in range(BINS)) / len(said)
    noise, wobble = np.sqrt(variance).sum() / len(said), math.sqrt(variance.sum()) / len(said)
    error = calibration(sharpened * logits, labels).error
    assert bias - 4 * wobble <= error <= bias + noise + 4 * wobble
    assert (bias > 5 * noise) == (sharpened != 1)


def test_certainty_lies_in_the_last_bin_and_a_half_in_the_eighth() -> None:
    certain = torch.tensor([[0.0] * 14 + [200.0]] * 2)
    last = calibration(certain, torch.tensor([14, 0])).bins()[-1]
    assert (last["positions"], last["confidence"], last["accuracy"]) == (2, 1, 0.5)
    half = calibration(torch.zeros(1, 2), torch.tensor([0])).bins()
    assert [b["positions"] for b in half] == [0] * 7 + [1] + [0] * 7


def test_a_bin_holds_its_upper_edge() -> None:
    for k in range(1, BINS):
        found = Calibration()
        found.add(torch.tensor([k / BINS], dtype=torch.float64), torch.tensor([1.0]))
        assert found.bins()[k - 1]["positions"] == 1


def test_a_diverged_model_has_no_error_to_speak_of_and_stops_nothing() -> None:
    assert math.isnan(calibration(torch.full((3, 4), torch.nan), torch.tensor([0, 1, 2])).error)
    assert Calibration().error == 0


N, V = 300, 40


def both() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(N, 1, generator=generator, dtype=torch.float64) * 6
    teacher = torch.randn(N, V, generator=generator, dtype=torch.float64) * scale
    return teacher, teacher + torch.randn(N, V, generator=generator, dtype=torch.float64)


def bounds(student: torch.Tensor, targets: SparseTargets) -> dict[str, torch.Tensor]:
    return measure(StoredLogits(student.float()), targets, torch.zeros(N, dtype=torch.int64), (acceptance_bounds,))


@pytest.mark.parametrize("k", [1, 4, 16, V])
def test_the_bounds_hold_and_meet_where_everything_is_kept(k: int) -> None:
    teacher, student = both()
    p, q = teacher.softmax(-1), student.softmax(-1)
    dense = torch.minimum(p, q).sum(-1)
    targets = targets_of(teacher, k)
    found = bounds(student, targets)
    low, high = found["acceptance_low"].double(), found["acceptance_high"].double()
    assert (low <= dense + 1e-6).all() and (dense <= high + 1e-6).all()
    kept = torch.zeros(N, V, dtype=torch.bool).scatter(-1, targets.ids.long(), True)
    assert torch.allclose(low, (torch.minimum(p, q) * kept).sum(-1), atol=1e-6)
    # one bucket for the tail is what the total variation of merged outcomes makes of it
    merged = DIVERGENCES["tvd"](coarse(p, targets.ids), coarse(q, targets.ids))
    assert torch.allclose(high, 1 - merged, atol=1e-6)
    if k == V:
        assert torch.equal(low, high)
    else:
        assert (high - low).mean() > 1e-3


@pytest.mark.parametrize("kind", ["sample", "ipps"])
def test_sampled_targets_bound_nothing(kind: str) -> None:
    teacher, student = both()
    rule = Selection(kind="sample", draws=8) if kind == "sample" else Selection(kind="ipps", k=8)
    targets = select(teacher.float(), rule, keys=torch.zeros(N, 3, dtype=torch.int64))
    assert not {"acceptance_low", "acceptance_high"} & bounds(student, targets).keys()
