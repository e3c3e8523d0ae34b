"""The compact codec: what comes back is within its bounds, costs what it says, and lies are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numcodecs import Zstd

from kdcache import Selection, SparseTargets, select
from kdcache.codec.compact import CompactCodec
from kdcache.errors import ConfigError, CorruptCacheError

TEMPERATURES = (1.0, 2.0)


def make(kind: str = "random", vocab: int = 500, k: int = 16, rows: int = 200) -> SparseTargets:
    torch.manual_seed(1)
    logits = torch.randn(rows, vocab) * {"random": 3, "flat": 1e-3, "wide": 8}.get(kind, 1)
    if kind == "peaked":
        logits[:, 7] += torch.linspace(0, 60, rows)
    return select(logits, Selection(k=k), labels=torch.randint(vocab, (rows,)), temperatures=TEMPERATURES)


def codec(bits: int = 6, vocab: int = 500, k: int = 16, **changes: Any) -> CompactCodec:
    usual: dict[str, Any] = {
        "kind": "topk",
        "width": k,
        "vocab_size": vocab,
        "temperatures": TEMPERATURES,
        "bits": bits,
    }
    return CompactCodec(**{**usual, **changes})


def aligned(again: SparseTargets, whole: SparseTargets) -> SparseTargets:
    """The decoded targets with entries in the order of the original."""
    assert torch.equal(again.ids.long().sort(-1).values, whole.ids.sort(-1).values)
    order = again.ids.argsort(-1).gather(-1, whole.ids.argsort(-1).argsort(-1))
    back = again._map(lambda x: x.gather(-1, order) if x.shape == order.shape else x)
    assert torch.equal(back.ids.long(), whole.ids)
    return back


def coarse_kl(whole: SparseTargets, again: SparseTargets, t: float) -> torch.Tensor:
    """KL from the original to the stored targets, entries and tail, float64."""
    (p, tail), (q, stored) = ([x.double() for x in targets.at_temperature(t)] for targets in (whole, again))
    last = torch.where(torch.isinf(tail), 0.0, tail.exp() * (tail - stored))
    return (p.exp() * (p - q)).sum(-1) + last


@pytest.mark.parametrize("kind", ["random", "flat", "peaked", "wide"])
@pytest.mark.parametrize("vocab", [16, 500, 70_000])
@pytest.mark.parametrize("bits", [4, 6, 8, 9, 16])
def test_what_comes_back(kind: str, vocab: int, bits: int) -> None:
    whole, how = make(kind, vocab), codec(bits, vocab)
    again = aligned(how.decode(how.encode(whole), 200), whole)
    assert torch.isfinite(again.logprobs).all()
    assert (again.weights > 0).all()
    assert (again.entropy - whole.entropy).abs().max() <= 1 / 256 + 1e-5
    assert (again.label_logprob - whole.label_logprob).abs().max() <= 1 / 256 + 1e-5
    near = whole.log_tail > -100
    torch.testing.assert_close(again.log_tail[near], whole.log_tail[near], atol=1 / 128 + 1e-4, rtol=0)
    for t in TEMPERATURES:
        logprobs, tail = again.at_temperature(t)
        torch.testing.assert_close(logprobs.exp().sum(-1) + tail.exp(), torch.ones(200), atol=1e-4, rtol=0)
    c = 2**bits - 1
    levels = (c * (whole.logprobs.double() / 6).exp()).round().clamp(min=1)  # T up to 2: the sixth root
    expected = (levels / c) ** 6
    expected *= (1 - again.log_tail[:, :1].double().exp()) / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(again.weights.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [6, 8, 12])
def test_the_kl_that_storage_adds(bits: int) -> None:
    """At 6 bits below 0.001 in the mean and 0.01 at worst, and four times less for each further bit."""
    for kind in ("random", "peaked", "flat"):
        whole, how = make(kind, 2000, 64), codec(bits, 2000, 64)
        again = aligned(how.decode(how.encode(whole), 200), whole)
        for t in TEMPERATURES:
            kl = coarse_kl(whole, again, t)
            assert kl.min() > -1e-6
            assert kl.mean() <= 1e-3 / 4 ** (bits - 6) + 3e-6, (kind, t)
            assert kl.max() <= 1e-2 / 4 ** (bits - 6) + 3e-5, (kind, t)


def test_nothing_is_lost_when_everything_is_kept() -> None:
    whole, how = make("random", 16, 16), codec(16, 16, 16)
    again = how.decode(how.encode(whole), 200)
    assert torch.isneginf(again.log_tail).all()
    torch.testing.assert_close(again.weights.sum(-1), torch.ones(200), atol=1e-5, rtol=0)


@pytest.mark.parametrize("vocab", [300, 65_536, 1 << 31])
def test_vocabularies_up_to_2_31(vocab: int) -> None:
    """Ids at both ends; the table of ranks is not built for the largest one here, only its arithmetic is used."""
    if vocab == 1 << 31:
        with pytest.raises(CorruptCacheError, match="outside the vocabulary"):
            codec(vocab=vocab, id_order=(vocab,))
        return
    whole, how = make(vocab=vocab, k=2, rows=5), codec(vocab=vocab, k=2)
    ids = torch.tensor([[0, vocab - 1]] * 5)
    whole = whole._map(lambda x: ids if x.shape == ids.shape and not x.is_floating_point() else x)
    assert how.decode(how.encode(whole), 5).ids.tolist() == ids.tolist()


def test_an_order_changes_no_content_and_saves_bytes() -> None:
    torch.manual_seed(3)
    popularity = -2 * torch.arange(1, 5001).float().log()[torch.randperm(5000)]
    whole = select(torch.randn(200, 5000) + popularity, Selection(k=32), labels=torch.zeros(200, dtype=torch.long),
                   temperatures=TEMPERATURES)  # fmt: skip
    popular = torch.bincount(whole.ids.flatten(), minlength=5000).argsort(descending=True)[:900].tolist()
    plain, ordered = codec(vocab=5000, k=32), codec(vocab=5000, k=32, id_order=tuple(popular))
    a, b = plain.encode(whole), ordered.encode(whole)
    assert len(b["ids"]) + len(b["ids_far"]) < len(a["ids"]) + len(a["ids_far"])
    one, two = (aligned(how.decode(streams, 200), whole) for how, streams in ((plain, a), (ordered, b)))
    torch.testing.assert_close(one.logprobs, two.logprobs, atol=1e-5, rtol=0)  # summed in another order


def test_a_small_kept_mass_is_not_lost() -> None:
    torch.manual_seed(0)
    whole = select(0.02 * torch.randn(50, 152_064), Selection(k=4), labels=torch.zeros(50, dtype=torch.long),
                   temperatures=TEMPERATURES)  # fmt: skip
    how = codec(vocab=152_064, k=4)
    again = aligned(how.decode(how.encode(whole), 50), whole)
    assert (again.logprobs - whole.logprobs).abs().max() <= 1 / 32  # the kept mass, and the spread


def test_a_row_without_targets() -> None:
    how = codec()
    assert how.decode(how.encode(make()[:0]), 0).ids.shape == (0, 16)


def frame(array: np.ndarray) -> bytes:
    return bytes(Zstd(1).encode(np.ascontiguousarray(array)))


SIZE = 200 * 16
LIES: dict[str, tuple[str, bytes]] = {
    "not a frame": ("ids", b"12345678"),
    "empty": ("ids", b""),
    "too short": ("ids", frame(np.zeros(SIZE - 1, np.uint8))),
    "too long": ("values", frame(np.ones(SIZE + 1, np.uint8))),
    "bomb": ("ids", frame(np.zeros(1 << 24, np.uint8))),
    "cut off": ("values", frame(np.random.default_rng(0).integers(1, 64, SIZE).astype(np.uint8))[:-9]),
    "ranks above the vocabulary": ("ids", frame(np.full(SIZE, 200, np.uint8))),
    "far entries missing": ("ids", frame(np.full(SIZE, 255, np.uint8))),
    "far entries for nothing": ("ids_far", frame(np.zeros(8, np.uint8))),
    "value zero": ("values", frame(np.zeros(SIZE, np.uint8))),
    "value above the levels": ("values", frame(np.full(SIZE, 64, np.uint8))),
    "scalars short": ("scalars", frame(np.zeros(2 * 3 * 200, np.uint8))),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused(lie: str) -> None:
    how, (stream, data) = codec(), LIES[lie]
    with pytest.raises(CorruptCacheError):
        how.decode({**how.encode(make()), stream: data}, 200)


def test_a_declared_size_is_believed_only_if_it_is_the_right_one() -> None:
    """A frame whose header promises the right size and whose body does not keep it."""
    how = codec()
    honest = how.encode(make())
    body = bytearray(frame(np.zeros(SIZE, np.uint8)))
    body[-1] ^= 0xFF
    for data in (bytes(body), honest["values"][:12] + honest["values"][13:]):
        with pytest.raises(CorruptCacheError):
            how.decode({**honest, "values": data}, 200)


def test_bad_settings() -> None:
    for bits in (3, 17):
        with pytest.raises(ConfigError, match="bits"):
            codec(bits)
    with pytest.raises(ConfigError, match="must store temperature 1"):
        codec(temperatures=(2.0,))
    for order in ((1, 1), (-1,), (500,), (True,), ("1",)):
        with pytest.raises(CorruptCacheError, match="id order"):
            codec(id_order=order)
