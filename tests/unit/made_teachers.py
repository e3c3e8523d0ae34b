"""Teachers that agree and do not, a student, and pools of what they would say."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kdcache import Pool, Selection, SparseTargets

N, D, V = 40, 16, 60
WEIGHTS = (0.5, 0.3, 0.2)


def teachers(count: int = 3, positions: int = N) -> list[Tensor]:
    """`[N, V]` float64 logits each: from flat to sure, agreeing and not."""
    g = torch.Generator().manual_seed(0)
    shared = 2 * torch.randn(positions, V, generator=g, dtype=torch.float64)
    found = [shared + torch.randn(positions, V, generator=g, dtype=torch.float64) for _ in range(count)]
    for i, logits in enumerate(found):
        logits[:, 3 * i] += torch.linspace(0, 20, positions)
    return found


def student(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = ((N, D), (V, D), (V,))
    hidden, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes)
    return hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def pool_of(each: Sequence[SparseTargets], weights: Sequence[float] = WEIGHTS) -> Pool:
    return Pool(tuple(each), tuple(weights[: len(each)]))


def log_pool(given: Sequence[Tensor], temperature: float) -> Tensor:
    """`[N, V]` log of the pool of softened teachers, in float64."""
    weights = torch.tensor(WEIGHTS[: len(given)], dtype=torch.float64)
    each = torch.stack([(x / temperature).softmax(-1) for x in given])
    return torch.einsum("m,mnv->nv", weights / weights.sum(), each).log()


def sampling(kind: str, temperature: float = 1.0, k: int = 6) -> Selection:
    return Selection(kind=kind, **{"draws" if kind == "sample" else "k": k}, sample_temperature=temperature)
