"""Sums of terms, weights from the student's entropy, logits of -inf, tiny probabilities, and what is given by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache import Selection, SparseTargets, select, sparse_kd_loss, sparse_kd_loss_from_logits
from kdcache.errors import ConfigError, TargetError
from kdcache.losses import Figures, Objective, PositionWeights, StoredLogits, distil, register_divergence
from kdcache.losses import divergence_registry as registry
from kdcache.losses.divergence_registry import read_terms
from tests.oracle import BOUNDED, DIVERGENCES, coarse, targets_of

N, V, K = 30, 50, 5


pytestmark = pytest.mark.usefixtures("tails_have_warned")


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """`[N, V]` float64 logits of teacher and student, and `[N]` labels."""
    g = torch.Generator().manual_seed(0)
    teacher, student = (2 * torch.randn(N, V, generator=g, dtype=torch.float64) for _ in range(2))
    return teacher, student, torch.randint(V, (N,), generator=g)


def test_terms_are_read() -> None:
    for text, terms in (
        ("jsd", [("jsd", 1.0)]),
        ("forward-kl*0.7+jsd:0.5*0.3", [("forward-kl", 0.7), ("jsd:0.5", 0.3)]),
        (" forward-kl * 2 + tvd ", [("forward-kl", 2.0), ("tvd", 1.0)]),
        ("tail-kl:5:1.5*0+tvd", [("tail-kl:5:1.5", 0.0), ("tvd", 1.0)]),
    ):
        assert [(term.name, term.weight) for term in read_terms(text)] == terms


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ("forward-kl*0+jsd*0", "has weights that sum to 0, so there is nothing to learn from"),
        ("jsd*0", "has weights that sum to 0"),
        ("forward-kl*-1+jsd*2", "has the term 'forward-kl\\*-1', which is not a NAME or a NAME\\*WEIGHT"),
        ("forward-kl*x", "has the term 'forward-kl\\*x'"),
        ("forward-kl*", "has the term 'forward-kl\\*'"),
        ("forward-kl*nan", "has the term 'forward-kl\\*nan'"),
        ("forward-kl*inf", "has the term 'forward-kl\\*inf'"),
        ("forward-kl++jsd", "has the term ''"),
        ("+", "has the term ''"),
        ("", "has the term ''"),
        ("jsd*0.3*0.2", "has the term"),
        ("forward-kl*0.5+kl*0.5", "loss kl is not one of forward-kl"),
        ("jsd:0.5:0.5", "needs a constant between 0 and 1, as in jsd:0.5"),
        ("alpha-beta:-1:1", "needs 2 constants >= 0, not both 0, as in alpha-beta:0.2:0.7"),
        ("alpha-beta:0:0", "needs 2 constants >= 0"),
        ("decoupled-kl:1:2:3", "needs 2 factors >= 0, not both 0, as in decoupled-kl:1:8"),
        ("tail-kl:0", "needs a count of at least 1 and a weight >= 0, as in tail-kl:10:2"),
        ("tail-kl:1.5", "needs a count of at least 1"),
        ("tail-kl:inf", "needs a count of at least 1"),
    ],
)
def test_losses_that_are_none(loss: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Objective(loss=loss)


@pytest.mark.parametrize(
    ("loss", "tail", "words"),
    [
        ("forward-kl*0.5+jsd*0.5", "uniform", "tail 'uniform' is for loss 'forward-kl' only; jsd takes"),
        ("reverse-kl", "renormalise", "no probability, which loss 'reverse-kl' does not allow; use tail 'bucket' or"),
        ("forward-kl+adaptive-kl", "label", "which loss 'adaptive-kl' does not allow"),
        ("alpha-beta", "label", "which loss 'alpha-beta' does not allow"),
        ("decoupled-kl", "renormalise-both", "has the label as an outcome of its own and takes tail 'bucket' only"),
    ],
)
def test_tails_that_do_not_go_with_a_loss(loss: str, tail: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Objective(loss=loss, tail=tail)


def test_a_term_of_weight_zero_is_not_made() -> None:
    """Its value may be infinite, which times 0 is no number."""
    teacher, student, _ = problem()
    student[:, teacher.argmax(-1)] = -torch.inf
    targets = targets_of(teacher, K)
    assert sparse_kd_loss_from_logits(student, targets, loss="forward-kl*0+tvd").isfinite()


def test_sampled_targets_take_sums_of_forward_kl_alone() -> None:
    teacher, student, _ = problem()
    targets = select(teacher, Selection(kind="ipps", k=4))
    one, two = (sparse_kd_loss_from_logits(student, targets, loss=x) for x in ("forward-kl", "forward-kl*3"))
    assert two.item() == pytest.approx(3 * one.item(), rel=1e-7)
    with pytest.raises(TargetError, match="loss 'jsd' needs the teacher's probabilities"):
        sparse_kd_loss_from_logits(student, targets, loss="forward-kl+jsd")


def test_a_label_that_is_all_of_the_tail_leaves_no_rest() -> None:
    """Two entries of three ids: the label is one of them, or the third, and nothing is left."""
    g = torch.Generator().manual_seed(3)
    teacher, student = (torch.randn(20, 3, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.arange(20) % 3
    targets = targets_of(teacher, 2, labels=labels)
    full = targets_of(teacher, 3, labels=labels)
    for dtype in (torch.float64, torch.float32):
        leaf = student.to(dtype).requires_grad_()
        one, two = (sparse_kd_loss_from_logits(leaf, x, labels=labels, loss="decoupled-kl") for x in (targets, full))
        assert one.item() == pytest.approx(two.item(), rel=1e-6)
        grads = [torch.autograd.grad(x, leaf)[0] for x in (one, two)]
        torch.testing.assert_close(grads[0], grads[1], atol=1e-6, rtol=0)


def test_a_label_that_is_known_worse_than_the_tail() -> None:
    """log p of the label, rounded, may exceed that of the whole tail: the rest is then nothing, not a NaN."""
    teacher, student, _ = problem()
    teacher[:, 7] = teacher.logsumexp(-1) - 9  # outside the entries, and nearly all of what a tail of its size holds
    labels = torch.full((N,), 7)
    targets = targets_of(teacher, K, labels=labels)
    assert not (targets.ids == 7).any()
    high = dataclasses.replace(targets, label_logprob=targets.log_tail[:, 0] + 1e-3)
    leaf = student.requires_grad_()
    value = sparse_kd_loss_from_logits(leaf, high, labels=labels, loss="decoupled-kl")
    (gradient,) = torch.autograd.grad(value, leaf)
    assert value.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("rule", ["student-entropy", "student-entropy-gate:1.5:2.5", "student-entropy-gate::2"])
@pytest.mark.parametrize("soft_weight", [1.0, 0.7])
def test_weights_of_the_students_entropy(rule: str, soft_weight: float, t: float) -> None:
    """At T = 1 whatever the loss's T is, with no gradient of their own, and in float32 where a tile has many blocks."""
    g = torch.Generator().manual_seed(4)
    hidden, weight = torch.randn(N, 8, generator=g).double(), torch.randn(V, 8, generator=g).double()
    teacher, _, labels = problem()
    labels[::4] = -100
    targets = targets_of(teacher, K, (1.0, 2.0))
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    logits = hidden @ weight.T
    entropy = torch.special.entr(logits.softmax(-1)).sum(-1).detach()
    low, _, high = rule.removeprefix("student-entropy-gate:").partition(":")
    if rule == "student-entropy":
        weights = entropy / math.log(V)
    else:
        weights = ((entropy >= float(low or 0)) & (entropy <= float(high or 9))).double()
        assert 0 < weights.mean() < 1
    given: dict[str, Any] = {"labels": labels, "soft_weight": soft_weight, "temperature": t, "loss": "reverse-kl"}
    ours, exact = (
        sparse_kd_loss(*leaves, targets, position_weights=x, **given) for x in (PositionWeights(rule), weights)
    )
    assert ours.item() == pytest.approx(exact.item(), rel=1e-12)
    for one, two in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(exact, leaves), strict=True):
        torch.testing.assert_close(one, two, atol=1e-14, rtol=1e-10)


