"""Reverse KL from one drawn token a position: its gradient in the mean, its clip, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache import Pool, Selection, select, sparse_kd_loss, sparse_kd_loss_from_logits
from kdcache.errors import ConfigError, TargetError
from kdcache.losses import Objective
from tests.oracle import targets_of

V = 12
LOSS = "sampled-reverse-kl"


def draw(mu: Tensor, count: int) -> Tensor:
    """`[count, N]` tokens drawn from `[N, V]` probabilities."""
    return torch.multinomial(mu, count, replacement=True, generator=torch.Generator().manual_seed(1)).T


def problem(n: int = 3, moved: float = 0.4) -> tuple[Tensor, Tensor, Tensor]:
    """`[n, V]` float64 logits of the teacher, of the student, and of the student before it moved."""
    g = torch.Generator().manual_seed(0)
    teacher, student = (1.5 * torch.randn(n, V, generator=g, dtype=torch.float64) for _ in range(2))
    return teacher, student, student + moved * torch.randn(n, V, generator=g, dtype=torch.float64)


def drawn_gradients(student: Tensor, teacher: Tensor, mu: Tensor, count: int, loss: str, t: float = 1.0) -> Tensor:
    """`[count, n, V]` gradient of each drawn token's loss in the logits of its position."""
    n = len(student)
    labels = draw(mu, count).reshape(-1)
    targets = targets_of(teacher.repeat(count, 1), 2, (1.0, t) if t != 1 else (1.0,), labels)
    writer = mu.log().repeat(count, 1).gather(-1, labels[:, None])[:, 0]
    leaf = student.repeat(count, 1).requires_grad_()
    options: dict[str, Any] = {"labels": labels, "writer_logp": writer, "num_items": 1, "temperature": t}
    sparse_kd_loss_from_logits(leaf, targets, loss=loss, **options).backward()
    assert leaf.grad is not None
    return leaf.grad.view(count, n, V)


def dense_gradient(student: Tensor, teacher: Tensor, t: float = 1.0) -> Tensor:
    """`[n, V]` of T^2 KL(q_T ‖ p_T) at each position."""
    leaf = student.clone().requires_grad_()
    q, p = (leaf / t).log_softmax(-1), (teacher / t).log_softmax(-1)
    (t**2 * (q.exp() * (q - p)).sum()).backward()
    assert leaf.grad is not None
    return leaf.grad


def require_within(each: Tensor, exact: Tensor, errors: float = 5.0, share: float = 0.05) -> None:
    """The mean of `[count, ...]` is the exact one within some of its standard errors, everywhere."""
    error = each.std(0) / math.sqrt(len(each))
    assert (error > 0).all() and (error < share * exact.abs().max()).all()  # or nothing would be shown
    assert ((each.mean(0) - exact).abs() / error).max() < errors


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_the_mean_gradient_is_that_of_the_dense_reverse_kl(t: float) -> None:
    """Tokens of the student itself (ratios of 1), and of what it was before it moved, with room for every ratio."""
    teacher, student, before = problem()
    exact = dense_gradient(student, teacher, t)
    for mu in ((student / t).softmax(-1), before.softmax(-1)):
        each = drawn_gradients(student, teacher, mu, 20_000, f"{LOSS}:inf", t)
        require_within(each, exact)


def test_over_many_rollouts_it_is_the_dense_gradient_where_the_student_goes() -> None:
    """A bigram student of float64, its whole texts drawn from itself: the gradient in its table, against the dense
    reverse KL of each state, times how often the student is there."""
    texts, length = 4000, 6
    g = torch.Generator().manual_seed(5)
    teacher, table = (1.5 * torch.randn(V, V, generator=g, dtype=torch.float64) for _ in range(2))
    q = table.softmax(-1)
    visits, tokens = [torch.full((V,), 1 / V, dtype=torch.float64)], [torch.randint(V, (texts,), generator=g)]
    for _ in range(length - 1):
        tokens.append(torch.multinomial(q[tokens[-1]], 1, generator=g)[:, 0])
        visits.append(visits[-1] @ q)
    states, labels = (
        torch.stack(tokens[a:b], 1).reshape(-1) for a, b in ((0, -1), (1, None))
    )  # [texts * (length - 1)]
    writer = q.log()[states, labels]
    leaf = table[states].requires_grad_()
    targets = targets_of(teacher[states], 2, labels=labels)
    sparse_kd_loss_from_logits(leaf, targets, labels=labels, loss=LOSS, writer_logp=writer, num_items=1).backward()
    assert leaf.grad is not None
    each = torch.zeros(texts, V, V, dtype=torch.float64)  # the table's gradient of each text
    rows = torch.arange(texts).repeat_interleave(length - 1)
    each.index_put_((rows, states), leaf.grad, accumulate=True)
    visited = torch.stack(visits[:-1]).sum(0)
    require_within(each, visited[:, None] * dense_gradient(table, teacher), share=0.1)


def test_without_the_ratio_it_would_be_off() -> None:
    """So that the test above can fail: the old student's tokens counted as the new one's."""
    teacher, student, before = problem()
    mu = before.softmax(-1)
    each = drawn_gradients(student, teacher, mu, 20_000, f"{LOSS}:inf")
    ratio = (student.softmax(-1) / mu).expand(20_000, -1, -1).gather(-1, draw(mu, 20_000)[..., None])
    error = (each / ratio).std(0) / math.sqrt(len(each))
    assert (((each / ratio).mean(0) - dense_gradient(student, teacher)).abs() / error).max() > 20


