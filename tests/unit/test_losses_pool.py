"""Several teachers: against the dense pool where that is exact, else against dense sums."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcache import Pool, Selection, select, sparse_kd_loss, sparse_kd_loss_from_logits
from kdcache.errors import TargetError
from kdcache.losses import TAILS, PositionWeights, measure_positions, target_losses
from kdcache.losses.union import Union
from tests.bounds import require_close
from tests.oracle import COMBINATIONS, DIVERGENCES, LABEL_DIVERGENCES, STEPS, position_losses, soft_losses, targets_of
from tests.unit.made_teachers import WEIGHTS, N, V, log_pool, pool_of, sampling, student, teachers


@pytest.fixture(autouse=True)
def warned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if everything that is biased had been warned of."""
    monkeypatch.setattr(target_losses, "_warned", {"pool", *TAILS})
    yield


def labels(masked: bool = True) -> Tensor:
    found = torch.randint(V, (N,), generator=torch.Generator().manual_seed(2))
    found[::2] = teachers()[1].argmax(-1)[::2]  # so that labels are entries, of one teacher or of both, and are not
    if masked:
        found[::5] = -100
    return found


def step(logits: Tensor, told: Tensor, each: Tensor, soft_weight: float) -> Tensor:
    """The loss of a step of `[N]` distillation losses."""
    hard = torch.nn.functional.cross_entropy(logits, told, ignore_index=-100)
    return soft_weight * each[told != -100].mean() + (1 - soft_weight) * hard


def require_as_exact_as_naive(
    pool: Pool, textbook: Callable[[Tensor], Tensor], dtype: torch.dtype, **options: Any
) -> None:
    """Value and gradients are as near to float64 as the textbook's formula in the same dtype, within `bound`."""

    def naive(kind: torch.dtype) -> list[Tensor]:
        leaves = tuple(x.detach().to(kind).requires_grad_() for x in student(dtype))
        logits = torch.nn.functional.linear(*leaves)
        each = textbook(logits)
        value = step(logits, labels(), each, options["soft_weight"])
        return [value.detach().double(), *(x.double() for x in torch.autograd.grad(value, leaves))]

    leaves = student(dtype)
    value = sparse_kd_loss(leaves[0], leaves[1], pool, labels=labels(), bias=leaves[2], **options)
    ours = [value.detach().double(), *(x.double() for x in torch.autograd.grad(value, leaves))]
    for name, mine, plain, true in zip("vhwb", ours, naive(dtype), naive(torch.float64), strict=True):
        require_close(mine, true, dtype, plain, roundings=128 if dtype == torch.float32 else None, what=name)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize(("temperature", "soft_weight"), [(1.0, 1.0), (2.0, 0.6)])
@pytest.mark.parametrize("loss", [*DIVERGENCES, *LABEL_DIVERGENCES])
def test_with_everything_kept_the_pool_is_exact(loss: str, temperature: float, soft_weight: float, count: int) -> None:
    given = teachers(count)
    pool = pool_of([targets_of(x, V, (1.0, 2.0), labels(False)) for x in given])
    pooled = log_pool(given, temperature)  # the oracle softens what it is given

    def textbook(logits: Tensor) -> Tensor:
        every = torch.arange(V).expand(N, V)
        softened = pooled * temperature
        return soft_losses(logits, softened, every, labels(False), loss, "bucket", temperature)

    options = {"loss": loss, "temperature": temperature, "soft_weight": soft_weight}
    require_as_exact_as_naive(pool, textbook, torch.float64, **options)


