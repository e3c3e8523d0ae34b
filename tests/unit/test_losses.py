"""Losses and their gradients against dense float64 autograd."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kdcache import (
    Selection,
    SparseTargets,
    linear_lse_gather,
    select,
    sparse_kd_loss,
    sparse_kd_loss_from_logits,
)
from kdcache.errors import ConfigError, TargetError

N, D, V = 40, 16, 300


def problem(dtype: torch.dtype, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64)
    weight = scale * torch.randn(V, D, generator=g, dtype=torch.float64)
    bias = torch.randn(V, generator=g, dtype=torch.float64)
    teacher = 2 * torch.randn(N, V, generator=g, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), bias.to(dtype), teacher


def dense(logits: torch.Tensor, teacher: torch.Tensor, ids: torch.Tensor, t: float) -> torch.Tensor:
    """Per-position KL over the entries and one tail, float64, formed from dense distributions."""
    p, q = (teacher.double() / t).softmax(-1), (logits.double() / t).softmax(-1)
    mask = torch.zeros_like(p).scatter(-1, ids.long(), 1.0).bool()
    kept = torch.where(mask, p * (p.log() - q.log()), 0.0).sum(-1)
    r, s = (p * ~mask).sum(-1), (q * ~mask).sum(-1)
    return kept + torch.where(r > 0, r * (r.clamp(min=1e-300).log() - s.clamp(min=1e-300).log()), 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_primitive_and_its_gradients(dtype: torch.dtype, with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdcache.losses._TILE_ELEMENTS", 7 * V)  # several tiles, the last one short
    hidden, weight, bias, _ = problem(dtype)
    ids = torch.randint(V, (N, 5), generator=torch.Generator().manual_seed(3))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()] + ([bias.requires_grad_()] if with_bias else [])
    lse, gathered = linear_lse_gather(hidden, weight, ids, bias if with_bias else None)
    pull = torch.randn(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (lse.double() @ pull + (gathered.double() * pull[:, None]).sum()).backward()
    mine = [leaf.grad for leaf in leaves]

    def reference(kind: torch.dtype) -> list[torch.Tensor]:
        copies = [leaf.detach().to(kind).requires_grad_() for leaf in leaves]
        logits = torch.nn.functional.linear(copies[0], copies[1], copies[2] if with_bias else None)
        value = logits.logsumexp(-1).double() @ pull + (logits.gather(-1, ids).double() * pull[:, None]).sum()
        value.backward()
        return [logits.logsumexp(-1).detach().double(), *(c.grad.double() for c in copies)]

    exact, naive = reference(torch.float64), reference(dtype)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    names = ("lse", "hidden", "weight", "bias")[: len(exact)]
    for name, ours, plain, true in zip(names, [lse.detach(), *mine], naive, exact, strict=True):
        # No worse than the plain computation in the same dtype, and a last place.
        allowed = (plain - true).abs().max() + 4 * torch.finfo(dtype).eps * true.abs().max() * (name != "lse") + 1e-6
        assert (ours.double() - true).abs().max() <= allowed, name


def test_gradcheck() -> None:
    hidden, weight, bias, teacher = problem(torch.float64)
    hidden, weight, bias = hidden[:4], weight[:30], bias[:30]
    targets = select(teacher[:4, :30], Selection(k=5), temperatures=(1.0, 2.0))
    targets = targets._map(lambda x: x.double() if x.is_floating_point() else x)
    labels = torch.tensor([3, -100, 7, 9])
    for leaf in (hidden, weight, bias):
        leaf.requires_grad_()

    def value(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return sparse_kd_loss(h, w, targets, labels=labels, temperature=2.0, soft_weight=0.7, bias=b)

    assert torch.autograd.gradcheck(value, (hidden, weight, bias))

    def primitive(h: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        lse, gathered = linear_lse_gather(h, w, labels[:, None].clamp(min=0), b)
        return lse.sum() + gathered.square().sum()

    assert torch.autograd.gradcheck(primitive, (hidden, weight, bias))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("soft_weight", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("kind", ["topk", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_against_dense(
    dtype: torch.dtype, kind: str, soft_weight: float, temperature: float
) -> None:
    hidden, weight, bias, teacher = problem(dtype)
    targets = select(teacher, Selection(kind=kind, k=9), temperatures=(1.0, 2.0))
    labels = torch.randint(V, (N,), generator=torch.Generator().manual_seed(5))
    labels[::3] = -100
    keep = labels != -100
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    copies = [x.detach().double().requires_grad_() for x in leaves]

    ours = sparse_kd_loss(
        hidden, weight, targets, labels=labels, temperature=temperature, soft_weight=soft_weight, bias=bias
    )
    logits = torch.nn.functional.linear(*copies)
    soft = dense(logits, teacher, targets.ids, temperature)[keep].mean() * temperature**2
    hard = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100)
    exact = soft_weight * soft + (1 - soft_weight) * hard
    slack = 1e-5
    assert ours.item() == pytest.approx(exact.item(), abs=slack)
    ours.backward()
    exact.backward()
    for leaf, copy in zip(leaves, copies, strict=True):
        torch.testing.assert_close(leaf.grad.double(), copy.grad, atol=slack * copy.grad.abs().max().item(), rtol=0)

    from_logits = torch.nn.functional.linear(hidden, weight, bias).detach().requires_grad_()
    again = sparse_kd_loss_from_logits(
        from_logits, targets, labels=labels, temperature=temperature, soft_weight=soft_weight
    )
    assert again.item() == pytest.approx(ours.item(), abs=1e-6)
    again.backward()
    assert (from_logits.grad[~keep] == 0).all()


def test_an_identical_student_has_no_loss_and_no_gradient() -> None:
    teacher = problem(torch.float32)[3].float()
    teacher[:, 0] += torch.linspace(0, 30, N)  # up to 1 - 1e-8 on one entry
    for k in (1, 5, V):
        targets = select(teacher, Selection(k=k))
        logits = teacher.clone().requires_grad_()
        loss = sparse_kd_loss_from_logits(logits, targets)
        loss.backward()
        assert abs(loss.item()) < 1e-6
        assert logits.grad.abs().max() * N < 4e-6  # 2 ulp of a float32 partition near 30


def test_the_bucket_never_exceeds_the_dense_divergence() -> None:
    _, _, _, teacher = problem(torch.float64)
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(9))
    full = sparse_kd_loss_from_logits(logits, select(teacher, Selection(kind="full")))
    previous = 0.0
    for k in (1, 4, 16, 64, 256):
        coarse = sparse_kd_loss_from_logits(logits, select(teacher, Selection(k=k))).item()
        assert previous - 1e-6 <= coarse <= full.item() + 1e-6  # finer outcomes see more
        previous = coarse


def test_padded_entries_do_not_count() -> None:
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(9))
    targets = select(problem(torch.float64)[3], Selection(k=4))
    assert targets.ids[:, 0].ne(0).any()
    pad = torch.nn.functional.pad
    padded = dataclasses.replace(
        targets,
        ids=pad(targets.ids, (0, 3)),
        logprobs=pad(targets.logprobs, (0, 3), value=-torch.inf),
        weights=pad(targets.weights, (0, 3)),
    )
    assert torch.equal(sparse_kd_loss_from_logits(logits, padded), sparse_kd_loss_from_logits(logits, targets))


def test_positions_without_a_target_do_not_count() -> None:
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(9))
    targets = select(problem(torch.float64)[3], Selection(k=4))
    half = dataclasses.replace(targets, count=torch.where(torch.arange(N) % 2 == 0, 4, 0))
    even = torch.arange(N) % 2 == 0
    assert torch.equal(
        sparse_kd_loss_from_logits(logits, half), sparse_kd_loss_from_logits(logits[even], targets[even])
    )


def test_micro_batches_add_up_to_the_step() -> None:
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    targets = select(problem(torch.float64)[3], Selection(k=4))
    labels = torch.where(torch.arange(N) < 25, torch.arange(N), -100)  # uneven halves
    whole = sparse_kd_loss_from_logits(logits, targets, labels=labels, soft_weight=0.5)
    parts = sum(
        sparse_kd_loss_from_logits(logits[s], targets[s], labels=labels[s], soft_weight=0.5, num_items=25)
        for s in (slice(0, 20), slice(20, N))
    )
    assert parts.item() == pytest.approx(whole.item(), abs=1e-12)


def test_nothing_labelled_is_zero_and_differentiable() -> None:
    logits = torch.randn(4, V, requires_grad=True)
    targets = select(torch.randn(4, V), Selection(k=4))
    loss = sparse_kd_loss_from_logits(logits, targets, labels=torch.full((4,), -100), soft_weight=0.5)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def bad(targets: SparseTargets, **options: object) -> None:
    sparse_kd_loss_from_logits(torch.zeros(N, V), targets, **options)  # type: ignore[arg-type]


def test_bad_settings() -> None:
    targets = select(torch.randn(N, V), Selection(k=4))
    for options, words in (
        ({"loss": "kl"}, "loss 'kl' is not one of"),
        ({"tail": "ghost"}, "tail 'ghost' is not one of"),
        ({"soft_weight": 1.5}, "outside"),
        ({"temperature": -1.0}, "not positive"),
        ({"soft_weight": 0.0}, "nothing to learn from"),
    ):
        with pytest.raises(ConfigError, match=words):
            bad(targets, **options)
    with pytest.raises(TargetError, match="temperature 2 is not exact"):
        bad(targets, temperature=2.0)
