"""Every figure of an evaluation against dense float64 distributions, over several tiles of unequal sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdcache import open_cache
from kdcache.losses import LinearHead, Pool
from kdcache.losses.fused_linear import TILE_ELEMENTS
from kdcache.student.evaluation import StudentFigures, _shares
from tests.oracle import DIVERGENCES, coarse, targets_of

ROWS, LENGTH, D, V = 4, 12, 8, 50


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", 0)
    monkeypatch.setattr("kdcache.losses.fused_linear.LEAST_POSITIONS", 5)


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states and head of a student, logits of a teacher, labels; the student is often right and often sure."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(V, (ROWS, LENGTH), generator=g)
    labels[:, ::5] = -100
    count = int((labels != -100).sum())
    hidden = 2 * torch.randn(count, D, generator=g, dtype=torch.float64)
    weight = torch.randn(V, D, generator=g, dtype=torch.float64)
    teacher = hidden @ weight.T + torch.randn(count, V, generator=g, dtype=torch.float64)
    told = labels[labels != -100]
    told[::2] = (hidden @ weight.T).argmax(-1)[::2]
    labels[labels != -100] = told
    return hidden, weight, teacher, labels


def expected_calibration_error(q: Tensor, labels: Tensor) -> float:
    sure, total = q.amax(-1), 0.0
    correct = (q.argmax(-1) == labels).double()
    for m in range(15):
        inside = (sure > m / 15) & (sure <= (m + 1) / 15)
        if inside.any():
            total += inside.double().mean().item() * abs(correct[inside].mean() - sure[inside].mean()).item()
    return total


@pytest.mark.parametrize("k", [1, 6, V])
@pytest.mark.parametrize("pooled", [False, True])
def test_figures_against_dense_distributions(k: int, pooled: bool, cache: Path) -> None:
    hidden, weight, teacher, labels = problem()
    told = labels[labels != -100]
    targets = targets_of(teacher, k)
    p, q = teacher.softmax(-1), (hidden @ weight.T).softmax(-1)
    log_p = p.log().gather(-1, told[:, None])[:, 0]
    object.__setattr__(targets, "label_logprob", log_p)
    batch = {"labels": labels, "targets": targets}
    if pooled:  # the figures compare with the first of the pool
        batch["targets"] = Pool((targets, targets_of(teacher.roll(3, -1), k)), (1.0, 2.0))
    figures = StudentFigures.of(open_cache(cache))
    columns = figures.add(LinearHead(hidden, weight, None), batch)
    found = figures.means()
    bucket = coarse(p, targets.ids), coarse(q, targets.ids)
    kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, targets.ids.long(), True)
    shared = torch.minimum(p, q)
    expected = {
        "nll": -q.log().gather(-1, told[:, None]).mean(),
        "teacher_nll": -log_p.mean(),
        "delta_nll": (log_p - q.log().gather(-1, told[:, None])[:, 0]).mean(),
        "kl": DIVERGENCES["forward-kl"](*bucket).mean(),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double().mean(),
        "ece": expected_calibration_error(q, told),
        "acceptance_low": (shared * kept).sum(-1).mean(),
        "acceptance_high": torch.minimum(*bucket).sum(-1).mean(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=1e-12), name
    assert 0.2 < expected["top1_agreement"] < 1 and expected["ece"] > 0.02
    if k == V:
        assert found["acceptance_low"] == found["acceptance_high"] == pytest.approx(float(shared.sum(-1).mean()))
    assert found["positions"] == found["targets"] == len(told)
    torch.testing.assert_close(columns["nll"], -q.log().gather(-1, told[:, None])[:, 0], atol=1e-12, rtol=0)


def test_whole_batches_are_dealt_to_ranks() -> None:
    rows = [7, 9, 11, 20, 21, 22, 30]
    assert _shares(rows, 2, 1) == [rows]
    assert _shares(rows, 2, 3) == [[7, 9, 30], [11, 20], [21, 22]]
    assert _shares(rows, 8, 2) == [rows, []]
