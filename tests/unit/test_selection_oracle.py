"""A thousand rows a vocabulary against float64: what is kept, and every number, to the last digits of float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdcache import Selection, SparseTargets, select
from kdcache.pretrained import load_model, load_tokenizer
from tests.sampling import logits_of, tau_of

pytestmark = pytest.mark.long

ROWS, TEMPERATURES = 200, (1.0, 2.0, 0.5)
TEACHERS = {512: ("stories260K", "tinystories.txt"), 32_000: ("lab32k", "gsm8k-test.jsonl")}


def close(found: Tensor, exact: Tensor, error: float = 1e-7) -> None:
    """Within an error and twice the rounding to float32, which alone takes nearly all of one."""
    torch.testing.assert_close(found.double(), exact, atol=error, rtol=2**-23)


def is_largest(x: Tensor, ids: Tensor) -> Tensor:
    """Whether the ids of each row are those that a stable sort puts first, in that order."""
    values = x.gather(-1, ids)
    falling = (values.diff(dim=-1) < 0) | ((values.diff(dim=-1) == 0) & (ids.diff(dim=-1) > 0))
    last = values[:, -1:]
    passed_over = (x > last).sum(-1) - (values > last).sum(-1)
    ties = (x == last) & (torch.arange(x.shape[-1]) <= ids[:, -1:])
    return falling.all(-1) & (passed_over == 0) & (ties.sum(-1) == (values == last).sum(-1))


def check_topk(x: Tensor, logp: Tensor, labels: Tensor, found: SparseTargets) -> None:
    assert is_largest(x, found.ids).all()
    close(found.logprobs, logp.gather(-1, found.ids))
    torch.testing.assert_close(found.weights.double(), logp.gather(-1, found.ids).exp(), atol=0, rtol=4e-6)
    close(found.entropy, -(logp.exp() * logp).sum(-1), 4e-7)
    close(found.label_logprob, logp.gather(-1, labels[:, None])[:, 0])
    for column, t in enumerate(TEMPERATURES):
        partition = (logp / t).logsumexp(-1)
        close(found.log_partition[:, column], partition, 2e-7)
        tail = (logp / t).scatter(-1, found.ids, -torch.inf).logsumexp(-1) - partition
        close(found.log_tail[:, column], tail, 4e-7)


def check_ipps(logp: Tensor, k: int, found: SparseTargets) -> None:
    p = logp.exp()
    assert torch.equal(found.count, (p > 0).sum(-1).clamp(max=k))
    assert (found.count == k).all()  # no row here has less support
    assert (found.ids.sort(-1).values.diff(dim=-1) > 0).all()
    torch.testing.assert_close(found.weights.double().sum(-1), torch.ones(len(p)).double(), atol=1e-6, rtol=0)
    tau, light = tau_of(p, k)[:, None], found.logprobs.isnan()
    own = p.gather(-1, found.ids)
    heavy = p >= tau * (1 + 3e-5)  # nearer to tau an id may be either: that is unbiased too
    assert ((found.weights * ~light > 0).sum(-1) >= heavy.sum(-1)).all()
    assert (light | (own >= tau * (1 - 3e-5))).all()
    exact = torch.where(light, tau, own)
    torch.testing.assert_close(found.weights.double(), exact, atol=0, rtol=2e-5)
    clear = ((p > tau * (1 - 3e-5)) == heavy).all(-1)  # nobody is near: then tau is tau, to float32
    torch.testing.assert_close(found.weights.double()[clear], exact[clear], atol=0, rtol=6e-7)
    assert clear.float().mean() > 0.8


@pytest.mark.parametrize("vocab", [512, 32_000, 152_064])
@pytest.mark.parametrize("kind", ["random", "peaked", "flat", "tied", "teacher"])
def test_a_thousand_rows(kind: str, vocab: int, request: pytest.FixtureRequest) -> None:
    if kind == "teacher" and vocab not in TEACHERS:
        kind = "half"
    rows = teacher_rows(vocab, request) if kind == "teacher" else logits_of(kind, vocab, ROWS).float()
    assert len(rows) == ROWS
    labels = torch.randint(vocab, (ROWS,), generator=torch.Generator().manual_seed(0))
    for part in torch.arange(ROWS).split(max(1, (1 << 22) // vocab)):
        x, logp = rows[part], rows[part].double().log_softmax(-1)
        found = select(x, Selection(k=64), labels=labels[part], temperatures=TEMPERATURES)
        check_topk(x, logp, labels[part], found)
        keys = torch.stack([torch.full_like(part, vocab), part, part], -1)
        check_ipps(logp, 12, select(x, Selection(kind="ipps", k=12), temperatures=TEMPERATURES, keys=keys))


def teacher_rows(vocab: int, request: pytest.FixtureRequest) -> Tensor:
    assets: Path = request.getfixturevalue("assets")
    model, text = TEACHERS[vocab]
    tokens = load_tokenizer(assets / "models" / model)((assets / "text" / text).read_text()[:8000])["input_ids"]
    teacher = load_model(assets / "models" / model, "teacher", "float32", torch.device("cpu")).eval()
    with torch.inference_mode():
        logits: Tensor = teacher(input_ids=torch.tensor([tokens[:ROWS]]), use_cache=False).logits[0].float()
    return logits.clone()
