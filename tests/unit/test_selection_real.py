"""Selections on rows of real teachers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdcache import Selection, select
from kdcache.pretrained import load_model, load_tokenizer
from kdcache.selection import solve_adaptive_tau
from tests.sampling import tau_of

pytestmark = pytest.mark.assets

TEXTS = {"stories260K": "tinystories.txt", "lab32k": "wikitext2-valid.txt"}


@pytest.fixture(scope="module", params=TEXTS)
def logits(request: pytest.FixtureRequest, assets: Path) -> torch.Tensor:
    """`[512, V]` of a teacher on its own kind of text."""
    folder = assets / "models" / request.param
    text = (assets / "text" / TEXTS[request.param]).read_text()[:8000]
    tokens = torch.tensor(load_tokenizer(folder)(text)["input_ids"][:512]).view(2, 256)
    model = load_model(folder, "teacher", "float32", torch.device("cpu")).eval()
    with torch.inference_mode():
        return model(input_ids=tokens, use_cache=False).logits.flatten(0, 1).float()


def squared_errors(logits: torch.Tensor, rule: Selection, seeds: int) -> tuple[torch.Tensor, float]:
    """`[N]` mean squared error of the weights over seeds, and the mean number of entries."""
    p = logits.double().softmax(-1)
    square, total, entries = p.square().sum(-1), torch.zeros(len(p), dtype=torch.float64), 0.0
    for seed in range(seeds):
        found = select(logits, rule, seed=seed)
        weights, kept = found.weights.double(), p.gather(-1, found.ids)
        total += (weights.square() - 2 * weights * kept).sum(-1)  # (w - p)^2 less p^2, which all ids share
        entries += found.count.double().mean().item()
    return square + total / seeds, entries / seeds


def draws_for(p: torch.Tensor, entries: float) -> torch.Tensor:
    """`[N]` the most draws that give each position no more than so many distinct ids in the mean, at least 1."""
    miss = torch.log1p(-p.clamp(max=1 - 1e-12))
    least, most = torch.ones(len(p)), torch.full((len(p),), 4097.0)
    for _ in range(12):
        middle = ((least + most) / 2).floor()
        fits = -torch.expm1(middle[:, None] * miss).sum(-1) <= entries
        least, most = torch.where(fits, middle, least), torch.where(fits, most, middle)
    return least


@pytest.mark.slow
def test_ipps_has_the_error_of_its_law(logits: torch.Tensor) -> None:
    k = 12
    p = logits.double().softmax(-1)
    tau = tau_of(p, k)[:, None]
    law = torch.where(p < tau, p * (tau - p), 0.0).sum(-1)
    found, entries = squared_errors(logits, Selection(kind="ipps", k=k), 12)
    assert entries == k
    assert found.mean().item() == pytest.approx(law.mean().item(), rel=0.03)
    # Sampling that may use as many entries, at each position, is worse there.
    some = slice(0, 512, 8)
    sampling = (1 - p[some].square().sum(-1)) / draws_for(p[some], k)
    assert (law[some] <= sampling + 1e-12).all()
    assert law[some].mean() < 0.8 * sampling.mean()


@pytest.mark.slow
def test_adaptive_has_half_the_error_of_fixed_and_less_than_sampling_at_the_same_mean(logits: torch.Tensor) -> None:
    """`sample` adapts too: flat positions get more distinct ids. On the small teacher it beats a fixed k by that."""
    p = logits.double().softmax(-1)
    adaptive, entries = squared_errors(logits, Selection(kind="ipps", k=12, tau=solve_adaptive_tau(logits, 12)), 6)
    fixed, _ = squared_errors(logits, Selection(kind="ipps", k=12), 6)
    assert entries == pytest.approx(12, rel=0.03)
    assert adaptive.mean() < 0.6 * fixed.mean()
    some = p[::8]
    miss = torch.log1p(-some.clamp(max=1 - 1e-12))
    draws = next(n for n in range(12, 4000, 4) if -torch.expm1(n * miss).sum(-1).mean() >= 12)
    sampled, more = squared_errors(logits[::8], Selection(kind="sample", draws=draws), 6)
    assert more > 0.97 * 12
    assert adaptive[::8].mean() < 0.7 * sampled.mean()


@pytest.mark.slow
def test_truncated_scalars(logits: torch.Tensor) -> None:
    labels = logits.argmin(-1)
    logp = logits.double().log_softmax(-1)
    found = select(logits, Selection(k=50, force_label=True), labels=labels, temperatures=(1.0, 2.0))
    rest = logp.scatter(-1, found.ids, -torch.inf)
    for column, t in enumerate((1.0, 2.0)):
        partition = (logp / t).logsumexp(-1)
        exact = (rest / t).logsumexp(-1) - partition
        torch.testing.assert_close(found.log_tail[:, column].double(), exact, atol=2e-6, rtol=1e-6)
        torch.testing.assert_close(found.log_partition[:, column].double(), partition, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(found.logprobs.double(), logp.gather(-1, found.ids), atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(found.entropy.double(), -(logp.exp() * logp).sum(-1), atol=1e-6, rtol=1e-6)
