"""What stored targets say of the acceptance rate, against the dense sum of min(p, q)."""

from __future__ import annotations

import pytest
import torch

from kdcache import Selection, SparseTargets, select
from kdcache.losses import StoredLogits, measure
from kdcache.student.metrics import acceptance_bounds
from tests.oracle import DIVERGENCES, coarse, targets_of

N, V = 300, 40


def both() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(N, 1, generator=generator, dtype=torch.float64) * 6
    teacher = torch.randn(N, V, generator=generator, dtype=torch.float64) * scale
    return teacher, teacher + torch.randn(N, V, generator=generator, dtype=torch.float64)


def bounds(student: torch.Tensor, targets: SparseTargets) -> dict[str, torch.Tensor]:
    return measure(StoredLogits(student.float()), targets, torch.zeros(N, dtype=torch.int64), (acceptance_bounds,))


@pytest.mark.parametrize("k", [1, 4, 16, V])
def test_the_bounds_hold_and_meet_where_everything_is_kept(k: int) -> None:
    teacher, student = both()
    p, q = teacher.softmax(-1), student.softmax(-1)
    dense = torch.minimum(p, q).sum(-1)
    targets = targets_of(teacher, k)
    found = bounds(student, targets)
    low, high = found["acceptance_low"].double(), found["acceptance_high"].double()
    assert (low <= dense + 1e-6).all() and (dense <= high + 1e-6).all()
    kept = torch.zeros(N, V, dtype=torch.bool).scatter(-1, targets.ids.long(), True)
    assert torch.allclose(low, (torch.minimum(p, q) * kept).sum(-1), atol=1e-6)
    # one bucket for the tail is what the total variation of merged outcomes makes of it
    merged = DIVERGENCES["tvd"](coarse(p, targets.ids), coarse(q, targets.ids))
    assert torch.allclose(high, 1 - merged, atol=1e-6)
    if k == V:
        assert torch.equal(low, high)
    else:
        assert (high - low).mean() > 1e-3


@pytest.mark.parametrize("kind", ["sample", "ipps"])
def test_sampled_targets_bound_nothing(kind: str) -> None:
    teacher, student = both()
    rule = Selection(kind="sample", draws=8) if kind == "sample" else Selection(kind="ipps", k=8)
    targets = select(teacher.float(), rule, keys=torch.zeros(N, 3, dtype=torch.int64))
    assert not {"acceptance_low", "acceptance_high"} & bounds(student, targets).keys()
