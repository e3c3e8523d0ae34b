"""The loss of sampled targets against dense float64: unbiased, with gradient q - w, and safe for every single draw."""

from __future__ import annotations

import math

import pytest
import torch

from kdcache import Selection, select, sparse_kd_loss, sparse_kd_loss_from_logits
from kdcache.errors import TargetError
from kdcache.losses import measure_positions
from tests.sampling import dense

N, D, V = 12, 16, 120
RULES = (
    Selection(kind="ipps", k=6),
    Selection(kind="ipps", k=6, force_label=True),
    Selection(kind="ipps", k=6, tau=0.05),
    Selection(kind="sample", draws=10),
    Selection(kind="sample", draws=10, force_label=True),
)


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, D, generator=g).double(), torch.randn(V, D, generator=g).double() / 2
    bias, teacher = torch.randn(V, generator=g).double(), 2 * torch.randn(N, V, generator=g)
    return hidden, weight, bias, teacher, torch.randint(V, (N,), generator=g)


@pytest.mark.long
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_the_mean_over_draws_is_the_dense_cross_entropy(rule: Selection, temperature: float) -> None:
    hidden, weight, bias, teacher, labels = problem()
    rule = Selection(**{**rule.to_fields(), "sample_temperature": temperature})
    logits, seeds = (hidden @ weight.T + bias).float(), 1000
    p, logq = (teacher.double() / temperature).softmax(-1), (logits.double() / temperature).log_softmax(-1)
    exact = -(p * logq).sum(-1) * temperature**2
    keys = torch.cartesian_prod(torch.arange(seeds), torch.arange(N), torch.zeros(1, dtype=torch.int64))
    targets = select(teacher.repeat(seeds, 1), rule, labels=labels.repeat(seeds), temperatures=(1.0, 2.0), keys=keys)
    each = torch.tensor(
        [
            sparse_kd_loss_from_logits(logits, targets[i * N : i * N + N], temperature=temperature).item()
            for i in range(seeds)
        ],
        dtype=torch.float64,
    )
    error = each.std() / math.sqrt(seeds)
    assert abs(each.mean() - exact.mean()) < 4 * error
    assert error < 0.015 * exact.mean()  # or the line above would prove nothing
    # Not the entropy of the draw: subtracting sum w log w, and then adding the true entropy, is off by far more.
    drawn = torch.special.entr(targets.weights.double()).sum(-1).mean() * temperature**2
    true = torch.special.entr(p).sum(-1).mean() * temperature**2
    assert abs(drawn - true) > 15 * error


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_value_and_gradient_of_one_draw(rule: Selection, temperature: float) -> None:
    hidden, weight, bias, teacher, labels = problem()
    rule = Selection(**{**rule.to_fields(), "sample_temperature": temperature})
    targets = select(teacher, rule, labels=labels, temperatures=(1.0, 2.0))
    w = dense(targets, V)
    for leaf in (hidden, weight, bias):
        leaf.requires_grad_()
    copies = [x.detach().clone().requires_grad_() for x in (hidden, weight, bias)]
    ours = sparse_kd_loss(hidden, weight, targets, labels=labels, temperature=temperature, soft_weight=0.7, bias=bias)
    logits = copies[0] @ copies[1].T + copies[2]
    soft = -(w * (logits / temperature).log_softmax(-1)).sum(-1).mean() * temperature**2
    exact = 0.7 * soft + 0.3 * torch.nn.functional.cross_entropy(logits, labels)
    assert ours.item() == pytest.approx(exact.item(), abs=1e-6)
    ours.backward()
    exact.backward()
    for leaf, copy in zip((hidden, weight, bias), copies, strict=True):
        torch.testing.assert_close(leaf.grad, copy.grad, atol=1e-6, rtol=1e-5)
    free = logits.detach().requires_grad_()
    sparse_kd_loss_from_logits(free, targets, temperature=temperature, num_items=1).backward()
    q = (logits.detach() / temperature).softmax(-1)
    torch.testing.assert_close(free.grad, (q - w) * temperature, atol=2e-6, rtol=0)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_draw_is_bounded_below_and_blind_to_a_shift(rule: Selection) -> None:
    *_, teacher, labels = problem()
    targets = select(teacher, rule, labels=labels)
    for scale in (0.0, 1.0, 100.0):
        logits = scale * teacher.double()
        loss = sparse_kd_loss_from_logits(logits, targets)
        assert loss >= 0
        assert sparse_kd_loss_from_logits(logits + 1000, targets).item() == pytest.approx(loss.item(), abs=1e-9)


def test_micro_batches_padding_and_masks() -> None:
    *_, teacher, labels = problem()
    labels[::4] = -100
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    targets = select(teacher, Selection(kind="sample", draws=10), labels=labels)
    assert targets.count.unique().numel() > 1  # so some are padded
    keep = labels != -100
    whole = sparse_kd_loss_from_logits(logits, targets, labels=labels)
    assert whole.item() == pytest.approx(sparse_kd_loss_from_logits(logits[keep], targets[keep]).item(), abs=1e-12)
    total = int(keep.sum())
    parts = sum(
        sparse_kd_loss_from_logits(logits[s], targets[s], labels=labels[s], num_items=total)
        for s in (slice(0, 5), slice(5, N))
    )
    assert parts.item() == pytest.approx(whole.item(), abs=1e-12)


def test_other_temperatures_are_refused() -> None:
    *_, teacher, _ = problem()
    targets = select(teacher, Selection(kind="ipps", k=6), temperatures=(1.0, 2.0))
    with pytest.raises(TargetError, match="ipps targets drawn at temperature 1 say nothing of temperature 2"):
        sparse_kd_loss_from_logits(torch.zeros(N, V), targets, temperature=2.0)


def test_the_reported_divergence_is_an_estimate_of_the_dense_one() -> None:
    *_, teacher, labels = problem()
    logits = teacher + torch.randn(N, V, generator=torch.Generator().manual_seed(9))
    exact = (teacher.double().softmax(-1) * (teacher.double().log_softmax(-1) - logits.double().log_softmax(-1))).sum(
        -1
    )
    seeds = 2000
    targets = select(teacher.repeat(seeds, 1), Selection(kind="ipps", k=6), labels=labels.repeat(seeds))
    found = measure_positions(logits.repeat(seeds, 1), targets, labels.repeat(seeds))
    kl = found["kl"].double().view(seeds, N)
    z = (kl.mean(0) - exact) / (kl.std(0) / math.sqrt(seeds))
    assert (z.abs() < 4.5).all()
    assert (kl < 0).any()  # an estimate may be
    assert found["top1_agreement"].mean() > 0
    soft = select(teacher, Selection(kind="ipps", k=6, sample_temperature=2.0), labels=labels, temperatures=(1.0, 2.0))
    assert "kl" not in measure_positions(logits, soft, labels)
