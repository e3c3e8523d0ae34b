"""The losses of other projects, written again from their formulas, against ours that docs/mathematics.md names.

Each peer's function takes raw logits of both sides and gives one number a position, as its code does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kdcache import Selection, SparseTargets, select, sparse_kd_loss_from_logits
from kdcache.losses import target_losses

N, V, K = 30, 80, 8


pytestmark = pytest.mark.usefixtures("tails_have_warned")


def problem() -> tuple[Tensor, Tensor, Tensor]:
    """`[N, V]` float64 logits of teacher and student, and `[N, K]` the teacher's largest."""
    g = torch.Generator().manual_seed(0)
    teacher, student = (2 * torch.randn(N, V, generator=g, dtype=torch.float64) for _ in range(2))
    return teacher, student, teacher.topk(K).indices


def targets_of(teacher: Tensor, temperatures: tuple[float, ...] = (1.0,)) -> SparseTargets:
    return select(teacher, Selection(k=K), labels=teacher.argmax(-1), temperatures=temperatures)


def require_equal(peer: Callable[[Tensor], Tensor], student: Tensor, ours: Callable[[Tensor], Tensor]) -> None:
    """Mean over positions and its gradient, to 1e-6: targets are float32."""
    leaves = [student.clone().requires_grad_() for _ in range(2)]
    values = [peer(leaves[0]).mean(), ours(leaves[1])]
    assert values[1].item() == pytest.approx(values[0].item(), abs=1e-6)
    grads = [torch.autograd.grad(value, leaf)[0] for value, leaf in zip(values, leaves, strict=True)]
    assert grads[0].abs().max() > 1e-3
    torch.testing.assert_close(grads[1], grads[0], atol=1e-6, rtol=0)


def nemo_rl(student: Tensor, teacher: Tensor, ids: Tensor, t: float, kind: str) -> Tensor:
    """NeMo-RL `DistillationLossFn`, zero_outside_topk=False: log-softmax of both over the k logits; no T^2."""
    p, q = ((x.gather(-1, ids) / t).log_softmax(-1) for x in (teacher, student))
    forward, reverse = (p.exp() * (p - q)).sum(-1), (q.exp() * (q - p)).sum(-1)
    return {
        "forward-kl": forward,
        "reverse-kl": reverse,
        "forward-kl*0.3+reverse-kl*0.7": 0.3 * forward + 0.7 * reverse,
    }[kind]


def ms_swift(student: Tensor, teacher: Tensor, ids: Tensor, t: float, beta: float) -> Tensor:
    """ms-swift `gkd_loss` with gkd_logits_topk: what is gathered, over T, through log_softmax; no T^2."""
    s_log = (student.gather(-1, ids) / t).log_softmax(-1)
    t_log = (teacher.log_softmax(-1).gather(-1, ids) / t).log_softmax(-1)

    def kl(log_input: Tensor, log_target: Tensor) -> Tensor:
        return (log_target.exp() * (log_target - log_input)).sum(-1)

    if beta in (0, 1):
        return kl(s_log, t_log) if beta == 0 else kl(t_log, s_log)
    share = torch.tensor(beta, dtype=torch.float64)
    m_log = torch.logsumexp(torch.stack([s_log + torch.log1p(-share), t_log + share.log()]), 0)
    return beta * kl(m_log, t_log) + (1 - beta) * kl(m_log, s_log)


def trl_server(student: Tensor, teacher: Tensor, ids: Tensor, t: float) -> Tensor:
    """TRL's server trainer, loss_add_tail=False: each side's log-probabilities less their log-sum-exp; no T^2."""
    q, p = ((x / t).log_softmax(-1).gather(-1, ids) for x in (student, teacher))
    q, p = (x - x.logsumexp(-1, keepdim=True) for x in (q, p))
    return functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)


