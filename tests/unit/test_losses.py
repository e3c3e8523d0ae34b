"""Every loss, tail and temperature against dense float64 autograd; what must vanish, and what must not count."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache import Selection, SparseTargets, select, sparse_kd_loss, sparse_kd_loss_from_logits
from kdcache.errors import ConfigError, TargetError
from kdcache.losses import register_divergence, target_losses
from kdcache.losses.divergence_registry import _FAMILIES, find_divergence
from tests.bounds import ROUNDINGS, require_close
from tests.oracle import COMBINATIONS, DIVERGENCES, STEPS, SUMS, TAILS, coarse, position_losses, step_loss, targets_of

N, D, V, K = 40, 16, 300, 9
BIASED = ("none", "renormalise", "renormalise-both", "label", "uniform")


@pytest.fixture(autouse=True)
def warned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if every biased tail had been warned of."""
    monkeypatch.setattr(target_losses, "_warned", set(BIASED))
    yield


@dataclasses.dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher: Tensor  # [N, V] float64
    labels: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.hidden, self.weight, self.bias


def problem(dtype: torch.dtype, peaked: bool = False) -> Problem:
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64)
    weight, bias = torch.randn(V, D, generator=g).double(), torch.randn(V, generator=g).double()
    teacher = 2 * torch.randn(N, V, generator=g, dtype=torch.float64)
    if peaked:
        teacher[:, 7] += torch.linspace(0, 30, N)
    labels = torch.randint(V, (N,), generator=g)
    labels[::2] = teacher.argmax(-1)[::2]  # so that labels are entries and are not
    labels[::5] = -100
    return Problem(*(x.to(dtype) for x in (hidden, weight, bias)), teacher, labels)


