"""The codec gives back what it was given, within its stated bound, and believes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from kdcache import Selection, SparseTargets, select
from kdcache.codec import make_codec
from kdcache.codec.plain import PlainCodec
from kdcache.errors import ConfigError, CorruptCacheError


def make(kind: str = "random", vocab: int = 500, k: int = 16) -> SparseTargets:
    torch.manual_seed(1)
    logits = torch.randn(200, vocab) * {"random": 3, "flat": 1e-3, "wide": 8}.get(kind, 1)
    if kind == "peaked":
        logits[:, 7] += torch.linspace(0, 35, 200)
    return select(logits, Selection(k=k), labels=torch.randint(vocab, (200,)), temperatures=(1.0, 2.0))


def codec(precision: str, vocab: int = 500, k: int = 16, **changes: Any) -> PlainCodec:
    usual: dict[str, Any] = {"kind": "topk", "width": k, "vocab_size": vocab, "temperatures": (1.0, 2.0)}
    return PlainCodec(**{**usual, "precision": precision, **changes})


@pytest.mark.parametrize("kind", ["random", "flat", "peaked", "wide"])
@pytest.mark.parametrize("vocab", [500, 70_000])
def test_float32_is_lossless(kind: str, vocab: int) -> None:
    whole, how = make(kind, vocab), codec("float32", vocab)
    again = how.decode(how.encode(whole), 200)
    for field in dataclasses.fields(whole):
        if isinstance(getattr(whole, field.name), torch.Tensor):
            torch.testing.assert_close(
                getattr(again, field.name), getattr(whole, field.name), rtol=0, atol=0, check_dtype=False
            )


@pytest.mark.parametrize("kind", ["random", "flat", "peaked", "wide"])
def test_float16_keeps_its_bound(kind: str) -> None:
    whole, how = make(kind), codec("float16")
    again = how.decode(how.encode(whole), 200)
    assert torch.equal(again.ids, whole.ids.int())
    stated = whole.logprobs > -38.8
    assert (again.logprobs - whole.logprobs).abs()[stated].max() <= 2e-3
    assert torch.isfinite(again.logprobs).all()
    torch.testing.assert_close(again.log_tail, whole.log_tail, rtol=0, atol=0)
    kept = -torch.expm1(whole.log_tail[:, 0].double())
    error = (again.weights.double().sum(-1) - kept).abs()
    assert (
        error <= torch.where(kept >= 0.5, 1e-6, 1e-3 * kept + 1e-6)
    ).all()  # 16 float32 roundings where it is scaled


def test_float16_keeps_the_bound_on_everything_that_float32_can_hold() -> None:
    logp = torch.linspace(0.0, -38.0, 400)[:, None].expand(-1, 2).clone()
    logp[:, 1] = -38.0
    whole = make(k=2)
    probe = dataclasses.replace(whole[:1], logprobs=logp[:1], weights=logp[:1].exp())
    how = codec("float16", k=2)
    for row in logp:
        tail = torch.log1p(-row.double().exp().sum().clamp(max=1 - 1e-12)).float().expand(1, 2)
        one = dataclasses.replace(probe, logprobs=row[None], weights=row[None].exp(), log_tail=tail)
        again = how.decode(how.encode(one), 1)
        assert (again.logprobs[0] - row).abs().max() <= 2e-3


@pytest.mark.parametrize("k", [1, 4])
def test_float16_keeps_its_bound_where_almost_nothing_is_kept(k: int) -> None:
    torch.manual_seed(0)
    whole = select(0.02 * torch.randn(50, 152_064), Selection(k=k), labels=torch.zeros(50, dtype=torch.long))
    how = codec("float16", 152_064, k, temperatures=(1.0,))
    assert (how.decode(how.encode(whole), 50).logprobs - whole.logprobs).abs().max() <= 2e-3


def test_a_row_without_targets() -> None:
    how = codec("float16")
    assert how.decode(how.encode(make()[:0]), 0).ids.shape == (0, 16)


def test_spread_puts_zeros_where_there_is_no_target() -> None:
    whole = make()[:3]
    row = whole.spread(torch.tensor([1, 4, 5]), 8)
    assert row.count.tolist() == [0, 16, 0, 0, 16, 16, 0, 0]
    assert torch.equal(row[torch.tensor([1, 4, 5])].ids, whole.ids)
    assert row.entropy[0] == 0
    assert torch.isneginf(row.logprobs[0]).all()
    assert (row.weights[0] == 0).all()


def damaged() -> list[tuple[str, Any]]:
    ids = np.zeros((200, 16), "<u2")
    ids[3, 4] = 500
    values = np.zeros((200, 16), "<f4")
    values[0, 0] = np.nan
    scalars = np.zeros((5, 200), "<f4")
    scalars[1, 1] = np.nan
    return [
        ("ids", b""),
        ("ids", ids.tobytes()),
        ("ids", ids.tobytes()[:-2]),
        ("values", values.tobytes()),
        ("values", values.tobytes() + b"1234"),
        ("scalars", scalars.tobytes()),
        ("scalars", scalars.tobytes()[:-4]),
    ]


@pytest.mark.parametrize(("stream", "lie"), damaged())
def test_lies_are_refused(stream: str, lie: bytes) -> None:
    how = codec("float32")
    with pytest.raises(CorruptCacheError):
        how.decode({**how.encode(make()), stream: lie}, 200)


def test_bad_settings() -> None:
    for precision in ("float8", "3", "17", "-4", ""):
        with pytest.raises(ConfigError, match="--precision"):
            make_codec(kind="topk", width=4, vocab_size=9, temperatures=(1.0,), precision=precision)
    with pytest.raises(ConfigError, match="--precision"):
        codec("float8")
    with pytest.raises(ConfigError, match="must store temperature 1"):
        codec("float32", temperatures=(2.0,))