def maxtext(student: Tensor, teacher: Tensor, ids: Tensor, t: float) -> Tensor:
    """MaxText with stored top-k logits: both sides gathered, then softened and normalised; times T^2."""
    log_q = functional.log_softmax(student.gather(-1, ids) / t, -1)
    p = functional.softmax(teacher.gather(-1, ids) / t, -1)
    return (p * (p.log() - log_q)).sum(-1) * t**2


def model_optimizer(student: Tensor, teacher: Tensor, ids: Tensor, t: float) -> Tensor:
    """ModelOpt's `TopKLogitsKLLoss` before it got a ghost token: softmax over the k of each side; no T^2."""
    q, p = ((x / t).gather(-1, ids).log_softmax(-1) for x in (student, teacher))
    return (p.exp() * (p - q)).sum(-1)


def axolotl(student: Tensor, teacher: Tensor, ids: Tensor, t: float, beta: float) -> Tensor:
    """axolotl's kernel, normalize_topk=True: log p of the student, normalised again over the k; times T^2."""
    z = student / t
    q = z.gather(-1, ids) - z.logsumexp(-1, keepdim=True)
    q = q - q.logsumexp(-1, keepdim=True)
    p = (teacher.gather(-1, ids) / t).log_softmax(-1)
    if beta == 0:
        return (p.exp() * (p - q)).sum(-1) * t**2
    if beta == 1:
        return (q.exp() * (q - p)).sum(-1) * t**2
    mean = ((1 - beta) * q.exp() + beta * p.exp()).log()
    parts = [functional.kl_div(mean, x, reduction="none", log_target=True).sum(-1) for x in (p, q)]
    return (beta * parts[0] + (1 - beta) * parts[1]) * t**2


BOTH: dict[str, tuple[Callable[[Tensor, Tensor, Tensor, float], Tensor], str, bool]] = {
    "NeMo-RL forward": (lambda *x: nemo_rl(*x, "forward-kl"), "forward-kl", False),
    "NeMo-RL reverse": (lambda *x: nemo_rl(*x, "reverse-kl"), "reverse-kl", False),
    "NeMo-RL mixed": (
        lambda *x: nemo_rl(*x, "forward-kl*0.3+reverse-kl*0.7"), "forward-kl*0.3+reverse-kl*0.7", False,
    ),
    "ms-swift beta 0": (lambda *x: ms_swift(*x, 0), "forward-kl", False),
    "ms-swift beta 0.3": (lambda *x: ms_swift(*x, 0.3), "jsd:0.3", False),
    "ms-swift beta 1": (lambda *x: ms_swift(*x, 1), "reverse-kl", False),
    "TRL server": (trl_server, "forward-kl", False),
    "MaxText": (maxtext, "forward-kl", True),
    "ModelOpt": (model_optimizer, "forward-kl", False),
    "axolotl beta 0": (lambda *x: axolotl(*x, 0), "forward-kl", True),
    "axolotl beta 0.4": (lambda *x: axolotl(*x, 0.4), "jsd:0.4", True),
    "axolotl beta 1": (lambda *x: axolotl(*x, 1), "reverse-kl", True),
}  # fmt: skip
"""What each computes, our name for it, and whether it multiplies by T^2."""


