"""The compact codec keeps its stated bounds, against float64, and its streams are what its description says."""

from __future__ import annotations

import dataclasses
import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kdcache import compiled as compiled_module
from kdcache.codec import deflate, make_codec
from kdcache.codec.compact import CompactCodec
from kdcache.codec.quantizer import Levels
from kdcache.errors import CorruptCacheError, TargetError
from kdcache.targets import SparseTargets
from tests.unit.made_targets import DRAWS, KINDS, layout_of, logits, make_targets

OWN_KINDS = tuple(kind for kind in KINDS if kind != "sample+power")  # that one is packed as another

SHAPES = ("random", "flat", "peaked", "wide")
Streams = dict[str, NDArray[Any]]


def codec(kind: str = "topk", bits: int = 6, **changes: Any) -> CompactCodec:
    order = {"id_order": changes.pop("id_order", ())}
    how = make_codec(layout_of(kind, **changes), precision=str(bits), **order)
    assert isinstance(how, CompactCodec)
    return how


def there_and_back(how: CompactCodec, whole: SparseTargets) -> SparseTargets:
    """Decoded targets, their entries in the order of the original's."""
    again = how.decode(how.encode(whole), len(whole.count))
    key, wanted = (torch.where(t.valid, t.ids.long(), 1 << 40) for t in (again, whole))
    back = key.argsort(-1).gather(-1, wanted.argsort(-1).argsort(-1))
    return dataclasses.replace(again, **{n: getattr(again, n).gather(-1, back) for n in ("ids", "logprobs", "weights")})


def added_kl(whole: SparseTargets, again: SparseTargets, temperature: float) -> torch.Tensor:
    (p, tail), (q, stored) = whole.at_temperature(temperature), again.at_temperature(temperature)
    p, q, tail, stored = (x.double() for x in (p, q, tail, stored))
    last = torch.where(torch.isinf(tail), 0.0, tail.exp() * (tail - stored))
    return torch.where(whole.valid, p.exp() * (p - q), 0.0).sum(-1) + last


# The stated bounds.


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", (4, 6, 8, 9, 16))
@pytest.mark.parametrize("kind", ("topk", "topp", "full", "ipps", "ipps+label"))
def test_values_keep_the_stated_bound(kind: str, bits: int, shape: str) -> None:
    whole, how = make_targets(kind, logits(shape)), codec(kind, bits)
    again = there_and_back(how, whole)
    bound = how.error_bound

    def g(x: torch.Tensor) -> torch.Tensor:
        return bound["tau"] * (x / bound["tau"]).exp() + bound["beta"] * x

    heavy = whole.valid & ~whole.logprobs.isnan()
    if not heavy.any():  # a flat teacher has no heavies
        assert (kind, shape) == ("ipps", "flat")
        return
    for targets in (whole, again):
        assert torch.isfinite(targets.logprobs[heavy]).all()
    x, stored = (
        (t.logprobs.double() - torch.where(heavy, t.logprobs, -torch.inf).amax(-1, keepdim=True))[heavy]
        for t in (whole, again)
    )
    told = x >= bound["cut"]
    assert (g(stored) - g(x)).abs()[told].max() <= bound["step"] / 2 + 2e-5  # float32 of a logarithm near -50
    assert (stored[~told] - bound["cut"]).abs().max() <= 2e-5 if (~told).any() else True
    assert (again.weights[heavy] > 0).all() or shape in ("wide", "peaked")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", OWN_KINDS)
def test_measures_keep_the_stated_bounds(kind: str, shape: str) -> None:
    whole, how = make_targets(kind, logits(shape)), codec(kind)
    again, bound = there_and_back(how, whole), how.error_bound
    for name in ("entropy", "label_logprob"):
        assert (getattr(again, name) - getattr(whole, name)).abs().max() <= bound[name] + 1e-5
    if kind == "full":
        assert torch.isneginf(again.log_tail).all() and "log_odds" not in bound
    elif whole.sampled:
        error = (again.log_partition - whole.log_partition).abs()
        assert (error <= bound["renyi_entropy"] * 0.5 + 1e-5).all()  # log Z is half of it at T = 2
    else:
        for c in range(2):
            odds, stored = (t.log_tail[:, c].double() for t in (whole, again))
            odds, stored = (x - torch.log(-torch.expm1(x)) for x in (odds, stored))
            known = whole.log_tail[:, c] < -1e-4
            assert not known.any() or (odds - stored)[known].abs().max() <= bound["log_odds"] + 1e-3


