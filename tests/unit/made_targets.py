"""Targets for tests of the codec: every kind of selection, drawn here in float64, slowly and plainly.

`sample` and `ipps` have heavies first, lights after them, and NaN where an entry has no value of its own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from kdcache.codec import Layout
from kdcache.entry_form import EntryForm
from kdcache.known import Known
from kdcache.targets import SparseTargets

KINDS = ("topk", "topp", "full", "sample", "sample+label", "sample+power", "ipps", "ipps+label")
DRAWS, POWER = 20, 0.7


def logits(shape: str = "random", n: int = 60, vocab: int = 500, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = {"random": 3, "flat": 1e-3, "wide": 12}.get(shape, 1)
    out = scale * torch.randn(n, vocab, generator=generator, dtype=torch.float64)
    if shape == "peaked":
        out[:, 7] += torch.linspace(0, 45, n, dtype=torch.float64)
    return out


def width_of(kind: str, k: int, vocab: int) -> int:
    if kind == "full":
        return vocab
    return min(vocab, DRAWS + (kind == "sample+label")) if kind.startswith("sample") else k


def is_sampled(kind: str) -> bool:
    return kind.startswith(("sample", "ipps"))


def form_of(kind: str) -> EntryForm:
    if not is_sampled(kind):
        return EntryForm(ragged=kind == "topp", every_id=kind == "full")
    drawn = kind.startswith("sample")
    most = int(kind.endswith("+label")) if drawn else None
    draws, free = DRAWS if drawn else None, kind.endswith("+power")
    return EntryForm(sampled=True, ragged=True, most_heavies=most, draws=draws, free_weights=free)


def layout_of(kind: str, k: int = 12, vocab: int = 500, draws: int | None = None, **changes: Any) -> Layout:
    """The layout of `make_targets` of a kind."""
    form, temperatures = form_of(kind), changes.pop("temperatures", (1.0, 2.0))
    if draws is not None:
        form = dataclasses.replace(form, draws=draws)
    tails = () if form.sampled else temperatures
    known = Known(partitions=temperatures, tails=tails, tail_sum="complement" if tails else None)
    options: dict[str, Any] = {
        "kind": kind.split("+")[0], "form": form, "width": width_of(kind, k, vocab), "vocab_size": vocab,
        "temperatures": temperatures, "known": known,
    }  # fmt: skip
    return Layout(**{**options, **changes})


def make_targets(
    kind: str,
    x: Tensor,
    *,
    k: int = 12,
    temperatures: tuple[float, ...] = (1.0, 2.0),
    sample_temperature: float = 1.0,
    top_p: float = 0.9,
    seed: int = 0,
) -> SparseTargets:
    """Targets of `[n, V]` float64 logits; the label of each position is its index, modulo V."""
    n, vocab = x.shape
    generator = torch.Generator().manual_seed(seed)
    logp = x.log_softmax(-1)
    labels = torch.arange(n) % vocab
    partition = torch.stack([(logp / t).logsumexp(-1) for t in temperatures], -1)
    width = width_of(kind, k, vocab)
    rows = []
    for i in range(n):
        if is_sampled(kind):
            p = (logp[i] / sample_temperature).softmax(-1)
            if kind.endswith("+power"):
                rows.append(_weighted(p, generator))
                continue
            draw = _sample if kind.startswith("sample") else _ipps
            rows.append(draw(p, k, int(labels[i]) if kind.endswith("+label") else None, generator))
        else:
            count = (
                width if kind != "topp" else 1 + int((logp[i].exp().sort(descending=True)[0].cumsum(0) < top_p).sum())
            )
            ids = logp[i].topk(min(count, width)).indices
            rows.append((ids, logp[i][ids].exp(), torch.ones(len(ids), dtype=torch.bool)))
    ids = torch.zeros(n, width, dtype=torch.int64)
    weights, logprobs = torch.zeros(n, width), torch.full((n, width), -torch.inf)
    tails = torch.full((n, len(temperatures)), torch.nan)
    for i, (chosen, weight, known) in enumerate(rows):
        size = len(chosen)
        ids[i, :size], weights[i, :size] = chosen, weight.float()
        logprobs[i, :size] = torch.where(known, logp[i][chosen], torch.nan).float()
        if not is_sampled(kind):
            rest = logp[i].clone()
            rest[chosen] = -torch.inf
            for c, t in enumerate(temperatures):
                tails[i, c] = ((rest / t).logsumexp(-1) - partition[i, c]).float()
    return SparseTargets(
        ids=ids,
        logprobs=logprobs,
        weights=weights,
        count=torch.tensor([len(chosen) for chosen, _, _ in rows]),
        log_partition=torch.where(torch.tensor(temperatures) == 1, 0.0, partition).float(),
        log_tail=None if is_sampled(kind) else tails,
        entropy=-(logp.exp() * logp).sum(-1).float(),
        label_logprob=logp.gather(-1, labels[:, None])[:, 0].float(),
        temperatures=temperatures,
        kind=kind.split("+")[0],
        sample_temperature=sample_temperature,
    )


def _sample(p: Tensor, _: int, label: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    own = 0.0
    if label is not None:
        own = float(p[label])
        p = p.clone()
        p[label] = 0
    if p.sum() <= 0:
        return torch.tensor([label]), torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.bool)
    drawn, times = torch.multinomial(p, DRAWS, replacement=True, generator=generator).unique(return_counts=True)
    weights = (1 - own) * times.double() / DRAWS
    known = torch.zeros(len(drawn), dtype=torch.bool)
    if label is None:
        return drawn, weights, known
    first = torch.tensor([label]), torch.tensor([own], dtype=torch.float64), torch.ones(1, dtype=torch.bool)
    return torch.cat([first[0], drawn]), torch.cat([first[1], weights]), torch.cat([first[2], known])


def _weighted(p: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    q = p**POWER / (p**POWER).sum()
    drawn, shares, known = _sample(q, 0, None, generator)
    return drawn, shares * p[drawn] / q[drawn], known


def _ipps(p: Tensor, k: int, label: int | None, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    heavy: list[int] = [] if label is None else [label]
    rest = p.clone()
    rest[heavy] = 0
    if int((rest > 0).sum()) <= k - len(heavy):
        ids = torch.cat([torch.tensor(heavy, dtype=torch.int64), rest.nonzero()[:, 0]])
        return ids, p[ids], torch.ones(len(ids), dtype=torch.bool)
    while float(rest.max()) * (k - len(heavy)) >= float(rest.sum()) and k - len(heavy) > 1:
        heavy.append(int(rest.argmax()))
        rest[heavy[-1]] = 0
    lights = k - len(heavy)
    tau = rest.sum() / lights
    points = (rest / tau).cumsum(0) + torch.rand((), generator=generator, dtype=torch.float64)
    light = (points.floor().diff(prepend=points[:1].floor() * 0) > 0).nonzero()[:, 0][:lights]
    if len(light) < lights:  # rounding ate the last point
        spare = torch.tensor([i for i in rest.argsort(descending=True).tolist() if i not in light.tolist()])
        light = torch.cat([light, spare[: lights - len(light)]])
    ids = torch.cat([torch.tensor(heavy, dtype=torch.int64), light])
    weights = torch.cat([p[heavy], tau.expand(lights)])
    return ids, weights, torch.arange(k) < len(heavy)