@pytest.mark.parametrize("t", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("name", BOTH)
def test_both_sides_renormalised(name: str, t: float) -> None:
    """At temperatures that the targets do not store, too."""
    peer, loss, squared = BOTH[name]
    teacher, student, ids = problem()
    scale = 1.0 if squared else t**-2
    targets = targets_of(teacher)

    def ours(logits: Tensor) -> Tensor:
        found = sparse_kd_loss_from_logits(logits, targets, loss=loss, tail="renormalise-both", temperature=t)
        return scale * found

    require_equal(lambda logits: peer(logits, teacher, ids, t), student, ours)


def test_one_k_has_nothing_to_learn_from() -> None:
    """The blind spot, at its widest: one entry a position is always the whole of what is normalised."""
    teacher, student, _ = problem()
    leaf = student.requires_grad_()
    value = sparse_kd_loss_from_logits(leaf, select(teacher, Selection(k=1)), tail="renormalise-both")
    (gradient,) = torch.autograd.grad(value, leaf)
    assert value.item() == 0 and not gradient.any()


def test_only_the_entries_have_a_gradient() -> None:
    teacher, student, ids = problem()
    leaf = student.requires_grad_()
    for loss in ("forward-kl", "reverse-kl", "jsd"):
        value = sparse_kd_loss_from_logits(leaf, targets_of(teacher), loss=loss, tail="renormalise-both")
        (gradient,) = torch.autograd.grad(value, leaf)
        outside = torch.ones_like(gradient, dtype=torch.bool).scatter(-1, ids, False)
        assert not gradient[outside].any() and gradient.sum(-1).abs().max() < 1e-15
        assert gradient[~outside].abs().max() > 1e-4


@pytest.mark.parametrize("t", [1.0, 2.0])
def test_distillkit(t: float) -> None:
    """`missing_probability_handling`: `zero` normalises the teacher over its entries. `symmetric_uniform` takes what is
    left for one more outcome, as the bucket does, but softens the teacher's as one number: r^(1/T) instead of a sum."""
    teacher, student, ids = problem()
    targets = targets_of(teacher, (1.0, 2.0))

    def zero(logits: Tensor) -> Tensor:
        p = (teacher.gather(-1, ids) / t).log_softmax(-1)
        return (p.exp() * (p - (logits / t).log_softmax(-1).gather(-1, ids))).sum(-1)

    def symmetric_uniform(logits: Tensor) -> Tensor:
        kept = teacher.log_softmax(-1).gather(-1, ids)
        rest = torch.log1p(-kept.exp().sum(-1, keepdim=True))
        p = (torch.cat([kept, rest], -1) / t).log_softmax(-1)
        q = (logits / t).log_softmax(-1).gather(-1, ids)
        q = torch.cat([q, torch.log1p(-q.exp().sum(-1, keepdim=True))], -1)
        return (p.exp() * (p - q)).sum(-1)

    def ours(tail: str) -> Callable[[Tensor], Tensor]:
        return lambda logits: sparse_kd_loss_from_logits(logits, targets, tail=tail, temperature=t) / t**2

    require_equal(zero, student, ours("renormalise"))
    if t == 1:
        require_equal(symmetric_uniform, student, ours("bucket"))
    else:
        assert abs(symmetric_uniform(student).mean() - ours("bucket")(student)) > 0.1


@pytest.mark.parametrize("lam", [0.1, 0.7])
def test_distillm_js_distance(lam: float) -> None:
    """DistiLLM's `js_distance(lam)`: (1 - lam) KL(p ‖ m) + lam KL(q ‖ m), m = (1 - lam) p + lam q; no constant part."""
    teacher, student, _ = problem()
    p = teacher.softmax(-1)

    def js_distance(logits: Tensor) -> Tensor:
        q = logits.softmax(-1)
        m = (1 - lam) * p + lam * q
        return ((1 - lam) * p * (p.log() - m.log()) + lam * q * (q.log() - m.log())).sum(-1)

    full = select(teacher, Selection(kind="full"))
    require_equal(js_distance, student, lambda x: sparse_kd_loss_from_logits(x, full, loss=f"jsd:{1 - lam}"))


def test_adaptive_kl_of_its_authors() -> None:
    """`get_ratio` of the released code, over all ids."""
    teacher, student, _ = problem()

    def akl(logits: Tensor) -> Tensor:
        p, q = teacher.softmax(-1), logits.softmax(-1)
        sorted_p, order = p.sort(-1, descending=True)
        errors = (sorted_p - q.detach().gather(-1, order)).abs()
        mask = sorted_p.cumsum(-1) > 0.5
        mask[:, 0] = False
        head, tail = errors.masked_fill(mask, 0).sum(-1), errors.masked_fill(~mask, 0).sum(-1)
        forward, reverse = (p * (p.log() - q.log())).sum(-1), (q * (q.log() - p.log())).sum(-1)
        return (head * forward + tail * reverse) / (head + tail)

    full = select(teacher, Selection(kind="full"))
    require_equal(akl, student, lambda x: sparse_kd_loss_from_logits(x, full, loss="adaptive-kl"))


def test_decoupled_kl_of_its_authors() -> None:
    """mdistiller's `dkd_loss`: the target set to -1000 in the logits instead of taken out of the sum; T^2 on both."""
    teacher, student, _ = problem()
    labels = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))
    t, alpha, beta = 2.0, 1.0, 8.0
    mask = functional.one_hot(labels, V).bool()

    def dkd(logits: Tensor) -> Tensor:
        p, q = (teacher / t).softmax(-1), (logits / t).softmax(-1)
        pair_p, pair_q = (torch.stack([(x * mask).sum(-1), (x * ~mask).sum(-1)], -1) for x in (p, q))
        tckd = functional.kl_div(pair_q.log(), pair_p, reduction="none").sum(-1)
        other_p = functional.softmax(teacher / t - 1000.0 * mask, -1)
        nckd = functional.kl_div(functional.log_softmax(logits / t - 1000.0 * mask, -1), other_p, reduction="none")
        return (alpha * tckd + beta * nckd.sum(-1)) * t**2

    full = select(teacher, Selection(kind="full"), labels=labels, temperatures=(1.0, t))

    def ours(logits: Tensor) -> Tensor:
        return sparse_kd_loss_from_logits(logits, full, labels=labels, loss="decoupled-kl", temperature=t)

    require_equal(dkd, student, ours)