@pytest.mark.parametrize(("dtype", "soft_weight"), [(torch.float32, 1.0), (torch.float64, 0.6)], ids=str)
@pytest.mark.parametrize(("loss", "tail", "temperature"), STEPS[::2] + STEPS[-1:])
def test_truncated_teachers_add_their_losses(
    loss: str, tail: str, temperature: float, soft_weight: float, dtype: torch.dtype
) -> None:
    given, sizes = teachers(), (9, 4, 1)
    if dtype == torch.float64:
        each = [targets_of(x, k, (1.0, 2.0), labels(False)) for x, k in zip(given, sizes, strict=True)]
    else:
        rules = [Selection(k=9), Selection(kind="topp", top_p=0.8, k=12), Selection(k=1)]
        each = [
            select(x, rule, labels=labels(False), temperatures=(1.0, 2.0)) for x, rule in zip(given, rules, strict=True)
        ]

    def textbook(logits: Tensor) -> Tensor:
        losses = torch.zeros((), dtype=logits.dtype)
        for x, targets, weight in zip(given, each, WEIGHTS, strict=True):
            ids = torch.where(targets.valid, targets.ids, targets.ids[:, :1])
            if not targets.valid.all():  # the oracle takes a fixed number of entries: position by position
                one = [
                    soft_losses(
                        logits[i : i + 1], x[i : i + 1], ids[i : i + 1, : targets.count[i]], labels(False)[i : i + 1],
                        loss, tail, temperature,
                    )
                    for i in range(N)
                ]  # fmt: skip
                losses = losses + weight * torch.cat(one)
            else:
                losses = losses + weight * soft_losses(logits, x, ids, labels(False), loss, tail, temperature)
        return losses

    options = {"loss": loss, "tail": tail, "temperature": temperature, "soft_weight": soft_weight}
    require_as_exact_as_naive(pool_of(each), textbook, dtype, **options)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("kinds", [("ipps", "ipps"), ("sample", "sample"), ("ipps", "sample")])
def test_sampled_teachers_pool_their_weights(kinds: tuple[str, str], temperature: float) -> None:
    each = [
        select(x, sampling(kind, temperature), temperatures=(1.0, 2.0))
        for x, kind in zip(teachers(2), kinds, strict=True)
    ]
    logits = torch.nn.functional.linear(*student()).detach().requires_grad_()
    value = sparse_kd_loss_from_logits(logits, pool_of(each), temperature=temperature, num_items=1)
    (gradient,) = torch.autograd.grad(value, logits)
    pooled = torch.zeros(N, V, dtype=torch.float64)
    for targets, weight in zip(each, (0.625, 0.375), strict=True):
        pooled.scatter_add_(-1, targets.ids.long(), weight * targets.weights.double())
    log_q = (logits / temperature).log_softmax(-1)
    assert value.item() == pytest.approx(-(pooled * log_q).sum().item() * temperature**2, rel=1e-6)
    torch.testing.assert_close(gradient, temperature * (log_q.exp() - pooled), atol=1e-6, rtol=1e-6)


RULES = (
    Selection(k=5),
    Selection(kind="topp", top_p=0.8, k=12),
    Selection(kind="full"),
    sampling("ipps"),
    sampling("sample"),
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_a_teacher_twice_is_that_teacher(rule: Selection) -> None:
    targets = select(teachers()[0], rule, labels=labels(False), temperatures=(1.0, 2.0))
    for loss, tail in COMBINATIONS:
        if targets.kind in ("ipps", "sample") and (loss, tail) != ("forward-kl", "bucket"):
            continue
        found = []
        for given in (targets, Pool((targets, targets), (3.0, 1.0))):
            leaves = student()
            options: dict[str, Any] = {"labels": labels(), "loss": loss, "tail": tail, "soft_weight": 0.8}
            value = sparse_kd_loss(leaves[0], leaves[1], given, bias=leaves[2], **options)
            found.append([value.detach(), *torch.autograd.grad(value, leaves)])
        for one, two in zip(*found, strict=True):
            torch.testing.assert_close(two, one, atol=2e-7 * one.abs().max().item(), rtol=1e-6)


@pytest.mark.parametrize("loss", DIVERGENCES)
def test_truncated_to_the_whole_vocabulary_is_full(loss: str) -> None:
    logits = torch.nn.functional.linear(*student()).detach()
    full, whole, mixed = (
        pool_of([select(x, rule) for x, rule in zip(teachers(2), rules, strict=True)])
        for rules in (
            (Selection(kind="full"),) * 2,
            (Selection(k=V),) * 2,
            (Selection(kind="full"), Selection(k=V)),
        )
    )
    values = [sparse_kd_loss_from_logits(logits, x, loss=loss, temperature=3.0).item() for x in (full, whole, mixed)]
    assert values[0] > 0.1
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-9)