def test_the_entropy_of_a_student_from_flat_to_certain(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, over several blocks of ids, also where an entry has all the mass and where nothing is left over."""
    found: list[Tensor] = []

    class Recording(PositionWeights):
        def at(self, entropy: Tensor, vocab: int) -> Tensor:
            found.append(entropy.clone())
            return super().at(entropy, vocab)

    monkeypatch.setattr("kdcache.losses.fused_linear._ENTROPY_IDS", 7)
    teacher, student, _ = problem()
    student = student * torch.logspace(-2, 2, N)[:, None]
    exact = torch.special.entr(student.softmax(-1)).sum(-1)
    for k in (1, K, V):
        found.clear()
        rule = Recording("student-entropy")
        figures = Figures()
        source, targets = StoredLogits(student.float()), targets_of(teacher, k)
        distil(source, targets, teacher.argmax(-1), Objective(temperature=1.0), position_weights=rule, figures=figures)
        (ours,) = found
        assert (ours.double() - exact).abs().max() < 2e-5
        assert (ours.double() / exact - 1)[exact > 1e-3].abs().max() < 1e-4
        assert set(figures.values()) >= {"nll", "kl"}


def test_student_rules_are_checked() -> None:
    for rule in ("student", "student-confidence", "student-entropy-gate", "student-entropy-gate:x:"):
        with pytest.raises(ConfigError, match=r"nor student-entropy or student-entropy-gate:LO:HI"):
            PositionWeights(rule)
    with pytest.raises(ConfigError, match="let nothing through"):
        PositionWeights("student-entropy-gate:3:1")


@pytest.mark.parametrize("k", [K, V])
@pytest.mark.parametrize("loss", DIVERGENCES)
def test_a_students_logit_of_minus_infinity(loss: str, k: int) -> None:
    """On an entry: the value is that of the dense formula, infinite where that is, and no gradient is NaN."""
    teacher, student, _ = problem()
    targets = targets_of(teacher, k)
    student[torch.arange(N), targets.ids[:, 1]] = -torch.inf
    exact = DIVERGENCES[loss](*(coarse(x.softmax(-1), targets.ids) for x in (teacher, student))).mean()
    for dtype in (torch.float64, torch.float32):
        leaf = student.to(dtype).requires_grad_()
        value = sparse_kd_loss_from_logits(leaf, targets, loss=loss)
        (gradient,) = torch.autograd.grad(value, leaf)
        assert not gradient.isnan().any()
        if loss in ("reverse-kl", "skew-kl", "skew-reverse-kl", "jsd", "tvd"):
            assert value.item() == pytest.approx(exact.item(), rel=1e-5)
            assert gradient.isfinite().all()
        if loss == "forward-kl":
            assert value.isinf()
            kept = torch.zeros_like(gradient).scatter(-1, targets.ids.long(), 1.0).bool()
            p, q = teacher.softmax(-1), student.softmax(-1)
            torch.testing.assert_close(gradient[kept].double() * N, (q - p)[kept], atol=1e-6, rtol=0)


def test_minus_infinity_at_an_id_that_counts_for_nothing() -> None:
    """Padding names id 0. Where that is impossible for the student, and a target has fewer entries than there is room
    for, nothing is lost; nor where a rollout's token has become impossible."""
    teacher, student, labels = problem()
    teacher[:, 0] = -20.0
    rules = (Selection(kind="topp", top_p=0.6, k=K), Selection(kind="ipps", k=K))
    labels = teacher.argmax(-1)
    student[:, 0] = -torch.inf
    for rule in rules:
        targets = select(teacher, rule, labels=labels).widen(K + 2)
        assert not targets.valid.all() and not (targets.valid & (targets.ids == 0)).any()
        for tail in ("none", "label-sample", "label", "renormalise-both") if rule.kind == "topp" else ("bucket",):
            leaf = student.clone().requires_grad_()
            value = sparse_kd_loss_from_logits(leaf, targets, labels=labels, tail=tail)
            (gradient,) = torch.autograd.grad(value, leaf)
            assert value.isfinite() and gradient.isfinite().all(), (rule.kind, tail)
    student[3, labels[3]] = -torch.inf
    leaf = student.clone().requires_grad_()
    given: dict[str, Any] = {"labels": labels, "writer_logp": torch.full((N,), -1.0), "loss": "sampled-reverse-kl"}
    value = sparse_kd_loss_from_logits(leaf, targets_of(teacher, K, labels=labels), **given)
    (gradient,) = torch.autograd.grad(value, leaf)
    assert value.isfinite() and gradient.isfinite().all() and not gradient[3].any() and gradient[4].any()


@pytest.mark.parametrize("loss", (*BOUNDED, "reverse-kl"))
def test_log_ratios_beyond_ten_thousand(loss: str) -> None:
    """At a low temperature a real entry has log p_T of -2e4 and less; nothing is cut off."""
    teacher, student, _ = problem()
    t = 2e-4
    targets = targets_of(teacher, V, (1.0, t))
    log_p, log_q = ((x / t).log_softmax(-1) for x in (teacher, student))
    assert (log_p < -2e4).any() and (log_q < -2e4).any()
    p, q = log_p.exp(), log_q.exp()
    value = sparse_kd_loss_from_logits(student, targets, loss=loss, temperature=t).item()
    if loss == "forward-kl":
        exact = (p * (log_p - log_q)).sum(-1).mean() * t**2
    elif loss == "reverse-kl":
        exact = (q * (log_q - log_p)).sum(-1).mean() * t**2
    else:
        exact = DIVERGENCES[loss](p, q).mean() * t ** (1 if loss == "tvd" else 2)
    assert value == pytest.approx(exact.item(), rel=1e-9)


def one_fault(**changes: Any) -> None:
    teacher, student, labels = problem()
    targets = targets_of(teacher, K, labels=labels)
    options: dict[str, Any] = {"targets": targets, "labels": labels}
    for name, change in changes.items():
        options[name] = change(options[name].clone() if name == "labels" else targets)
    sparse_kd_loss_from_logits(student, options["targets"], labels=options["labels"], soft_weight=0.5)
    hidden, weight = torch.randn(N, 4), torch.randn(V, 4)
    sparse_kd_loss(hidden, weight, options["targets"], labels=options["labels"], soft_weight=0.5)


def test_what_is_given_by_hand_is_checked() -> None:
    def label(value: int) -> Any:
        return lambda labels: labels.index_fill(0, torch.tensor([3]), value)

    def entry(value: int | None) -> Any:
        def change(targets: SparseTargets) -> SparseTargets:
            ids = targets.ids.clone()
            ids[4, 2] = ids[4, 0] if value is None else value
            return dataclasses.replace(targets, ids=ids)

        return change

    one_fault(labels=label(-100))
    for changes, words in (
        ({"labels": label(V)}, f"the label {V} is outside the vocabulary of {V} ids, and is not -100, at position 3"),
        ({"labels": label(-1)}, "the label -1 is outside"),
        (
            {"targets": entry(V)},
            f"the targets name the id {V}, which is outside the vocabulary of {V} ids, at position 4",
        ),
        ({"targets": entry(-2)}, "the targets name the id -2"),
        ({"targets": entry(None)}, r"the targets name the id \d+ twice, at position 4"),
    ):
        with pytest.raises(TargetError, match=words):
            one_fault(**changes)


def test_padding_is_no_id_that_stands_twice() -> None:
    teacher, student, _ = problem()
    targets = targets_of(teacher, K).widen(K + 4)
    assert sparse_kd_loss_from_logits(student, targets).isfinite()


def test_a_divergence_of_ones_own_may_take_the_label() -> None:
    def miss(log_q: Tensor, log_tail_q: Tensor, teacher: Any, low: float, high: float) -> Tensor:
        return torch.where(teacher.at_label, (high - low) * (teacher.log_p - log_q), 0.0).sum(-1)

    constants = registry.Constants((0.0, 1.0), lambda low, high: low < high, "two that rise")
    with registry._FAMILIES.restored():
        register_divergence("miss", miss, constant=constants, takes_label=True)
        teacher, student, labels = problem()
        targets = targets_of(teacher, K, labels=labels)
        value = sparse_kd_loss_from_logits(student, targets, labels=labels, loss="miss:1:3")
        log_p, log_q = (x.log_softmax(-1).gather(-1, labels[:, None])[:, 0] for x in (teacher, student))
        assert value.item() == pytest.approx(2 * (log_p - log_q).mean().item(), rel=1e-9)
        with pytest.raises(ConfigError, match="needs two that rise, as in miss:0:1"):
            Objective(loss="miss:3:1")
        with pytest.raises(ConfigError, match="loss 'miss' needs labels"):
            sparse_kd_loss_from_logits(student, targets, loss="miss")
    registry.find_divergence.cache_clear()


@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize(("loss", "tail"), [("decoupled-kl", "bucket"), ("jsd", "label"), ("tvd", "renormalise-both")])
def test_figures_do_not_depend_on_the_loss(loss: str, tail: str, t: float) -> None:
    """Where the loss takes the label out of the tail, the figures do not."""
    teacher, student, labels = problem()
    labels[::2] = student.argmax(-1)[::2]  # so that the student's favourite is the label, and no entry
    targets = targets_of(teacher, K, (1.0, 2.0), labels)
    found = []
    for objective in (Objective(loss=loss, tail=tail, temperature=t), Objective()):
        figures = Figures()
        distil(StoredLogits(student), targets, labels, objective, figures=figures)
        found.append(figures.values())
    assert found[0].keys() == found[1].keys() >= {"kl", "kept_mass", "top1_agreement"}
    for name, values in found[0].items():
        torch.testing.assert_close(values, found[1][name], atol=1e-12, rtol=1e-9)