def test_alpha_beta_has_the_divergences_that_it_joins_at_its_corners() -> None:
    teacher, student, _ = problem()
    targets = targets_of(teacher)
    for corner, name in (("1:0", "forward-kl"), ("0:1", "reverse-kl")):
        one, two = (sparse_kd_loss_from_logits(student, targets, loss=x) for x in (f"alpha-beta:{corner}", name))
        assert one.item() == pytest.approx(two.item(), rel=1e-6)
    # 4 times the squared Hellinger distance 1 - sum sqrt(p q)
    full = select(teacher, Selection(kind="full"))
    hellinger = 1 - (teacher.softmax(-1) * student.softmax(-1)).sqrt().sum(-1).mean()
    found = sparse_kd_loss_from_logits(student, full, loss="alpha-beta:0.5:0.5")
    assert found.item() == pytest.approx(4 * hellinger.item(), rel=1e-6)


def test_tail_kl_of_weight_one_is_the_kl_and_its_gradient_is_the_papers() -> None:
    """arXiv 2602.20816: (q - p) + (w - 1) (q r / s - p) outside the k largest, where q r / s is the student's tail
    scaled to the teacher's mass."""
    teacher, student, _ = problem()
    targets, full = targets_of(teacher), select(teacher, Selection(kind="full"))
    for each in (targets, full):
        one, two = (sparse_kd_loss_from_logits(student, each, loss=x).item() for x in ("tail-kl:3:1", "forward-kl"))
        assert one == pytest.approx(two, rel=1e-9)
    leaf = student.clone().requires_grad_()
    sparse_kd_loss_from_logits(leaf, full, loss="tail-kl:3:2.5", num_items=1).backward()
    p, q = teacher.softmax(-1), student.softmax(-1)
    rest = torch.ones_like(p, dtype=torch.bool).scatter(-1, teacher.topk(3).indices, False)
    r, s = ((x * rest).sum(-1, keepdim=True) for x in (p, q))
    exact = (q - p) + 1.5 * rest * (q * r / s - p)
    torch.testing.assert_close(leaf.grad, exact, atol=1e-6, rtol=0)


def test_a_warning_names_the_blind_spot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_losses, "_warned", set())
    teacher, student, _ = problem()
    with pytest.warns(UserWarning, match=r"blind outside the entries.*3\.97, against 1\.69"):
        sparse_kd_loss_from_logits(student, targets_of(teacher), tail="renormalise-both")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse_kd_loss_from_logits(student, targets_of(teacher), tail="renormalise-both")
