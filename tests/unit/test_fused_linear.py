"""The primitive and its surroundings: tiles, dtypes, autocast, tied and padded heads, accumulation, compile, memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache import Selection, linear_lse_gather, select, sparse_kd_loss, sparse_kd_loss_from_logits
from kdcache.losses import LinearHead, logit_sources
from kdcache.losses.fused_linear import TILE_ELEMENTS
from tests.bounds import ROOM, ROUNDINGS, require_close
from tests.oracle import step_loss

N, D, V = 40, 16, 300


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, of unequal sizes."""
    monkeypatch.setitem(TILE_ELEMENTS, "cpu", 0)
    monkeypatch.setattr("kdcache.losses.fused_linear.LEAST_POSITIONS", 7)


def head(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((N, D), (V, D), (V,))
    hidden, weight, bias = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def teacher() -> Tensor:
    return 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def labels() -> Tensor:
    found = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    found[::6] = -100
    return found


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_the_primitive_and_its_gradients(dtype: torch.dtype, with_bias: bool) -> None:
    leaves = head(dtype)[: 3 if with_bias else 2]
    ids = torch.randint(V, (N, 5), generator=torch.Generator().manual_seed(3))
    ids[:, 3] = ids[:, 1]  # an id may be asked for twice
    pull = torch.randn(N, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    lse, gathered = linear_lse_gather(leaves[0], leaves[1], ids, *leaves[2:])
    (lse.double() @ pull + (gathered.double() * pull[:, None]).sum()).backward()
    mine = [leaf.grad for leaf in leaves]

    def reference(kind: torch.dtype) -> list[Tensor]:
        copies = [leaf.detach().to(kind).requires_grad_() for leaf in leaves]
        logits = torch.nn.functional.linear(*copies)
        value = logits.logsumexp(-1).double() @ pull + (logits.gather(-1, ids).double() * pull[:, None]).sum()
        value.backward()
        return [logits.logsumexp(-1).detach().double(), *(c.grad.double() for c in copies)]

    exact, naive = reference(torch.float64), reference(dtype)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    names = ("lse", "hidden", "weight", "bias")[: len(exact)]
    for name, ours, plain, true in zip(names, [lse.detach(), *mine], naive, exact, strict=True):
        require_close(ours, true, dtype, plain, what=name)


@pytest.mark.usefixtures("small_tiles")
def test_gradcheck() -> None:
    hidden, weight, bias = (
        x[:n].detach().requires_grad_() for x, n in zip(head(torch.float64), (9, 30, 30), strict=True)
    )
    ids = torch.randint(30, (9, 4), generator=torch.Generator().manual_seed(3))

    def primitive(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        lse, gathered = linear_lse_gather(h, w, ids, b)
        return lse.sum() + gathered.square().sum()

    assert torch.autograd.gradcheck(primitive, (hidden, weight, bias))


def test_nothing_is_nothing() -> None:
    hidden, weight, _ = head()
    lse, gathered = linear_lse_gather(hidden[:0], weight, torch.zeros(0, 3, dtype=torch.int64))
    assert lse.shape == (0,) and gathered.shape == (0, 3)
    (lse.sum() + gathered.sum()).backward()
    assert (weight.grad == 0).all()


def loss_and_gradients(leaves: tuple[Tensor, ...], **options: Any) -> list[Tensor]:
    targets = select(teacher(), Selection(k=9), temperatures=(1.0, 2.0))
    value = sparse_kd_loss(
        leaves[0], leaves[1], targets, labels=labels(), bias=leaves[2], temperature=2.0, soft_weight=0.7, **options
    )
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def textbook(leaves: tuple[Tensor, ...], logits: Tensor) -> list[Tensor]:
    ids = select(teacher(), Selection(k=9)).ids
    value = step_loss(logits, teacher()[:, : logits.shape[1]], ids, labels(), "forward-kl", "bucket", 2.0, 0.7)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def test_tiles_do_not_show(small_tiles: None) -> None:
    many = loss_and_gradients(head(torch.float64))
    TILE_ELEMENTS["cpu"] = 1 << 23
    for one, other in zip(many, loss_and_gradients(head(torch.float64)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-14, rtol=1e-12)


def test_both_ways_agree_and_masked_positions_have_no_gradient() -> None:
    leaves = head(torch.float64)
    value, *grads = loss_and_gradients(leaves)
    logits = torch.nn.functional.linear(*leaves)
    targets = select(teacher(), Selection(k=9), temperatures=(1.0, 2.0))
    other = sparse_kd_loss_from_logits(logits, targets, labels=labels(), temperature=2.0, soft_weight=0.7)
    assert value.item() == pytest.approx(other.item(), abs=1e-14)
    for mine, true in zip(grads, torch.autograd.grad(other, leaves), strict=True):
        torch.testing.assert_close(mine, true, atol=1e-13, rtol=1e-12)
    assert (grads[0][labels() == -100] == 0).all()


@pytest.mark.parametrize(("logit_scale", "softcap"), [(0.25, None), (1.0, 5.0), (3.0, 10.0)])
def test_what_a_model_does_after_its_head(logit_scale: float, softcap: float | None) -> None:
    leaves = head(torch.float64)
    ours = loss_and_gradients(leaves, logit_scale=logit_scale, softcap=softcap)
    logits = torch.nn.functional.linear(*leaves) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    for mine, true in zip(ours, textbook(leaves, logits), strict=True):
        torch.testing.assert_close(mine, true, atol=1e-7 * true.abs().max().item(), rtol=1e-6)


def test_padded_rows_of_the_head_do_not_exist() -> None:
    leaves = head(torch.float64)
    hidden = leaves[0].detach().requires_grad_()
    weight, bias = (torch.cat([x.detach(), 100 + x.detach()[:5]]).requires_grad_() for x in leaves[1:])
    value, *padded = loss_and_gradients((hidden, weight, bias), vocab_size=V)
    exact, *plain = loss_and_gradients(leaves)
    require_close(value, exact, torch.float64, what="value")
    for mine, true in zip(padded, plain, strict=True):
        require_close(mine[: len(true)], true, torch.float64, what="gradient")
        assert (mine[len(true) :] == 0).all()


def test_tied_embeddings_and_accumulation() -> None:
    """The head is also what the hidden states come from; two micro-batches add up to the step."""
    torch.manual_seed(0)
    tokens = torch.randint(V, (N,))
    targets = select(teacher(), Selection(k=9))
    told = labels()
    items = int((told != -100).sum())

    def gradient(parts: list[slice], way: str) -> Tensor:
        weight = head(torch.float64)[1].detach().requires_grad_()
        for s in parts:
            hidden = torch.tanh(weight[tokens[s]])
            options: dict[str, Any] = {"labels": told[s], "soft_weight": 0.5, "num_items": items}
            if way == "fused":
                sparse_kd_loss(hidden, weight, targets[s], **options).backward()
            else:
                sparse_kd_loss_from_logits(hidden @ weight.T, targets[s], **options).backward()
        assert weight.grad is not None
        return weight.grad

    whole = gradient([slice(0, N)], "logits")
    for parts in ([slice(0, N)], [slice(0, 13), slice(13, N)]):
        torch.testing.assert_close(gradient(parts, "fused"), whole, atol=1e-14, rtol=1e-12)


def test_a_loss_that_is_scaled_or_run_through_twice() -> None:
    leaves = head(torch.float64)
    targets = select(teacher(), Selection(k=9))
    loss = sparse_kd_loss(leaves[0], leaves[1], targets)
    one = torch.autograd.grad(loss, leaves[:2], retain_graph=True)
    for factor in (1.0, 3.0, 0.0, 1.0):
        again = torch.autograd.grad(factor * loss, leaves[:2], retain_graph=True)
        for a, b in zip(again, one, strict=True):
            torch.testing.assert_close(a, factor * b, atol=0, rtol=1e-12)


def test_a_head_that_does_not_learn() -> None:
    hidden, weight, bias = head()
    targets = select(teacher(), Selection(k=9))
    sparse_kd_loss(hidden, weight.detach(), targets, bias=bias.detach()).backward()
    assert hidden.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not sparse_kd_loss(hidden, weight, targets).requires_grad
    with torch.inference_mode():
        assert sparse_kd_loss(hidden, weight, targets) > 0


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [((a.double() - b.double()).abs().max() / b.abs().max()).item() for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("way", ["parameters", "autocast", "half operands"])
def test_half_precision(way: str, small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 parameters, autocast over float32 ones, and the halves that a GPU multiplies: float32 in between."""
    dtype = torch.float32 if way == "autocast" else torch.bfloat16
    leaves = head(dtype)
    copies = tuple(x.detach().double().requires_grad_() for x in leaves)
    exact = textbook(copies, torch.nn.functional.linear(*copies))
    if way == "half operands":
        monkeypatch.setattr(logit_sources, "_operand_dtype", lambda *_: torch.bfloat16)
        monkeypatch.setattr(logit_sources, "_BLOCK", 64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way == "autocast"):
        ours = loss_and_gradients(leaves)
        lse, _ = linear_lse_gather(leaves[0], leaves[1], torch.zeros(N, 1, dtype=torch.int64), leaves[2])
        naive = textbook(leaves, torch.nn.functional.linear(*leaves))
    assert ours[0].dtype == lse.dtype == torch.float32 and all(g.dtype == dtype for g in ours[1:])
    for mine, plain in zip(errors(ours, exact), errors(naive, exact), strict=True):
        assert mine <= ROOM * plain + ROUNDINGS[torch.float32] * 2**-24
    if way == "parameters":  # one rounding to bfloat16 at the end, and nothing else
        assert max(errors(ours, exact)) < 2**-8


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch looks, at a graph break
def test_in_a_compiled_step() -> None:
    leaves = head()
    targets, told = select(teacher(), Selection(k=9)), labels()

    def step(hidden: Tensor, weight: Tensor) -> Tensor:
        return sparse_kd_loss(torch.tanh(hidden * 2), weight, targets, labels=told, soft_weight=0.6) * 2

    compiled = torch.compile(step, backend="aot_eager")
    plain, found = step(*leaves[:2]), compiled(*leaves[:2])
    assert found.item() == pytest.approx(plain.item(), rel=1e-6)
    for a, b in zip(torch.autograd.grad(found, leaves[:2]), torch.autograd.grad(plain, leaves[:2]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant: bool) -> None:
    """Of the body, as in training; and of the loss as well."""
    from torch.utils.checkpoint import checkpoint

    leaves = head(torch.float64)
    targets = select(teacher(), Selection(k=9))

    def body(hidden: Tensor) -> Tensor:
        return torch.tanh(hidden).square()

    def whole(hidden: Tensor, weight: Tensor) -> Tensor:
        return sparse_kd_loss(body(hidden), weight, targets)

    plain = torch.autograd.grad(whole(*leaves[:2]), leaves[:2])
    for value in (
        sparse_kd_loss(checkpoint(body, leaves[0], use_reentrant=reentrant), leaves[1], targets),
        checkpoint(whole, *leaves[:2], use_reentrant=reentrant),
    ):
        for leaf in leaves:
            leaf.grad = None
        value.backward()
        for leaf, true in zip(leaves[:2], plain, strict=True):
            torch.testing.assert_close(leaf.grad, true, atol=1e-14, rtol=1e-12)


def test_the_weights_gradient_is_handed_over_not_copied() -> None:
    """Twice the size of a head is what a run at V = 128k cannot spare."""
    hidden, weight, _ = head()
    made: list[int] = []
    inner = LinearHead.gradients

    def spy(self: LinearHead) -> Any:
        found = inner(self)
        made.append(found[1].data_ptr())
        return found

    patch = pytest.MonkeyPatch()
    patch.setattr(LinearHead, "gradients", spy)
    sparse_kd_loss(hidden, weight, select(teacher(), Selection(k=9))).backward()
    patch.undo()
    assert weight.grad is not None and made == [weight.grad.data_ptr()]