def gradients(value: Tensor, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    return [x.double() for x in torch.autograd.grad(value, leaves)]


def require_as_exact_as_naive(given: Problem, targets: SparseTargets, **options: Any) -> None:
    """Value and gradients are as near to float64 as the textbook's formula in the same dtype, within `bound`."""
    names = ("loss", "tail", "temperature", "soft_weight")
    assert set(options) == set(names)

    def textbook(dtype: torch.dtype) -> list[Tensor]:
        leaves = tuple(x.detach().to(dtype).requires_grad_() for x in given.leaves)
        logits = torch.nn.functional.linear(*leaves)
        value = step_loss(logits, given.teacher, targets.ids, given.labels, *(options[name] for name in names))
        return [value.detach().double(), *gradients(value, leaves)]

    leaves = tuple(x.detach().requires_grad_() for x in given.leaves)
    value = sparse_kd_loss(leaves[0], leaves[1], targets, labels=given.labels, bias=leaves[2], **options)
    ours = [value.detach().double(), *gradients(value, leaves)]
    exact, naive = textbook(torch.float64), textbook(leaves[0].dtype)
    # A gradient is a sum over V ids that cancel; some processors add them one by one, at the cost of V / 2 roundings.
    single = leaves[0].dtype == torch.float32
    roundings = max(ROUNDINGS[torch.float32], len(leaves[1]) / 4) if single else None
    for name, mine, plain, true in zip(("value", "hidden", "weight", "bias"), ours, naive, exact, strict=True):
        require_close(mine, true, leaves[0].dtype, plain, roundings, what=name)


@pytest.mark.parametrize(("dtype", "soft_weight"), [(torch.float32, 1.0), (torch.float64, 0.6)], ids=str)
@pytest.mark.parametrize(("loss", "tail", "temperature"), STEPS)
def test_value_and_gradient_against_dense(
    loss: str, tail: str, temperature: float, soft_weight: float, dtype: torch.dtype
) -> None:
    for peaked in (False, True):
        given = problem(dtype, peaked)
        if dtype == torch.float64:  # or what the float32 of a cache rounds would be all there is to see
            targets = targets_of(given.teacher, K, (1.0, 2.0), given.labels)
        else:
            labels = given.labels.clamp(min=0)
            targets = select(given.teacher, Selection(k=K), labels=labels, temperatures=(1.0, 2.0))
        options = {"loss": loss, "tail": tail, "temperature": temperature, "soft_weight": soft_weight}
        require_as_exact_as_naive(given, targets, **options)


ONE_OF_EACH = [
    *((loss, "bucket") for loss in (*DIVERGENCES, "decoupled-kl", SUMS[0]) if loss.count(":") < 2 or "tail" in loss),
    *(("forward-kl", tail) for tail in TAILS),
    ("jsd", "label"),
    ("skew-kl", "renormalise"),
]
"""Fewer than `COMBINATIONS`, where each takes a while. `tvd` has a slope that jumps, and on real rows it may well be at
the jump when it is normalised over a few entries: its own tests are above."""


@pytest.mark.long
@pytest.mark.assets
@pytest.mark.parametrize(("loss", "tail"), ONE_OF_EACH)
def test_on_real_rows(loss: str, tail: str, real: Problem) -> None:
    for temperature in (1.0, 2.0)[: 1 if tail == "label-sample" else 2]:
        labels = real.labels.clamp(min=0)
        targets = select(real.teacher, Selection(k=16), labels=labels, temperatures=(1.0, 2.0))
        options = {"loss": loss, "tail": tail, "temperature": temperature, "soft_weight": 0.7}
        require_as_exact_as_naive(real, targets, **options)


@pytest.fixture(scope="module", params=[("stories260K", 257), ("lab32k", 33)], ids=lambda param: param[0])
def real(assets: Path, request: pytest.FixtureRequest) -> Problem:
    """A trained model as teacher, on text it knows; the student is that model, its hidden states disturbed."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, length = request.param
    folder = assets / "models" / name
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer((assets / "text/tinystories.txt").read_text()[:1500], return_tensors="pt").input_ids[:, :length]
    with torch.no_grad():
        hidden = model.model(input_ids=tokens).last_hidden_state[0, :-1]
        weight = model.get_output_embeddings().weight.detach().clone()
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
    labels = tokens[0, 1:].clone()
    labels[::7] = -100
    bias = torch.zeros(len(weight))
    return Problem(hidden + 0.3 * hidden.std() * noise, weight, bias, (hidden @ weight.T).double(), labels)


@pytest.mark.long  # the gradients of all are compared with those of dense autograd above
@pytest.mark.parametrize(("loss", "tail"), [x for x in ONE_OF_EACH if x[0] != "adaptive-kl"])  # whose weight is held
def test_gradcheck(loss: str, tail: str) -> None:
    given = problem(torch.float64)
    teacher, labels = given.teacher[:4, :14], torch.tensor([3, -100, 7, 9])
    targets = targets_of(teacher, 5, (1.0, 2.0), labels)
    leaves = (given.hidden[:4, :3].contiguous(), given.weight[:14, :3].contiguous(), given.bias[:14].clone())
    for leaf in leaves:
        leaf.requires_grad_()

    def value(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        temperature = 1.0 if tail == "label-sample" else 2.0
        options: dict[str, Any] = {"loss": loss, "tail": tail, "temperature": temperature, "soft_weight": 0.7}
        return sparse_kd_loss(h, w, targets, labels=labels, bias=b, **options)

    assert torch.autograd.gradcheck(value, leaves)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("tail", ["bucket", *TAILS])
def test_with_everything_kept_every_tail_is_the_dense_divergence(tail: str, temperature: float) -> None:
    given = problem(torch.float64)
    labels = given.labels.clamp(min=0)
    if tail == "label-sample" and temperature != 1:
        return
    logits = torch.nn.functional.linear(*given.leaves).requires_grad_()
    log_p, log_q = ((x / temperature).log_softmax(-1) for x in (given.teacher, logits))
    exact = (log_p.exp() * (log_p - log_q)).sum(-1).mean() * temperature**2
    for selection in (Selection(kind="full"), Selection(k=V)):
        targets = select(given.teacher, selection)
        ours = sparse_kd_loss_from_logits(logits, targets, labels=labels, tail=tail, temperature=temperature)
        assert ours.item() == pytest.approx(exact.item(), rel=1e-6)
        mine, true = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, exact))
        torch.testing.assert_close(mine, true, atol=1e-7 * true.abs().max().item(), rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, V])
@pytest.mark.parametrize("loss", DIVERGENCES)
def test_an_identical_student_has_no_loss_and_no_gradient(loss: str, k: int, temperature: float) -> None:
    """From flat positions to those where the entries hold all but 1e-8 and less, in float32."""
    teacher = 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(0))
    teacher[:, 0] += torch.linspace(0, 30, N)
    targets = select(teacher, Selection(k=k), temperatures=(1.0, 2.0))
    if k < V:
        assert (targets.log_tail[:, 0] < -18).any() and (targets.log_tail[:, 0] > -18).any()
    logits = teacher.clone().requires_grad_()
    value = sparse_kd_loss_from_logits(logits, targets, loss=loss, temperature=temperature, num_items=1)
    (gradient,) = torch.autograd.grad(value, logits)
    assert abs(value.item()) < 1e-6  # the sum of N positions
    assert gradient.abs().max() < 4e-6  # a rounding of the targets' own log p, of logits near 30


@pytest.mark.parametrize("loss", [x for x in DIVERGENCES if x != "tvd"])
def test_divergences_are_never_negative(loss: str) -> None:
    """Students as near to the teacher as float32 allows, and far from it."""
    g = torch.Generator().manual_seed(1)
    teacher = 2 * torch.randn(400, V, generator=g)
    teacher[:, 0] += torch.linspace(0, 30, 400)
    for k in (1, 5, V):
        targets = select(teacher, Selection(k=k))
        for size in (1e-7, 1e-5, 1e-3, 1e-1, 10.0):
            student = teacher + size * torch.randn(teacher.shape, generator=g)
            for i in range(0, 400, 20):
                row = slice(i, i + 1)
                assert sparse_kd_loss_from_logits(student[row], targets[row], loss=loss).item() >= -1e-6


@pytest.mark.parametrize("loss", [x for x in DIVERGENCES if x.partition(":")[0] not in ("adaptive-kl", "alpha-beta")])
def test_a_bucket_never_exceeds_the_dense_divergence(loss: str) -> None:
    teacher = problem(torch.float64).teacher
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(9))
    full = sparse_kd_loss_from_logits(logits, select(teacher, Selection(kind="full")), loss=loss)
    previous = 0.0
    for k in (1, 4, 16, 64, 256):
        found = sparse_kd_loss_from_logits(logits, select(teacher, Selection(k=k)), loss=loss).item()
        assert previous - 1e-6 <= found <= full.item() + 1e-6  # finer outcomes see more
        previous = found


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_a_student_far_off_has_finite_gradients(loss: str) -> None:
    """Logits of some hundreds: entries and tails of the student that no float32 can hold."""
    teacher = 100 * torch.randn(N, V, generator=torch.Generator().manual_seed(0))
    for logits in (-3 * teacher, 3 * teacher, torch.zeros(N, V)):
        for k in (3, V):
            leaf = logits.clone().requires_grad_()
            value = sparse_kd_loss_from_logits(leaf, select(teacher, Selection(k=k)), loss=loss)
            (gradient,) = torch.autograd.grad(value, leaf)
            assert torch.isfinite(value) and torch.isfinite(gradient).all()
            assert gradient.sum(-1).abs().max() <= 1e-7 * max(1.0, value.item())  # blind to a shift


def test_a_tail_too_small_for_float32_is_still_felt() -> None:
    teacher, student = torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.float64)
    teacher[0, 0], student[0, 0] = 2.0, 200.0  # the student's tail is e^-199
    targets = select(teacher, Selection(k=1))
    exact = position_losses(student, teacher, targets.ids, torch.tensor([0]), "forward-kl", "bucket", 1.0).item()
    assert exact > 50
    leaf = student.float().requires_grad_()
    value = sparse_kd_loss_from_logits(leaf, targets)
    assert value.item() == pytest.approx(exact, rel=1e-6)
    (gradient,) = torch.autograd.grad(value, leaf)
    r = targets.log_tail.exp().item()
    torch.testing.assert_close(gradient[0], torch.tensor([r, -r / 3, -r / 3, -r / 3]))


def test_padded_entries_do_not_count() -> None:
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(9))
    given = problem(torch.float64)
    targets = select(given.teacher, Selection(k=4), labels=given.labels.clamp(min=0))
    assert targets.ids[:, 0].ne(0).any()
    pad = torch.nn.functional.pad
    padded = dataclasses.replace(
        targets,
        ids=pad(targets.ids, (0, 3)),
        logprobs=pad(targets.logprobs, (0, 3), value=-torch.inf),
        weights=pad(targets.weights, (0, 3)),
    )
    for loss, tail in COMBINATIONS:
        options: dict[str, Any] = {"labels": given.labels, "loss": loss, "tail": tail}
        one, two = (sparse_kd_loss_from_logits(logits, x, **options) for x in (padded, targets))
        assert one.item() == pytest.approx(two.item(), rel=1e-6), (loss, tail)


def test_positions_without_a_target_do_not_count() -> None:
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(9)).requires_grad_()
    given = problem(torch.float64)
    targets = select(given.teacher, Selection(k=4), labels=given.labels.clamp(min=0))
    even = torch.arange(N) % 2 == 0
    half = targets[even].spread(even.nonzero()[:, 0], N)
    few = sparse_kd_loss_from_logits(logits[even], targets[even]).detach().double()
    require_close(sparse_kd_loss_from_logits(logits, half), few, torch.float32, what="the loss of half of them")
    labels = given.labels.clamp(min=0)
    for loss, tail in COMBINATIONS:  # but their labels do
        options: dict[str, Any] = {"loss": loss, "tail": tail}
        soft = sparse_kd_loss_from_logits(logits[even], targets[even], labels=labels[even], **options)
        hard = torch.nn.functional.cross_entropy(logits, labels)
        both = sparse_kd_loss_from_logits(logits, half, labels=labels, soft_weight=0.7, **options)
        assert both.item() == pytest.approx((0.7 * soft + 0.3 * hard).item(), rel=1e-5), (loss, tail)
        mine, true = (torch.autograd.grad(x, logits)[0] for x in (both, 0.7 * soft + 0.3 * hard))
        torch.testing.assert_close(mine, true, atol=1e-7, rtol=1e-5)


def test_micro_batches_add_up_to_the_step() -> None:
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    targets = select(problem(torch.float64).teacher, Selection(k=4))
    labels = torch.where(torch.arange(N) < 25, torch.arange(N), -100)  # uneven halves
    whole = sparse_kd_loss_from_logits(logits, targets, labels=labels, soft_weight=0.5)
    for items in (25, torch.tensor(25)):
        parts = sum(
            sparse_kd_loss_from_logits(logits[s], targets[s], labels=labels[s], soft_weight=0.5, num_items=items)
            for s in (slice(0, 20), slice(20, N))
        )
        assert parts.item() == pytest.approx(whole.item(), abs=1e-12)


def test_position_weights_scale_the_distillation_term_alone() -> None:
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(9), dtype=torch.float64).requires_grad_()
    given = problem(torch.float64)
    targets, weights = select(given.teacher, Selection(k=4)), torch.rand(N, generator=torch.Generator().manual_seed(2))
    each = torch.stack([sparse_kd_loss_from_logits(logits[i : i + 1], targets[i : i + 1]) for i in range(N)])
    keep = given.labels != -100
    hard = torch.nn.functional.cross_entropy(logits, given.labels, ignore_index=-100)
    exact = 0.8 * (each * weights)[keep].mean() + 0.2 * hard
    options: dict[str, Any] = {"labels": given.labels, "soft_weight": 0.8, "position_weights": weights}
    ours = sparse_kd_loss_from_logits(logits, targets, **options)
    assert ours.item() == pytest.approx(exact.item(), abs=1e-7)
    mine, true = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, exact))
    torch.testing.assert_close(mine, true, atol=1e-8, rtol=1e-6)


def test_nothing_labelled_is_zero_and_differentiable() -> None:
    logits = torch.randn(4, V, requires_grad=True)
    targets = select(torch.randn(4, V), Selection(k=4))
    loss = sparse_kd_loss_from_logits(logits, targets, labels=torch.full((4,), -100), soft_weight=0.5)
    loss.backward()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


def test_a_users_own_divergence() -> None:
    """Hellinger's, squared, in four lines: its gradient is autograd's."""

    def hellinger(log_q: Tensor, log_tail_q: Tensor, teacher: Any, scale: float) -> Tensor:
        p = torch.cat([teacher.log_p, teacher.log_tail[:, None]], -1)
        q = torch.cat([log_q, log_tail_q[:, None]], -1)
        return scale * (1 - ((p + q) / 2).exp().sum(-1))

    register_divergence("hellinger", hellinger, constant=0.5)
    try:
        given = problem(torch.float64)
        targets = targets_of(given.teacher, 5)
        logits = torch.nn.functional.linear(*given.leaves).requires_grad_()
        both = [coarse(x.softmax(-1), targets.ids) for x in (given.teacher, logits)]
        exact = (1 - (both[0] * both[1]).sqrt().sum(-1)).mean()
        for name, scale in (("hellinger", 0.5), ("hellinger:0.25", 0.25)):
            ours = sparse_kd_loss_from_logits(logits, targets, loss=name)
            assert ours.item() == pytest.approx(scale * exact.item(), rel=1e-9)
            mine, true = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (ours, scale * exact))
            torch.testing.assert_close(mine, true, atol=1e-12, rtol=1e-9)
        with pytest.raises(ConfigError, match="is registered already"):
            register_divergence("hellinger", hellinger)
    finally:
        _FAMILIES._values.pop("hellinger")
        find_divergence.cache_clear()


def bad(targets: SparseTargets, **options: Any) -> None:
    sparse_kd_loss_from_logits(torch.zeros(N, V), targets, **options)


def test_bad_settings() -> None:
    targets = select(torch.randn(N, V), Selection(k=4), temperatures=(1.0, 2.0))
    labels = torch.zeros(N, dtype=torch.long)
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"loss": "kl"}, "loss kl is not one of forward-kl, reverse-kl"),
        ({"loss": "forward-kl:0.3"}, "but it takes none"),
        ({"loss": "jsd:1.5"}, "needs a constant between 0 and 1, as in jsd:0.5"),
        ({"loss": "skew-kl:x"}, "needs a constant between 0 and 1, as in skew-kl:0.1"),
        ({"tail": "ghost"}, "tail 'ghost' is not one of"),
        ({"tail": "none", "loss": "jsd"}, "tail 'none' is for loss 'forward-kl' only"),
        ({"tail": "label"}, "tail 'label' needs labels"),
        ({"tail": "label-sample", "labels": labels, "temperature": 2.0}, "labels follow p, not p_T"),
        ({"soft_weight": 1.5}, "outside"),
        ({"temperature": -1.0}, "not positive"),
        ({"soft_weight": 0.0}, "nothing to learn from"),
    )
    for options, words in cases:
        with pytest.raises(ConfigError, match=words):
            bad(targets, **options)
    with pytest.raises(TargetError, match="temperature 3 is not exact"):
        bad(targets, temperature=3.0)
    with pytest.raises(TargetError, match=r"labels are of shape \(39,\), but the student has 40 positions"):
        bad(targets, labels=labels[1:])
    with pytest.raises(TargetError, match=r"targets are of shape \(39,\)"):
        bad(targets[1:])
    with pytest.raises(ConfigError, match=r"logits have shape \(2, 20, 300\)"):
        sparse_kd_loss_from_logits(torch.zeros(2, 20, V), targets)
    with pytest.raises(ConfigError, match=r"\(40, 16\) and a head of \(300, 17\) do not fit"):
        sparse_kd_loss(torch.zeros(N, D), torch.zeros(V, D + 1), targets)
    with pytest.raises(ConfigError, match="vocab_size is 301, but the head has 300 rows"):
        sparse_kd_loss(torch.zeros(N, D), torch.zeros(V, D), targets, vocab_size=V + 1)


@pytest.mark.parametrize("kind", ["ipps", "sample"])
def test_sampled_targets_refuse_what_would_be_biased(kind: str) -> None:
    targets = select(torch.randn(N, V), Selection(kind=kind, **{"draws" if kind == "sample" else "k": 4}))
    for loss in DIVERGENCES:
        if loss != "forward-kl":
            with pytest.raises(TargetError, match=f"loss '{loss}' needs the teacher's probabilities, but {kind}"):
                bad(targets, loss=loss)
    with pytest.raises(TargetError, match="targets have no tail"):
        bad(targets, tail="uniform")


def test_biased_tails_warn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_losses, "_warned", set())
    targets = select(torch.randn(N, V), Selection(k=4))
    labels = torch.zeros(N, dtype=torch.long)
    for tail in BIASED:
        with pytest.warns(UserWarning, match=f"tail '{tail}' is (biased|blind)") as caught:
            bad(targets, tail=tail, labels=labels)
            bad(targets, tail=tail, labels=labels)
        assert len(caught) == 1
    bad(targets, tail="label-sample", labels=labels)  # and this would be an error in a test if it warned