@pytest.mark.parametrize("kind", ("topk", "topp", "full"))
@pytest.mark.parametrize("shape", SHAPES)
def test_entries_and_tail_are_one_distribution_at_every_temperature(kind: str, shape: str) -> None:
    whole, how = make_targets(kind, logits(shape)), codec(kind)
    again = there_and_back(how, whole)
    torch.testing.assert_close(again.weights, again.logprobs.exp(), rtol=3e-5, atol=0)
    for t in (1.0, 2.0):
        entries, tail = again.at_temperature(t)
        mass = entries.double().exp().sum(-1) + tail.double().exp()
        torch.testing.assert_close(mass, torch.ones_like(mass), rtol=0, atol=2e-5)
    assert (again.log_partition[:, 0] == 0).all()


TEMPERATURES = ((1.0,), (1.0, 2.0), (1.0, 4.0), (0.5, 1.0), (2.0, 1.0, 8.0), (1.0, 100.0))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("temperatures", TEMPERATURES)
@pytest.mark.parametrize("k", (12, 64))
def test_six_bits_add_little_kl_at_every_stored_temperature(
    k: int, temperatures: tuple[float, ...], shape: str
) -> None:
    whole = make_targets("topk", logits(shape, n=40, vocab=2000), k=k, temperatures=temperatures)
    again = there_and_back(codec("topk", k=k, vocab=2000, temperatures=temperatures), whole)
    for t in temperatures:
        kl = added_kl(whole, again, t)
        assert kl.mean() <= 1e-3 and kl.max() <= 1e-2


def test_each_further_bit_divides_the_kl_by_four() -> None:
    whole = make_targets("topk", logits(n=200), k=64)
    kl = [float(added_kl(whole, there_and_back(codec(k=64, bits=bits), whole), 1.0).mean()) for bits in (5, 7, 9)]
    assert all(10 < a / b < 24 for a, b in itertools.pairwise(kl))


def test_a_small_kept_mass_is_not_lost() -> None:
    whole = make_targets("topk", logits("flat", n=20, vocab=152_064) * 20, k=4)
    again = there_and_back(codec(k=4, vocab=152_064), whole)
    assert (again.logprobs - whole.logprobs).abs().max() <= 1 / 50  # 1/128 of the log-odds, and half a step
    assert (again.log_tail - whole.log_tail).abs().max() <= 1e-5


def test_a_small_tail_is_not_lost() -> None:
    whole = make_targets("topk", logits("peaked"))
    again = there_and_back(codec(), whole)
    assert whole.log_tail.min() < -35
    assert (again.log_tail - whole.log_tail).abs().max() <= 1 / 100


def test_a_forced_label_below_the_cut_is_kept_at_the_cut() -> None:
    whole = make_targets("topk", logits("random", n=8))
    logprobs = whole.logprobs.clone()
    logprobs[:, -1] = -200.0
    again = there_and_back(codec(), dataclasses.replace(whole, logprobs=logprobs))
    expected = again.logprobs[:, 0] + codec().error_bound["cut"]
    torch.testing.assert_close(again.logprobs[:, -1], expected, rtol=0, atol=1e-4)
    assert (again.weights[:, -1] > 0).all()


def test_a_label_of_no_probability_has_the_least_that_is_stored() -> None:
    whole = make_targets("topk", logits(n=4))
    whole = dataclasses.replace(whole, label_logprob=torch.tensor([-1.0, -torch.inf, -600.0, 0.0]))
    assert there_and_back(codec(), whole).label_logprob.tolist() == [-1.0, -65534 / 128, -65534 / 128, 0.0]


