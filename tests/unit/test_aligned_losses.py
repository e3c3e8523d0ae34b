"""uld, gold and alm against dense float64 oracles, values and gradients; entries in the ids of another vocabulary."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor

from kdcache import SparseTargets, sparse_kd_loss_from_logits
from kdcache.aligned_targets import AlignedTargets, Overlap, map_entries
from kdcache.errors import ConfigError, TargetError
from kdcache.losses import Objective, StoredLogits, distil, fused_linear
from tests.oracle import DIVERGENCES, targets_of

TEACHER, STUDENT, K = 40, 50, 6
LENGTHS = [1, 2, 0, 3, 0, 0, 0, 1, 4, 0, 0, 0, 1, 2, 0]
"""Of the chunks: position 6 belongs to none."""
N = len(LENGTHS)


class Problem:
    """Teacher and student of other vocabularies, in float64; 24 of the teacher's 40 tokens are the student's, too."""

    def __init__(self, k: int = K, temperatures: tuple[float, ...] = (1.0, 2.0), student: int = STUDENT) -> None:
        shared = min(24, student - 1)
        g = torch.Generator().manual_seed(0)
        self.teacher = 2 * torch.randn(N, TEACHER, generator=g, dtype=torch.float64)
        self.student = (2 * torch.randn(N, student, generator=g, dtype=torch.float64)).requires_grad_()
        self.labels = torch.randint(student, (N,), generator=g)
        self.ids = torch.full((TEACHER,), -1)
        self.ids[torch.randperm(TEACHER, generator=g)[:shared]] = torch.randperm(student, generator=g)[:shared]
        common = np.zeros(student, bool)
        common[self.ids[self.ids >= 0].numpy()] = True
        self.length = torch.tensor(LENGTHS)
        self.chunk_logprob = -3 * torch.rand(N, generator=g, dtype=torch.float64) * (self.length > 0)
        self.sparse = targets_of(self.teacher, k, temperatures)
        mapped, foreign = map_entries(self.sparse, self.ids)
        mapped = dataclasses.replace(mapped, label_logprob=None)
        self.targets = AlignedTargets(
            **{field.name: getattr(mapped, field.name) for field in dataclasses.fields(mapped)},
            foreign=foreign, unkept=self.sparse.log_tail, chunk_length=self.length, chunk_logprob=self.chunk_logprob,
            chunk_bytes=self.length, label_bytes=torch.ones(N), overlap=Overlap(common, shared / TEACHER),
        )  # fmt: skip
        self.common = torch.from_numpy(common)

    def loss(self, loss: str, temperature: float = 1.0, soft_weight: float = 1.0) -> Tensor:
        objective = Objective(loss=loss, temperature=temperature, soft_weight=soft_weight)
        return distil(StoredLogits(self.student), self.targets, self.labels, objective)

    def kept(self, temperature: float) -> tuple[Tensor, Tensor]:
        """`[N, TEACHER]` p_T, and which of them are entries."""
        p = (self.teacher / temperature).softmax(-1)
        return p, torch.zeros_like(p, dtype=torch.bool).scatter(-1, self.sparse.ids.long(), True)

    def mean(self, losses: Tensor) -> Tensor:
        return losses[self.length > 0].mean()

    def uld(self, temperature: float) -> Tensor:
        p, kept = self.kept(temperature)
        k = int(kept[0].sum())
        q = (self.student / temperature).softmax(-1).sort(-1, descending=True).values
        p_sorted = torch.where(kept, p, 0.0).sort(-1, descending=True).values[:, :k]
        rest = ((p * ~kept).sum(-1) - q[:, k:].sum(-1)).abs()
        return temperature * self.mean((p_sorted - q[:, :k]).abs().sum(-1) + rest)

    def gold(self, temperature: float, w: float) -> Tensor:
        p, kept = self.kept(temperature)
        q = (self.student / temperature).softmax(-1)
        jsd, by_rank = [], []
        for one in range(N):
            both = kept[one] & (self.ids >= 0)
            theirs, ours = p[one, both], q[one, self.ids[both]]
            outcomes = [torch.cat([x, 1 - x.sum()[None]])[None] for x in (theirs, ours)]
            jsd.append(DIVERGENCES["jsd"](*outcomes)[0])
            foreign = p[one, kept[one] & (self.ids < 0)].sort(descending=True).values
            own = q[one, ~self.common].sort(descending=True).values[: len(foreign)]
            by_rank.append((foreign - own).abs().sum())
        return self.mean(w * temperature**2 * torch.stack(jsd) + (1 - w) * temperature * torch.stack(by_rank))

    def alm(self, tau: float) -> Tensor:
        log_q = self.student.log_softmax(-1).gather(-1, self.labels[:, None])[:, 0]
        found = []
        for start, length in enumerate(LENGTHS):
            if length:
                p, q = ((x / tau).exp() for x in (self.chunk_logprob[start], log_q[start : start + length].sum()))
                found.append(tau * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()))
        return torch.stack(found).mean()


def same(found: Tensor, wanted: Tensor, student: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    (one,) = torch.autograd.grad(found, student)
    (other,) = torch.autograd.grad(wanted, student)
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-12)


@pytest.fixture(params=[1 << 22, 2 * STUDENT], ids=["one tile", "tiles of two"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fused_linear.TILE_ELEMENTS, "cpu", request.param)
    monkeypatch.setattr(fused_linear, "LEAST_POSITIONS", 2)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_distributions_match_their_oracles(temperature: float) -> None:
    problem = Problem()
    assert 0 < int(problem.targets.count.min()) < K  # some entries are in common, some are not
    same(problem.loss("uld", temperature), problem.uld(temperature), problem.student)
    same(problem.loss("gold", temperature), problem.gold(temperature, 24 / TEACHER), problem.student)
    same(problem.loss("gold:0.25", temperature), problem.gold(temperature, 0.25), problem.student)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("tau", [1.0, 100.0])
def test_likelihoods_of_chunks_match_their_oracle(tau: float) -> None:
    problem = Problem()
    same(problem.loss(f"alm:{tau:g}"), problem.alm(tau), problem.student)


@pytest.mark.usefixtures("tiles")
def test_sums_of_them_with_a_divergence_and_labels() -> None:
    problem = Problem()
    p, kept = problem.kept(1.0)
    q, kl = problem.student.softmax(-1), []
    for one in range(N):
        both = kept[one] & (problem.ids >= 0)
        outcomes = [torch.cat([x, 1 - x.sum()[None]])[None] for x in (p[one, both], q[one, problem.ids[both]])]
        kl.append(DIVERGENCES["forward-kl"](*outcomes)[0])
    label = torch.nn.functional.cross_entropy(problem.student, problem.labels)
    soft = 0.5 * problem.mean(torch.stack(kl)) + 2 * problem.uld(1.0) + 0.25 * problem.alm(100)
    same(problem.loss("forward-kl*0.5+uld*2+alm*0.25", soft_weight=0.8), 0.8 * soft + 0.2 * label, problem.student)


def test_uld_of_everything_is_that_of_the_paper() -> None:
    problem = Problem(k=TEACHER)
    p = torch.nn.functional.pad(problem.teacher.softmax(-1), (0, STUDENT - TEACHER))
    ranks = [x.sort(-1, descending=True).values for x in (p, problem.student.softmax(-1))]
    same(problem.loss("uld"), problem.mean((ranks[0] - ranks[1]).abs().sum(-1)), problem.student)
    sparse = Problem()
    assert sparse.loss("uld") <= problem.loss("uld")  # the bucket is a lower bound


def test_uld_of_a_teacher_with_more_ids_than_its_student() -> None:
    problem = Problem(k=TEACHER, student=10)
    q = torch.nn.functional.pad(problem.student.softmax(-1), (0, TEACHER - 10)).sort(-1, descending=True).values
    p = problem.teacher.softmax(-1).sort(-1, descending=True).values
    same(problem.loss("uld"), problem.mean((p - q).abs().sum(-1)), problem.student)
    problem.loss("gold").backward()  # of whose tokens one is not the teacher's


def test_in_one_vocabulary_gold_is_jsd_and_alm_takes_each_label() -> None:
    g = torch.Generator().manual_seed(1)
    teacher, student = (torch.randn(N, STUDENT, generator=g, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(STUDENT, (N,), generator=g)
    targets = targets_of(teacher, K, labels=labels)
    student.requires_grad_()
    same(*(sparse_kd_loss_from_logits(student, targets, loss=loss) for loss in ("gold", "jsd")), student)
    p, q = (x.softmax(-1).gather(-1, labels[:, None])[:, 0] for x in (teacher, student))
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    same(sparse_kd_loss_from_logits(student, targets, labels=labels, loss="alm:1"), kl.mean(), student)


def test_entries_that_the_student_has_not_are_in_the_tail_at_every_temperature() -> None:
    problem = Problem()
    for t in (1.0, 2.0):
        p, kept = problem.kept(t)
        log_p, log_tail = problem.targets.at_temperature(t)
        both = kept & (problem.ids >= 0)
        torch.testing.assert_close(log_tail.exp(), (p * ~both).sum(-1), rtol=1e-12, atol=0)
        torch.testing.assert_close(log_p.exp().sum(-1), (p * both).sum(-1), rtol=1e-12, atol=0)
        foreign = problem.targets.foreign_at(t).exp()
        torch.testing.assert_close(foreign.sum(-1), (p * kept * (problem.ids < 0)).sum(-1), rtol=1e-12, atol=0)


def test_a_certain_chunk_has_a_finite_gradient() -> None:
    student = torch.zeros(2, 5)
    student[:, 1] = 200.0  # the label, to the last digit
    student.requires_grad_()
    targets = SparseTargets.from_topk(
        torch.tensor([[1], [1]]), torch.tensor([[0.0], [-1.0]]), label_logprob=torch.tensor([0.0, -1.0])
    )
    loss = sparse_kd_loss_from_logits(student, targets, labels=torch.tensor([1, 1]), loss="alm")
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize(
    ("loss", "changes", "words"),
    [
        ("alm:0", {}, "needs a tau above 0, as in alm:100"),
        ("gold:2", {}, "needs a weight between 0 and 1"),
        ("uld:3", {}, "uld"),
        ("alm", {"temperature": 2.0}, "compares likelihoods of text, at temperature 1, not 2"),
        ("uld", {"tail": "uniform"}, "takes tail 'bucket' only"),
    ],
)
def test_what_an_objective_refuses(loss: str, changes: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Objective(loss=loss, **changes)  # type: ignore[arg-type]


def test_sampled_targets_give_alm_alone() -> None:
    Objective(loss="alm").require_fit("ipps", True, 1.0)
    with pytest.raises(TargetError, match="loss 'uld' needs the teacher's probabilities"):
        Objective(loss="uld").require_fit("ipps", True, 1.0)