def test_value_and_gradient_of_one_token() -> None:
    """min(q / mu, c) (log q - log p)^2 / 2, the ratio held fixed."""
    teacher, student, before = problem(200, moved=1.5)
    labels = draw(before.softmax(-1), 1)[0]
    writer = before.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    for kind, loss, clip in (("topk", LOSS, 2.0), ("topk", f"{LOSS}:1.1", 1.1), ("ipps", LOSS, 2.0)):
        targets = targets_of(teacher, 3, labels=labels)
        if kind == "ipps":
            targets = select(teacher, Selection(kind="ipps", k=3), labels=labels)
        leaves = [student.clone().requires_grad_() for _ in range(2)]
        ours = sparse_kd_loss_from_logits(leaves[0], targets, labels=labels, loss=loss, writer_logp=writer)
        log_q = leaves[1].log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        ratio = (log_q.detach() - writer).exp()
        assert 0.05 < (ratio > clip).double().mean() < 0.8
        log_p = teacher.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
        exact = (ratio.clamp(max=clip) * (log_q - log_p) ** 2 / 2).mean()
        assert ours.item() == pytest.approx(exact.item(), rel=1e-6)
        grads = [torch.autograd.grad(value, leaf)[0] for value, leaf in zip((ours, exact), leaves, strict=True)]
        torch.testing.assert_close(grads[0], grads[1], atol=1e-6 * grads[1].abs().max().item(), rtol=1e-5)


def test_it_may_be_a_term_among_others_and_has_the_weights_of_all() -> None:
    g = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(40, 8, generator=g).double(), torch.randn(V, 8, generator=g).double()
    teacher, _, before = problem(40)
    labels = draw(before.softmax(-1), 1)[0]
    labels[::5] = -100
    counted = labels.clamp(min=0)
    writer = before.log_softmax(-1).gather(-1, counted[:, None])[:, 0]
    weights = torch.rand(40, generator=g).double()
    targets = targets_of(teacher, 4, labels=counted)

    def value(loss: str, pool: Any = targets) -> float:
        given: dict[str, Any] = {"labels": labels, "writer_logp": writer, "position_weights": weights}
        return sparse_kd_loss(hidden, weight, pool, loss=loss, soft_weight=0.8, **given).item()

    hard = value(f"{LOSS}*1e-300")
    parts = value(f"{LOSS}:3") - hard, value("jsd") - hard
    assert value(f"{LOSS}:3*0.5+jsd*2") == pytest.approx(hard + 0.5 * parts[0] + 2 * parts[1], rel=1e-9)
    full = select(teacher, Selection(kind="full"), labels=counted)
    twice = Pool((full, full), (0.75, 0.25))
    for loss in (LOSS, f"{LOSS}:3*0.5+reverse-kl"):
        assert value(loss, twice) == pytest.approx(value(loss, full), rel=1e-7)


def test_a_student_that_agrees_has_nothing_to_learn() -> None:
    teacher, _, before = problem(20)
    labels = teacher.argmax(-1)
    writer = before.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    leaf = teacher.clone().requires_grad_()
    given: dict[str, Any] = {"labels": labels, "writer_logp": writer, "loss": LOSS}
    value = sparse_kd_loss_from_logits(leaf, targets_of(teacher, 3, labels=labels), **given)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert value.item() < 1e-30 and gradient.abs().max() < 1e-15


def test_what_is_missing_is_named() -> None:
    teacher, student, _ = problem(5)
    labels = torch.zeros(5, dtype=torch.int64)
    targets, writer = targets_of(teacher, 3, labels=labels), torch.zeros(5, dtype=torch.float64)
    given: dict[str, Any] = {"loss": LOSS, "writer_logp": writer, "labels": labels}
    cases: tuple[tuple[dict[str, Any], type[Exception], str], ...] = (
        ({"writer_logp": None}, ConfigError, "needs writer_logp, the writer's log-probability of each label"),
        ({"labels": None}, ConfigError, f"loss '{LOSS}' needs labels"),
        ({"writer_logp": writer[1:]}, TargetError, r"writer_logp are of shape \(4,\), but the student has 5"),
        ({"loss": f"{LOSS}:0.5"}, ConfigError, f"needs a clip of at least 1, as in {LOSS}:2"),
        ({"loss": f"{LOSS}:nan"}, ConfigError, "needs a clip of at least 1"),
        ({"tail": "renormalise-both"}, ConfigError, "uses no entries and no tail"),
        ({"temperature": 2.0}, TargetError, "temperature 2 is not exact"),
    )
    for changes, error, words in cases:
        with pytest.raises(error, match=words):
            sparse_kd_loss_from_logits(student, targets, **{**given, **changes})
    unknown = dataclasses.replace(targets, label_logprob=None)
    with pytest.raises(TargetError, match="does not know the teacher's log-probability of the labels"):
        sparse_kd_loss_from_logits(student, unknown, **given)
    assert Objective(loss=f"jsd+{LOSS}*0").takes_rollouts is False