def test_a_teacher_without_a_target_has_no_say() -> None:
    """Each position counts as much as those of its teachers that have one."""
    logits = torch.nn.functional.linear(*student()).detach().requires_grad_()
    number = torch.arange(N)
    has = [number % 4 != 1, number % 4 != 2, number % 4 == 0]  # so one position in four has none but the first ...
    has = [h & (number % 8 != 3) for h in has]  # ... and one in eight none at all
    given = teachers()
    for rule in (Selection(k=5), Selection(kind="full"), sampling("ipps")):
        whole = [select(x, rule) for x in given]
        some = [x[h].spread(h.nonzero()[:, 0], N) for x, h in zip(whole, has, strict=True)]
        found = sparse_kd_loss_from_logits(logits, pool_of(some))
        exact, counted = torch.zeros(()).double(), 0
        for i in range(N):
            here = [m for m in range(3) if has[m][i]]
            if here:
                part = Pool(tuple(whole[m][i : i + 1] for m in here), tuple(WEIGHTS[m] for m in here))
                one = sparse_kd_loss_from_logits(logits[i : i + 1], part)
                exact, counted = exact + one * sum(WEIGHTS[m] for m in here), counted + 1
        assert counted == N - N // 8
        exact = exact / counted
        assert found.item() == pytest.approx(exact.item(), rel=1e-6), rule.kind
        mine, true = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (found, exact))
        torch.testing.assert_close(mine, true, atol=1e-7 * true.abs().max().item(), rtol=1e-5)


def test_the_union_by_sets() -> None:
    given = [select(x, Selection(kind="topp", top_p=0.9, k=8)) for x in teachers()]
    given[0] = given[0][::2].spread(torch.arange(0, N, 2), N)  # and nothing in between
    told = labels(False)
    union = Union.of(given, told, V)
    assert torch.equal(union.ids[:, -1], told) and not union.kept[:, -1].any()
    for i in range(N):
        sets = [set(x.ids[i, : x.count[i]].tolist()) for x in given]
        kept = union.ids[i, union.kept[i]].tolist()
        assert sorted(kept) == sorted(set.union(*sets, {union.ids[i, 0].item()}))
        for own, others in zip(sets, union.others, strict=True):
            assert set(union.ids[i, :-1][others[i]].tolist()) == set(kept) - own


def test_a_tail_of_others_entries_too_small_for_one_minus() -> None:
    """The first teacher's tail is what the second keeps, and the student gives it e^-60."""
    first, second = torch.zeros(1, 4), torch.zeros(1, 4)
    first[0, 0], second[0, 1] = 3.0, 3.0
    logits = torch.tensor([[60.0, 0.0, -1.0, -50.0]], requires_grad=True)
    pool = Pool((select(first, Selection(k=1)), select(second, Selection(k=3))), (0.5, 0.5))
    double = logits.detach().double()
    exact = sum(
        position_losses(double, x, targets.ids, torch.tensor([0]), "forward-kl", "bucket", 1.0).item() / 2
        for x, targets in zip((first.double(), second.double()), pool.targets, strict=True)
    )
    value = sparse_kd_loss_from_logits(logits, pool)
    assert exact > 30
    assert value.item() == pytest.approx(exact, rel=1e-6)
    (gradient,) = torch.autograd.grad(value, logits)
    assert torch.isfinite(gradient).all() and abs(gradient.sum().item()) < 1e-6


