"""The distribution that tokens are drawn from, against a dense one in float64, and the draws against it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kdcache.generation.draw import draw, nucleus
from kdcache.selection.uniforms import GENERATE, uniforms
from tests.sampling import KINDS, logits_of

SETTINGS = [(1.0, 1.0), (0.7, 1.0), (1.5, 0.9), (1.0, 0.5), (0.3, 0.05)]


def dense(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """`[V]` float64: the law, token by token, as it is defined."""
    p = (logits.double() / temperature).softmax(-1).tolist()
    kept, mass = [], 0.0
    for token in sorted(range(len(p)), key=lambda token: (-p[token], token)):
        if mass >= top_p:
            break
        kept.append(token)
        mass += p[token]
    law = torch.zeros(len(p), dtype=torch.float64)
    law[kept] = torch.tensor([p[token] for token in kept], dtype=torch.float64)
    return law / law.sum()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "top_p"), SETTINGS)
def test_log_probabilities_are_those_of_the_law(kind: str, temperature: float, top_p: float) -> None:
    logits = logits_of(kind, 50, rows=16)
    numbers = uniforms(0, torch.arange(48).reshape(16, 3), GENERATE)
    drawn = draw(logits, numbers, temperature, top_p)
    model = logits.double().log_softmax(-1).gather(-1, drawn.tokens[:, None])[:, 0]
    for row in range(16):
        law = dense(logits[row], temperature, top_p)
        assert law[drawn.tokens[row]] > 0
        assert drawn.logp[row].item() == pytest.approx(law[drawn.tokens[row]].log().item(), rel=1e-9, abs=1e-9)
        assert drawn.model_logp[row].item() == pytest.approx(model[row].item(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(("temperature", "top_p"), SETTINGS)
def test_frequencies_pass_a_chi_square_test(temperature: float, top_p: float) -> None:
    draws, logits = 40_000, logits_of("random", 40, rows=1)
    keys = torch.stack([torch.arange(draws), torch.full((draws,), 3), torch.full((draws,), 5)], -1)
    drawn = draw(logits.expand(draws, -1), uniforms(7, keys, GENERATE), temperature, top_p)
    require_law(torch.bincount(drawn.tokens, minlength=40), dense(logits[0], temperature, top_p))


def require_law(counts: Tensor, law: Tensor) -> None:
    """A chi-square test at five standard deviations; what the law never gives must never be there."""
    assert counts[law == 0].sum() == 0
    expected, seen = law * counts.sum(), counts.double()
    often = expected >= 5
    cells = torch.stack([torch.cat([each[often], each[~often].sum()[None]]) for each in (seen, expected)])
    cells = cells[:, cells[1] > 0]
    freedom = cells.shape[1] - 1
    if freedom:
        statistic = ((cells[0] - cells[1]) ** 2 / cells[1]).sum().item()
        assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5, (statistic, freedom)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nucleus_is_the_smallest(kind: str) -> None:
    p = logits_of(kind, 60).double().softmax(-1)
    for top_p in (1e-9, 0.3, 0.9, 0.999, 1.0):
        kept = nucleus(p, top_p)
        mass = torch.where(kept, p, 0).sum(-1)
        least = torch.where(kept, p, 2.0).amin(-1)
        assert (kept.sum(-1) >= 1).all() and (mass >= top_p - 1e-12).all()
        assert (mass - least < top_p + 1e-12).all(), "a token less would do"
        assert (torch.where(kept, 0, p).amax(-1) <= least).all(), "a likelier token is left out"


def test_edges() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf]]).expand(2, -1)
    drawn = draw(logits, torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert drawn.tokens.tolist() == [0, 2]
    tied = draw(torch.zeros(1, 4), torch.tensor([0.99], dtype=torch.float64), 1.0, 0.5)
    assert tied.tokens.tolist() == [1] and tied.logp.item() == pytest.approx(math.log(0.5))


def test_temperature_0_takes_the_most_likely() -> None:
    logits = logits_of("random", 30, rows=8)
    drawn = draw(logits, torch.zeros(8, dtype=torch.float64), 0.0)
    assert torch.equal(drawn.tokens, logits.argmax(-1)) and (drawn.logp == 0).all()
    assert torch.allclose(drawn.model_logp, logits.double().log_softmax(-1).amax(-1))
