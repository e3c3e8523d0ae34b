"""Where each target leads a student: to the teacher in expectation, or to the fixed point that the docs state."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache import Selection, select, sparse_kd_loss_from_logits
from kdcache.losses import target_losses

P = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)


@pytest.fixture(autouse=True)
def warned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(target_losses, "_warned", {"none", "renormalise", "label", "uniform"})
    yield


def gradients(logits: Tensor, selection: Selection, teacher: Tensor, seeds: int, **options: Any) -> Tensor:
    """`[seeds, N, V]` float64 gradients in the logits, one for each seed; every position has its own loss."""
    n = len(teacher)
    keys = torch.cartesian_prod(torch.arange(seeds), torch.arange(n), torch.zeros(1, dtype=torch.int64))
    targets = select(teacher.repeat(seeds, 1), selection, temperatures=(1.0, 2.0), keys=keys)
    leaf = logits.repeat(seeds, 1).requires_grad_()
    sparse_kd_loss_from_logits(leaf, targets, num_items=1, **options).backward()
    assert leaf.grad is not None
    return leaf.grad.double().view(seeds, n, -1)


def test_the_mean_gradient_over_ipps_caches_is_the_dense_one_and_that_of_a_bucket_is_not() -> None:
    """The variance is that of the law: p (tau - p) for what is drawn, and none for what is kept."""
    n, v, k, seeds = 6, 50, 5, 2000
    g = torch.Generator().manual_seed(0)
    teacher, logits = 2 * torch.randn(n, v, generator=g), torch.randn(n, v, generator=g)
    p, q = teacher.double().softmax(-1), logits.double().softmax(-1)
    each = gradients(logits, Selection(kind="ipps", k=k), teacher, seeds)
    tau = torch.stack([threshold(row, k) for row in p])[:, None]
    error = (p * (tau - p).clamp(min=0) / seeds).sqrt()
    off = (each.mean(0) - (q - p)).abs()
    drawn = error > 0
    assert drawn.sum() > 250 and (~drawn).any()
    # A light id enters with probability p / tau: at 50 expected draws the mean is near enough to normal.
    often = drawn & (seeds * p / tau > 50)
    assert often.sum() > 100
    assert (off[often] / error[often]).max() < 5
    assert off[~drawn].max() < 1e-6
    whole = (off.square().sum() / error.square().sum()).sqrt()  # about 1: nothing is hidden in the rare ids
    assert 0.8 < whole < 1.2

    bucket = gradients(logits, Selection(k=k), teacher, 1)[0]
    assert ((bucket - (q - p)).abs()[often] / error[often]).max() > 20
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(-1, select(teacher, Selection(k=k)).ids.long(), True)
    r, s = ((x * ~inside).sum(-1, keepdim=True) for x in (p, q))
    torch.testing.assert_close(bucket, torch.where(inside, q - p, q * (1 - r / s)), atol=1e-6, rtol=1e-5)


def threshold(p: Tensor, k: int) -> Tensor:
    """tau with sum min(1, p / tau) = k, by bisection."""
    low, high = torch.zeros(()).double(), torch.ones(()).double()
    for _ in range(100):
        tau = (low + high) / 2
        low, high = (tau, high) if (p / tau).clamp(max=1).sum() > k else (low, tau)
    return high


@pytest.mark.parametrize("kind", ["ipps", "sample"])
def test_the_mean_gradient_at_another_temperature(kind: str) -> None:
    n, v, seeds, t = 3, 20, 2000, 2.0
    g = torch.Generator().manual_seed(1)
    teacher, logits = 3 * torch.randn(n, v, generator=g), torch.randn(n, v, generator=g)
    selection = Selection(kind=kind, **{"draws" if kind == "sample" else "k": 6}, sample_temperature=t)
    each = gradients(logits, selection, teacher, seeds, temperature=t)
    p, q = (teacher.double() / t).softmax(-1), (logits.double() / t).softmax(-1)
    error = each.std(0) / math.sqrt(seeds)
    off = (each.mean(0) - t * (q - p)).abs()  # T^2 of the loss, 1 / T of the logits
    often = error > 2e-3
    assert often.sum() > 20 and (off[often] / error[often]).max() < 5


def converged(tail: str, k: int, positions: int = 10) -> Tensor:
    """What a student with three logits comes to. Its positions share the logits, and labels follow p exactly."""
    labels = torch.repeat_interleave(torch.arange(3), (P * positions).round().long())
    targets = select(P.log().repeat(positions, 1), Selection(k=k))
    logits = torch.tensor([0.3, 0.0, -0.2], dtype=torch.float64).requires_grad_()
    optimiser = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = sparse_kd_loss_from_logits(logits.expand(positions, 3), targets, labels=labels, tail=tail)
        loss.backward()
        return loss

    optimiser.step(closure)
    return logits.detach().softmax(-1)


@pytest.mark.parametrize(
    ("tail", "k", "fixed_point"),
    [
        ("none", 2, [2 / 3, 1 / 3, 0.0]),
        ("renormalise", 2, [2 / 3, 1 / 3, 0.0]),
        ("label", 1, [1.4 * 0.6, 0.4 * 0.3, 0.4 * 0.1]),
        ("label", 2, [1.1 * 0.6, 1.1 * 0.3, 0.1 * 0.1]),
        ("label-sample", 1, [0.6, 0.3, 0.1]),
        ("uniform", 1, [0.6, 0.2, 0.2]),
        ("bucket", 2, [0.6, 0.3, 0.1]),
    ],
)
def test_the_fixed_point_of_each_tail(tail: str, k: int, fixed_point: list[float]) -> None:
    assert (converged(tail, k) - torch.tensor(fixed_point).double()).abs().max() < 1e-4


def test_the_fixed_points_of_a_bucket_of_two_are_a_line() -> None:
    """The kept probability and the tail's mass are the teacher's; the shape of the tail is the student's own."""
    found = converged("bucket", 1)
    assert found[0].item() == pytest.approx(0.6, abs=1e-4)
    assert abs(found[1].item() - 0.3) > 0.02