def test_position_weights() -> None:
    logits = torch.nn.functional.linear(*student()).detach()
    pool = pool_of([select(x, Selection(k=5)) for x in teachers(2)])
    weights = PositionWeights("confidence").of(pool, V)
    assert weights is not None
    entropy = 0.625 * pool.targets[0].entropy + 0.375 * pool.targets[1].entropy
    torch.testing.assert_close(weights, 1 - entropy / torch.tensor(V).log())
    each = torch.stack([sparse_kd_loss_from_logits(logits[i : i + 1], pool[i : i + 1]) for i in range(N)])
    found = sparse_kd_loss_from_logits(logits, pool, position_weights=weights)
    assert found.item() == pytest.approx((each * weights).mean().item(), rel=1e-6)
    only = pool.targets[0][:1].spread(torch.tensor([0]), N)  # where one teacher is silent, the other's entropy counts
    silent = pool_of([only, pool.targets[1]])
    torch.testing.assert_close(silent.entropy[1:], pool.targets[1].entropy[1:])


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
def test_figures_of_each_teacher(rule: Selection) -> None:
    logits = torch.nn.functional.linear(*student()).detach()
    each = [select(x, rule, labels=labels(False)) for x in teachers()]
    each[1] = each[1][::3].spread(torch.arange(0, N, 3), N)  # which has no target at the rest
    found = measure_positions(logits, pool_of(each), labels(False))
    for number, targets in enumerate(each):
        alone = measure_positions(logits, targets, labels(False))
        names = alone if number == 0 else ("kl", "teacher_nll", "has_target")
        for name in names:
            mine = found[name if number == 0 else f"{name}/{number + 1}"]
            torch.testing.assert_close(mine, alone[name], atol=1e-6, rtol=1e-6, msg=f"{name} of teacher {number}")
    assert len(found) == len(measure_positions(logits, each[0], labels(False))) + 6


def test_weights_sum_to_one_and_stay_as_they_are() -> None:
    top = select(teachers()[0], Selection(k=4))
    for weights in ((1, 1, 1), (0.1, 0.7, 0.3), (3, 5, 7)):
        pool = Pool((top, top, top), weights)
        assert sum(pool.weights) == pytest.approx(1, abs=1e-15)
        assert pool.weights == pytest.approx([w / sum(weights) for w in weights])
        assert pool[:3].to("cpu").weights == Pool(pool.targets, pool.weights).weights == pool.weights


def test_what_cannot_be_pooled() -> None:
    top, full = (
        select(teachers()[0], rule, temperatures=(1.0, 2.0)) for rule in (Selection(k=4), Selection(kind="full"))
    )
    drawn, softer = (select(teachers()[1], sampling("ipps", t), temperatures=(1.0, 2.0)) for t in (1.0, 2.0))
    cases: tuple[tuple[Any, str], ...] = (
        (lambda: Pool((), ()), r"0 teacher\(s\)"),
        (lambda: Pool((top, top), (1.0,)), r"2 teacher\(s\), but 1 weight"),
        (lambda: Pool((top, top), (1.0, 0.0)), "weight of a teacher is 0, but must be positive"),
        (lambda: Pool((top, top), (1.0, float("nan"))), "weight of a teacher is nan"),
        (lambda: Pool((top, top[1:]), (1.0, 1.0)), r"\(40,\) and \(39,\) cannot be pooled"),
        (lambda: Pool((full, drawn), (1.0, 1.0)), "full and ipps targets cannot be pooled"),
    )
    for make, words in cases:
        with pytest.raises(TargetError, match=words):
            make()
    logits = torch.zeros(N, V)
    with pytest.raises(TargetError, match="drawn at temperature 2 say nothing of temperature 1"):
        sparse_kd_loss_from_logits(logits, pool_of([drawn, softer]))
    with pytest.raises(TargetError, match="loss 'jsd' needs the teacher's probabilities"):
        sparse_kd_loss_from_logits(logits, pool_of([drawn, drawn]), loss="jsd")
    one = dataclasses.replace(top, temperatures=(1.0, 3.0))
    with pytest.raises(TargetError, match="temperature 2 is not exact"):
        sparse_kd_loss_from_logits(logits, pool_of([top, one]), temperature=2.0)


def test_only_truncated_pools_warn_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_losses, "_warned", set())
    logits = torch.zeros(N, V)
    for rule in (Selection(kind="full"), sampling("ipps")):  # in a test a warning would be an error
        sparse_kd_loss_from_logits(logits, pool_of([select(x, rule) for x in teachers()]))
    truncated = [select(x, Selection(k=4)) for x in teachers()]
    sparse_kd_loss_from_logits(logits, Pool((truncated[0],)))
    with pytest.warns(UserWarning, match="the optimum is not the pool's") as caught:
        for _ in range(2):
            sparse_kd_loss_from_logits(logits, pool_of(truncated))
    assert len(caught) == 1
