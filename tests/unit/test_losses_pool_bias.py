"""Where several teachers lead a student: to their pool, if only in expectation, or to the fixed points in the docs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache import Pool, Selection, select, sparse_kd_loss_from_logits
from kdcache.losses import target_losses
from tests.sampling import tau_of
from tests.unit.made_teachers import V, log_pool, pool_of, sampling, student, teachers


@pytest.fixture(autouse=True)
def warned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(target_losses, "_warned", {"pool"})
    yield


def test_the_mean_gradient_of_pooled_ipps_is_that_of_the_pool() -> None:
    """Teachers draw each for themselves, so the variance is the sum of w^2 p (tau - p), and none for what is kept."""
    n, k, seeds = 5, 5, 2000
    given, weights = teachers(2, n), (0.7, 0.3)
    logits = torch.randn(n, V, generator=torch.Generator().manual_seed(5))
    each, variance = [], torch.zeros(n, V, dtype=torch.float64)
    for number, (x, weight) in enumerate(zip(given, weights, strict=True)):
        keys = torch.cartesian_prod(torch.arange(seeds) + number * seeds, torch.arange(n), torch.zeros(1).long())
        each.append(select(x.repeat(seeds, 1), sampling("ipps", k=k), keys=keys))
        p = x.softmax(-1)
        variance += weight**2 * p * (tau_of(p, k)[:, None] - p).clamp(min=0)
    leaf = logits.repeat(seeds, 1).requires_grad_()
    sparse_kd_loss_from_logits(leaf, Pool(tuple(each), weights), num_items=1).backward()
    assert leaf.grad is not None
    mean = leaf.grad.double().view(seeds, n, V).mean(0)
    p = sum(weight * x.softmax(-1) for x, weight in zip(given, weights, strict=True))
    off, error = (mean - (logits.double().softmax(-1) - p)).abs(), (variance / seeds).sqrt()
    often = error > 1e-4
    assert often.sum() > 80
    assert (off[often] / error[often]).max() < 5
    assert 0.8 < (off.square().sum() / error.square().sum()).sqrt() < 1.2
    alone = (mean - (logits.double().softmax(-1) - given[0].softmax(-1))).abs()  # and it is not that of either
    assert (alone[often] / error[often]).max() > 20


def converged(teachers_p: Sequence[Sequence[float]], rules: Sequence[Selection]) -> list[float]:
    """What a student with three logits comes to, each teacher having half of the weight."""
    each = [
        select(torch.tensor([p], dtype=torch.float64).log(), rule) for p, rule in zip(teachers_p, rules, strict=True)
    ]
    logits = torch.tensor([[0.3, 0.0, -0.2]], dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=500, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = sparse_kd_loss_from_logits(logits, pool_of(each, (0.5, 0.5)))
        loss.backward()
        return loss

    optimiser.step(closure)
    found: list[float] = logits.detach().softmax(-1)[0].tolist()
    return found


ONE, TWO, EVERY = Selection(k=1), Selection(k=2), Selection(kind="full")


@pytest.mark.parametrize(
    ("given", "rules", "fixed_point"),
    [
        # Each keeps another id, and both can have their way; the pool is (0.375, 0.35, 0.275).
        (((0.5, 0.3, 0.2), (0.25, 0.4, 0.35)), (ONE, ONE), [0.5, 0.4, 0.1]),
        # Both cannot: 0.6 + 0.5 > 1. Nothing is left for the third id, to which the pool gives 0.2.
        (((0.6, 0.3, 0.1), (0.2, 0.5, 0.3)), (ONE, ONE), [0.55, 0.45, 0.0]),
        # A bucket of one id hides nothing, nor does a teacher that keeps everything.
        (((0.6, 0.3, 0.1), (0.2, 0.5, 0.3)), (TWO, TWO), [0.4, 0.4, 0.2]),
        (((0.6, 0.3, 0.1), (0.2, 0.5, 0.3)), (EVERY, EVERY), [0.4, 0.4, 0.2]),
    ],
)
def test_the_fixed_point_of_a_pool(given: Any, rules: Any, fixed_point: list[float]) -> None:
    assert converged(given, rules) == pytest.approx(fixed_point, abs=1e-4)


def test_the_fixed_point_where_teachers_keep_the_same_id_is_that_of_the_pools_bucket() -> None:
    found = converged(((0.6, 0.1, 0.3), (0.5, 0.2, 0.3)), (ONE, ONE))
    assert found[0] == pytest.approx(0.55, abs=1e-4)
    assert abs(found[1] - 0.15) > 0.05  # within the bucket the shape is the student's own


def test_what_the_sum_over_truncated_teachers_bounds() -> None:
    """It is at most the mean divergence; for forward KL that is the KL to the pool, and how far the teachers differ."""
    given = teachers(2)
    logits = torch.nn.functional.linear(*student()).detach()
    pooled, log_q, w = log_pool(given, 1.0), logits.log_softmax(-1), (0.625, 0.375)
    to_pool = (pooled.exp() * (pooled - log_q)).sum(-1).mean().item()
    spread = sum(
        weight * (x.softmax(-1) * (x.log_softmax(-1) - pooled)).sum(-1).mean().item()
        for x, weight in zip(given, w, strict=True)
    )
    previous = 0.0
    for k in (1, 4, 16, V - 1):
        found = sparse_kd_loss_from_logits(logits, pool_of([select(x, Selection(k=k)) for x in given])).item()
        assert previous < found <= to_pool + spread + 1e-6
        previous = found
    assert previous == pytest.approx(to_pool + spread, rel=1e-6) and spread > 0.1
    full = pool_of([select(x, Selection(kind="full")) for x in given])
    assert sparse_kd_loss_from_logits(logits, full).item() == pytest.approx(to_pool, rel=1e-6)