def test_the_scale_is_that_of_its_description() -> None:
    for bits, width, hottest in ((4, 1, 1.0), (6, 64, 2.0), (8, 32_000, 2.0), (16, 12, 100.0)):
        levels = Levels(bits=bits, width=width, temperatures=(1.0,), hottest=hottest)
        bound, x = levels.error_bound, levels.logs
        g = bound["tau"] * np.exp(x / bound["tau"]) + bound["beta"] * x
        np.testing.assert_allclose(np.diff(g), bound["step"], rtol=1e-9)
        assert x[0] == bound["cut"] == -min(hottest * math.log(4000 * width), 60) and x[-1] == 0
        assert len(x) == 1 << bits


# Ids.


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 2**31 - 1), st.integers(1, 9), st.integers(0, 1 << 20), st.booleans())
def test_ids_of_any_vocabulary(vocab: int, k: int, seed: int, ordered: bool) -> None:
    generator = np.random.default_rng(seed)
    k = min(k, vocab)
    near = min(vocab, 600)
    ids = np.stack([generator.choice(near, k, replace=False) for _ in range(5)]).astype(np.int64)
    ids[0] = vocab - 1 - ids[0]  # the last ids, and the gap before them
    order = tuple(generator.permutation(near)[: near // 2].tolist()) if ordered else ()
    whole = make_targets("topk", logits(n=5, vocab=max(k, 16)), k=k)
    whole = dataclasses.replace(whole, ids=torch.from_numpy(ids))
    how = codec(k=k, vocab=vocab, id_order=order)
    assert torch.equal(there_and_back(how, whole).ids.long(), whole.ids)


def test_an_order_changes_no_content_and_saves_bytes() -> None:
    popularity = (
        -2 * torch.arange(1, 5001).double().log()[torch.randperm(5000, generator=torch.Generator().manual_seed(3))]
    )
    whole = make_targets("topk", logits(n=200, vocab=5000) / 3 + popularity, k=32)
    popular = torch.bincount(whole.ids.flatten(), minlength=5000).argsort(descending=True)[:900].tolist()
    plain, ordered = codec(vocab=5000, k=32), codec(vocab=5000, k=32, id_order=tuple(popular))
    a, b = (len(deflate(how.encode(whole)["ids"])) for how in (plain, ordered))
    assert b < 0.8 * a
    one, two = there_and_back(plain, whole), there_and_back(ordered, whole)
    assert torch.equal(one.logprobs, two.logprobs) and torch.equal(one.log_partition, two.log_partition)


def test_an_order_must_be_one() -> None:
    for order in ((1, 1), (-1,), (500,), (True,), ("1",)):
        with pytest.raises(CorruptCacheError, match="id order"):
            codec(id_order=order)


def test_an_id_twice_is_not_packed() -> None:
    whole = make_targets("topk", logits(n=3))
    ids = whole.ids.clone()
    ids[1, 2] = ids[1, 5]
    with pytest.raises(TargetError, match="twice"):
        codec().encode(dataclasses.replace(whole, ids=ids))


# Against a decoder that is written from the description, an entry at a time, in float64.


def reference(how: CompactCodec, streams: Streams, positions: int) -> list[dict[str, Any]]:
    layout, bound, out = how.layout, how.error_bound, []
    sampled, ipps = layout.sampled, layout.kind == "ipps"
    measures = ([] if layout.kind == "full" else [f"odds{t:g}" for t in layout.temperatures]) if not sampled else []
    if sampled:
        measures = ["odds"] * (ipps or layout.heavies) + [f"renyi{t:g}" for t in layout.temperatures if t != 1]
    measures += ["entropy", "label"]
    counts = [name for name, there in (
        ("count", layout.kind not in ("topk", "full")), ("heavies", ipps or (sampled and layout.heavies)),
        ("floor", not sampled),
    ) if there]  # fmt: skip
    most = {"count": layout.width, "heavies": layout.width if ipps else 1, "floor": (1 << how.bits) - 1}
    sizes = [(most[name].bit_length() + 7) // 8 for name in counts]
    high = streams["scalars"].reshape(-1, positions).tolist()
    low = streams["scalars_low"].reshape(-1, positions).tolist()
    planes = (
        1 if layout.vocab_size <= 0 else 2 if layout.vocab_size <= 1 << 16 else 3 if layout.vocab_size <= 1 << 24 else 4
    )
    number = []
    for i in range(positions):
        row, at = {}, 0
        for name, size in zip(counts, sizes, strict=True):
            row[name] = int.from_bytes(bytes(high[at + b][i] for b in range(size)), "big")
            at += size
        for m, name in enumerate(measures):
            word = high[at + m][i] << 8 | low[m][i]
            if name.startswith("odds"):
                row[name] = -math.inf if word == 0 else (word - 32768) / 64
            else:
                row[name] = math.nan if word == 65535 else word / 128
        number.append({"count": layout.width, "heavies": 0, **row})
    if not sampled:
        number = [{**row, "heavies": row["count"]} for row in number]
    entries = sum(row["count"] for row in number)
    ids = iter(streams["ids"][:entries].tolist()) if "ids" in streams else iter(())
    ends = streams["ids"][entries:].reshape(planes, -1).T.tolist() if "ids" in streams else []
    far = iter([int.from_bytes(bytes(end), "big") for end in ends])
    wide = layout.draws > 255 if layout.kind == "sample" else how.bits > 8
    stored = streams["values"].reshape(2, -1).T.tolist() if wide else streams["values"].reshape(-1, 1).tolist()
    values = iter([int.from_bytes(bytes(v), "big") for v in stored])
    order = list(how.id_order) + [i for i in range(layout.vocab_size) if i not in set(how.id_order)]

    def x_of(level: int) -> float:
        left, right = bound["cut"], 0.0
        g = lambda x: bound["tau"] * math.exp(x / bound["tau"]) + bound["beta"] * x  # noqa: E731
        for _ in range(80):
            middle = (left + right) / 2
            left, right = (middle, right) if g(middle) < g(bound["cut"]) + level * bound["step"] else (left, middle)
        return left

    for row in number:
        found, rank = [], -1
        for j in range(row["count"]):
            if layout.kind == "full":
                found.append(j)
                continue
            rank = -1 if j in (0, row["heavies"]) else rank
            distance = next(ids)
            rank += 1 + distance + (next(far) if distance == 255 else 0)
            found.append(order[rank])
        t, heavy, light = layout.own_temperature, row["heavies"], row["count"] - row["heavies"]
        rest = (
            1 / (1 + math.exp(row.get("odds1" if not sampled else "odds", -math.inf))) if not sampled or light else 1.0
        )
        weights, logs = [], []
        if not sampled or ipps:
            logs = [x_of(next(values) + row.get("floor", 0)) for _ in range(heavy)]
            total = sum(math.exp(x / t) for x in logs)
            weights = [math.exp(x / t) * rest / total for x in logs]
        elif heavy:
            weights = [rest]
        lights = [1] * light if ipps else [next(values) for _ in range(light if sampled else 0)]
        mass = 1 - rest if heavy else 1.0
        weights += [mass * times / sum(lights) for times in lights]
        out.append({**row, "ids": found, "weights": weights})
    for left in (ids, far, values):
        assert next(left, None) is None
    return out


@pytest.mark.parametrize("kind", OWN_KINDS)
@pytest.mark.parametrize("bits", (6, 12))
@pytest.mark.parametrize("vocab", (90, 70_000))
def test_streams_are_what_their_description_says(kind: str, bits: int, vocab: int) -> None:
    if kind == "full" and vocab > 90:
        vocab = 300
    x = logits(n=9, vocab=vocab)
    order = tuple(range(50, 20, -1)) if kind != "full" else ()
    how = codec(kind, bits, vocab=vocab, id_order=order)
    whole = make_targets(kind, x)
    streams = how.encode(whole)
    again = how.decode(streams, 9)
    for i, row in enumerate(reference(how, streams, 9)):
        count = row["count"]
        assert again.count[i] == count and again.ids[i, :count].tolist() == row["ids"]
        np.testing.assert_allclose(again.weights[i, :count].numpy(), row["weights"], rtol=2e-5)
        assert again.entropy[i] == row["entropy"] and again.label_logprob[i] == -row["label"]
        for c, t in enumerate(how.layout.temperatures):
            if f"odds{t:g}" in row:
                expected = -math.log1p(math.exp(-row[f"odds{t:g}"]))
                np.testing.assert_allclose(again.log_tail[i, c], expected, rtol=1e-6)
            if f"renyi{t:g}" in row:
                np.testing.assert_allclose(again.log_partition[i, c], row[f"renyi{t:g}"] * (1 - 1 / t), rtol=1e-6)


def golden_targets(kind: str) -> SparseTargets:
    """Three positions of four entries; `ipps` has two heavies, `sample` a forced label."""
    rows = {
        "topk": [[0.5, 0.25, 0.125, 0.0625], [0.9, 1e-3, 1e-6, 1e-12], [0.25, 0.25, 0.25, 0.2]],
        "ipps": [[0.5, 0.2, 0.15, 0.15], [0.7, 0.2, 0.05, 0.05], [0.4, 0.3, 0.15, 0.15]],
        "sample": [[0.5, 0.25, 0.15, 0.1], [0.2, 0.4, 0.2, 0.2], [0.0625, 0.375, 0.375, 0.1875]],
    }
    weights = torch.tensor(rows[kind], dtype=torch.float64)
    known = torch.tensor([True, kind != "sample", kind == "topk", kind == "topk"])
    tail = (1 - weights.sum(-1)).clamp(min=1e-7).log()
    return SparseTargets(
        ids=torch.tensor([[7, 3, 900, 4], [999, 0, 500, 250], [1, 2, 3, 4]]),
        logprobs=torch.where(known, weights.log(), torch.nan).float(),
        weights=weights.float(),
        count=torch.full((3,), 4),
        log_partition=torch.tensor([[0.0, 0.75]] * 3),
        log_tail=torch.stack([tail, tail / 2], -1).float() if kind == "topk" else None,
        entropy=torch.tensor([1.5, 0.25, 3.0]),
        label_logprob=torch.tensor([-0.5, -12.0, -2.0]),
        temperatures=(1.0, 2.0),
        kind=kind,
    )


GOLDEN: dict[str, dict[str, str]] = {
    "topk": {
        "ids": "000005ff04f5f9ff0000000002007df3",
        "values": "000d16061100053f00030303",
        "scalars": "29003c7f7f7f7f7f7f000001000601",
        "scalars_low": "537344baceb0c02080400000",
    },
    "ipps": {
        "ids": "010500ff04fffaf902000000020284e3",
        "values": "2b3f263f383f",
        "scalars": "0404040202027f7f7f000000000001000601",
        "scalars_low": "ca73cac0c0c0c02080400000",
    },
    "sample": {
        "ids": "070000ffff04f5f903000000020283e8",
        "values": "040a060a0505040808",
        "scalars": "040404010101808080000000000001000601",
        "scalars_low": "0059adc0c0c0c02080400000",
    },
}


@pytest.mark.parametrize("kind", ("topk", "ipps", "sample"))
def test_golden_streams(kind: str) -> None:
    """Bytes that this format has written once are written and read for ever."""
    how = codec("sample+label" if kind == "sample" else kind, width=4, vocab=1000, id_order=(4, 3, 2, 1))
    streams = how.encode(golden_targets(kind))
    assert {name: stream.tobytes().hex() for name, stream in streams.items()} == GOLDEN[kind]
    again = how.decode({name: np.frombuffer(bytes.fromhex(text), np.uint8) for name, text in GOLDEN[kind].items()}, 3)
    tail = 0.0 if again.log_tail is None else again.log_tail[:, 0].exp()
    torch.testing.assert_close(again.weights.sum(-1) + tail, torch.ones(3))


# Lies, by name.


def lies() -> dict[str, tuple[str, str, NDArray[np.uint8]]]:
    def every(value: int, size: int = 60 * 12) -> NDArray[np.uint8]:
        return np.full(size, value, np.uint8)

    return {
        "ranks above the vocabulary": ("outside the vocabulary", "ids", every(200)),
        "far ends missing": ("do not agree", "ids", every(255)),
        "far ends for nothing": ("do not agree", "ids", np.concatenate([every(0), every(0, 2)])),
        "half a far end": ("do not agree", "ids", np.concatenate([every(0), every(0, 1)])),
        "ids short": ("do not agree", "ids", every(0, 719)),
        "a far end beyond everything": (
            "outside the vocabulary", "ids", np.concatenate([every(255, 1), every(0, 719), every(255, 2)]),
        ),
        "no value at the top": ("top level", "values", every(0)),
        "values above the top": ("top level", "values", every(64)),
        "values short": ("more or fewer values", "values", every(1, 719)),
        "values long": ("'values' has", "values", every(1, 721)),
        "scalars short": ("'scalars' has", "scalars", every(1, 60)),
        "low scalars long": ("'scalars_low' has", "scalars_low", every(1, 60 * 5)),
    }  # fmt: skip


@pytest.mark.parametrize("lie", lies())
def test_lies_are_refused(lie: str) -> None:
    message, name, stream = lies()[lie]
    how = codec()
    with pytest.raises(CorruptCacheError, match=message):
        how.decode({**how.encode(make_targets("topk", logits())), name: stream}, 60)


@pytest.mark.parametrize(
    ("kind", "plane", "value", "message"),
    (
        ("topp", 0, 0, "no entries"),
        ("topp", 0, 13, "no entries"),
        ("ipps", 0, 0, "no entries"),
        ("ipps", 1, 13, "no entries"),
        ("sample+label", 1, 2, "no entries"),
        ("sample", 0, 1, "values than entries"),
        ("ipps", 1, 0, "values than entries"),
        ("topk", 0, 64, "top level"),
    ),
)
def test_counts_that_cannot_be(kind: str, plane: int, value: int, message: str) -> None:
    how = codec(kind)
    streams = how.encode(make_targets(kind, logits()))
    scalars = streams["scalars"].copy().reshape(-1, 60)
    scalars[plane] = value
    with pytest.raises(CorruptCacheError, match=message):
        how.decode({**streams, "scalars": scalars.reshape(-1)}, 60)


@pytest.mark.parametrize(
    ("kind", "word"), (("topk", 2), ("topk", 3), ("full", 0), ("ipps", 1), ("ipps", 2), ("sample", 0))
)
def test_an_entropy_is_a_number(kind: str, word: int) -> None:
    how = codec(kind)
    streams = {name: stream.copy() for name, stream in how.encode(make_targets(kind, logits())).items()}
    lows = streams["scalars_low"].reshape(-1, 60)
    lows[word, 7] = 255
    streams["scalars"].reshape(-1, 60)[word - len(lows), 7] = 255
    with pytest.raises(CorruptCacheError, match="entropy"):
        how.decode(streams, 60)


def test_draws_that_do_not_add_up() -> None:
    how = codec("sample")
    streams = how.encode(make_targets("sample", logits()))
    for values in (streams["values"] + 1, streams["values"] * 0, np.full_like(streams["values"], DRAWS)):
        with pytest.raises(CorruptCacheError, match="draws"):
            how.decode({**streams, "values": values.astype(np.uint8)}, 60)


# The machine.


def test_threads_decode_side_by_side() -> None:
    how, whole = codec(), make_targets("topk", logits(n=200))
    streams = how.encode(whole)
    expected = how.decode(streams, 200)
    with ThreadPoolExecutor(4) as pool:
        for again in pool.map(lambda _: how.decode(streams, 200), range(32)):
            assert torch.equal(again.logprobs, expected.logprobs) and torch.equal(again.ids, expected.ids)


def test_where_no_folder_can_be_written_loops_are_compiled_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    real = numba.njit

    def njit(function: Any, **options: Any) -> Any:
        if options.get("cache"):
            raise RuntimeError("cannot cache function: no locator available")
        return real(function, **options)

    monkeypatch.setattr(numba, "njit", njit)
    assert compiled_module.compiled(lambda x: x + 1)(2) == 3
