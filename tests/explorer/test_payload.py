"""Payload hold what the targets say, for every kind of selection, to the digits that they promise."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kdcache import Selection, SparseTargets, select
from kdcache.explorer.payload import pack, ratio, row_arrays, target_arrays
from kdcache.rows import PackedRow
from tests.explorer.unpacking import nats, ratios, unpack

VOCAB = 200
KINDS = {
    "topk": Selection("topk", k=12),
    "topp": Selection("topp", k=20, top_p=0.9),
    "forced": Selection("topk", k=6, force_label=True),
    "ipps": Selection("ipps", k=9),
    "sample": Selection("sample", draws=15),
    "full": Selection("full"),
}


def made(kind: str, n: int = 40) -> tuple[SparseTargets, np.ndarray]:
    random = torch.Generator().manual_seed(5)
    logits = torch.randn(n, VOCAB, generator=random) * torch.linspace(0.5, 9, n)[:, None]
    labels = torch.randint(0, VOCAB, (n,), generator=random)
    return select(logits, KINDS[kind], labels=labels, temperatures=(1.0, 2.0)), labels.numpy()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top", [4, 1000])
def test_a_block_says_what_the_targets_say(kind: str, top: int) -> None:
    targets, labels = made(kind)
    found = unpack(pack(target_arrays(targets, labels, top)))
    assert (found["count"] == targets.count.numpy()).all()
    assert (found["shown"] == np.minimum(found["count"], top)).all()
    np.testing.assert_allclose(nats(found["entropy"]), targets.entropy.numpy(), atol=3e-4)
    np.testing.assert_allclose(nats(found["surprise"]), -targets.label_logprob.numpy(), atol=3e-4)
    ends = np.cumsum(found["shown"])
    for m, (end, shown) in enumerate(zip(ends, found["shown"], strict=True)):
        here = slice(end - shown, end)
        order = targets.weights[m, : targets.count[m]].argsort(descending=True, stable=True)
        ids, logs = found["ids"][here], -np.cumsum(found["nats"][here]) / 2048
        values = targets.weights.log() if targets.sampled else targets.logprobs
        np.testing.assert_allclose(logs, values[m, order[:shown]].numpy(), atol=3e-4)
        assert (ids == targets.ids[m, order[:shown]].numpy()).all()
        if targets.sampled:
            own = ~torch.isnan(targets.logprobs[m, order[:shown]])
            assert (found["own"][here].astype(bool) == own.numpy()).all()
            continue
        for number, temperature in enumerate((1.0, 2.0)):  # what the page computes from it, to three digits
            log_p, log_tail = targets[m].at_temperature(temperature)
            seen = np.exp(logs / temperature).sum()
            hidden = seen * np.exp(ratios(found[f"hidden.{number}"])[m])
            tail = (seen + hidden) * np.exp(ratios(found[f"tail.{number}"])[m])
            whole = seen + hidden + tail
            np.testing.assert_allclose(np.exp(logs / temperature) / whole, log_p[order[:shown]].exp(), rtol=2e-3)
            np.testing.assert_allclose(tail / whole, log_tail.exp(), rtol=2e-3, atol=1e-30)


def test_what_is_unknown_is_not_told() -> None:
    targets, labels = made("topk")
    less = dataclasses.replace(targets, entropy=None, label_logprob=None)
    found = unpack(pack(target_arrays(less, labels, 99)))
    assert len(found["entropy"]) == 0
    among = ((less.ids == torch.from_numpy(labels)[:, None]) & less.valid).any(-1).numpy()
    assert among.any() and not among.all()
    surprise = nats(found["surprise"])
    assert (np.isnan(surprise) == ~among).all()  # where an entry is the label, its own log p is known
    np.testing.assert_allclose(surprise[among], -targets.label_logprob.numpy()[among], atol=3e-4)


def test_slots_with_and_without_targets() -> None:
    targets, labels = made("topk", 4)
    row = PackedRow(
        tokens=np.array([5, 6, 7, 8, 9, 10], np.int32), piece_lengths=np.array([2, 4]),
        piece_documents=np.array([0, 1]), supervised=np.ones(6, bool),
    )  # fmt: skip
    half = dataclasses.replace(targets, count=torch.tensor([12, 0, 12, 12]))
    found = unpack(pack({**row_arrays(row, half), **target_arrays(half, labels, 99)}))
    assert found["tokens"].tolist() == [5, 6, 7, 8, 9, 10]
    assert found["slots"].tolist() == [2, 0, 1, 2, 2, 0]
    assert found["count"].tolist() == [12, 12, 12]


def test_large_numbers_and_signs() -> None:
    values = np.array([0, 1, 255, 256, 65_535, 1 << 24, (1 << 32) - 1])
    assert (unpack(pack({"a": values, "none": values[:0]}))["a"] == values).all()
    coded = ratio(torch.tensor([0.0, -1.5, 1.5, -torch.inf, torch.nan, 40.25]))
    assert ratios(coded).tolist() == [0.0, -1.5, 1.5, -np.inf, -np.inf, 40.25]
