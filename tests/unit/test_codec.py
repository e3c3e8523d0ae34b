"""Every codec, for every kind of selection: gives back what it was given, and believes nothing that it reads."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kdcache.codec import Codec, deflate, inflate, make_codec
from kdcache.errors import ConfigError, CorruptCacheError, TargetError
from kdcache.known import Known
from kdcache.targets import SparseTargets
from tests.unit.made_targets import DRAWS, KINDS, layout_of, logits, make_targets

PRECISIONS = ("float32", "float16", "4", "6", "8", "12", "16")
SHAPES = ("random", "flat", "peaked", "wide")
Streams = dict[str, NDArray[Any]]


def codec(kind: str, precision: str, **changes: Any) -> Codec:
    return make_codec(layout_of(kind, **changes), precision=precision)


def frozen(how: Codec, streams: Streams, positions: int) -> Streams:
    """Streams as a store gives them back: compressed and read again, within the sizes that the codec promised."""
    out = {}
    for name, (dtype, shape) in how.streams(positions).items():
        assert streams[name].ndim == 1 and streams[name].dtype == dtype
        assert streams[name].size <= np.prod(shape)
        out[name] = inflate(deflate(streams[name]), int(np.prod(shape)) * dtype.itemsize, dtype)
    assert set(streams) == set(out)
    return out


def there_and_back(how: Codec, whole: SparseTargets) -> SparseTargets:
    positions = len(whole.count)
    return how.decode(frozen(how, how.encode(whole), positions), positions)


def by_id(targets: SparseTargets) -> SparseTargets:
    """The same targets with entries in order of id, padding last."""
    key = torch.where(targets.valid, targets.ids.long(), 1 << 40)
    order = key.argsort(-1)
    moved = {name: getattr(targets, name).gather(-1, order) for name in ("ids", "logprobs", "weights")}
    return dataclasses.replace(targets, **moved)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_loses_nothing(kind: str, shape: str) -> None:
    whole = make_targets(kind, logits(shape))
    again = there_and_back(codec(kind, "float32"), whole)
    if kind == "full":
        whole = by_id(whole)
    assert again.kind == whole.kind and again.temperatures == whole.temperatures
    for field in dataclasses.fields(whole):
        if isinstance(getattr(whole, field.name), torch.Tensor):
            torch.testing.assert_close(
                getattr(again, field.name),
                getattr(whole, field.name),
                rtol=0,
                atol=0,
                equal_nan=True,
                check_dtype=False,
            )


def test_float32_derives_the_weights_that_are_exp_of_the_logarithms() -> None:
    whole = make_targets("topk", logits())
    whole = dataclasses.replace(whole, weights=whole.logprobs.exp())
    streams = codec("topk", "float32").encode(whole)
    assert not streams["weights"].size
    assert torch.equal(there_and_back(codec("topk", "float32"), whole).weights, whole.weights)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_decoded_has_the_shape_that_losses_expect(kind: str, precision: str) -> None:
    whole, how = make_targets(kind, logits()), codec(kind, precision)
    again = there_and_back(how, whole)
    assert (again.ids.dtype, again.count.dtype) == (torch.int32, torch.int32)
    assert (again.logprobs.dtype, again.weights.dtype) == (torch.float32, torch.float32)
    assert again.ids.is_contiguous() and again.logprobs.is_contiguous() and again.weights.is_contiguous()
    assert torch.equal(again.count, whole.count.int())
    assert torch.equal(by_id(again).ids, by_id(whole).ids.int())
    past = ~again.valid
    assert (again.ids[past] == 0).all() and (again.weights[past] == 0).all()
    assert torch.isneginf(again.logprobs[past]).all()
    assert torch.equal(by_id(again).logprobs.isnan(), by_id(whole).logprobs.isnan())
    assert (again.weights[again.valid] > 0).all() or kind.endswith("+label") or kind == "full"
    if whole.sampled:
        assert again.log_tail is None
        total = whole.weights.sum(-1) if kind == "sample+power" else torch.ones(len(whole.count))
        torch.testing.assert_close(again.weights.sum(-1), total, rtol=2e-6, atol=2e-6)
    assert all(isinstance(value, float) for value in how.error_bound.values())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_of_draws_are_as_exact_as_those_of_ipps(precision: str, shape: str) -> None:
    whole = make_targets("sample+power", logits(shape))
    total = whole.weights.double().sum(-1, keepdim=True)
    shares = whole.weights.double() / total
    as_ipps = dataclasses.replace(whole, kind="ipps", weights=shares.float(), logprobs=shares.log().float())
    expected = there_and_back(codec("ipps", precision, k=DRAWS), as_ipps).weights.double() * total
    again = there_and_back(codec("sample+power", precision), whole)
    torch.testing.assert_close(again.weights.double(), expected, rtol=1e-4, atol=1e-30)  # a level beside, at 16 bits
    assert (expected - whole.weights).abs().max() < 0.1 * total.max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_without_targets(kind: str, precision: str) -> None:
    assert there_and_back(codec(kind, precision), make_targets(kind, logits(n=1))[:0]).ids.shape[0] == 0


@pytest.mark.parametrize("precision", ("float32", "float16", "6"))
def test_names_and_order_of_streams_depend_on_the_codec_alone(precision: str) -> None:
    for kind in KINDS:
        how = codec(kind, precision)
        assert list(how.streams(1)) == list(how.streams(100))
        for dtype, shape in how.streams(3).values():
            assert dtype.newbyteorder("<") == dtype and all(size >= 0 for size in shape)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("temperature", (0.5, 2.0))
@pytest.mark.parametrize("kind", ("ipps+label", "sample+label"))
def test_sampling_at_another_temperature(kind: str, precision: str, temperature: float) -> None:
    whole = make_targets(kind, logits(), temperatures=(1.0, temperature), sample_temperature=temperature)
    how = codec(kind, precision, temperatures=(1.0, temperature), sample_temperature=temperature)
    again = there_and_back(how, whole)
    assert again.sample_temperature == temperature
    heavy = again.valid & ~again.logprobs.isnan()
    own = again.logprobs.double() / temperature - again.log_partition[:, 1, None].double()
    torch.testing.assert_close(own.exp()[heavy], again.weights.double()[heavy], rtol=2e-5, atol=1e-30)
    torch.testing.assert_close(
        again.log_partition, whole.log_partition, rtol=0, atol=0 if precision.startswith("f") else 1 / 256 + 1e-6
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_draws_are_exact_at_every_precision(shape: str, precision: str) -> None:
    whole = make_targets("sample", logits(shape))
    again = there_and_back(codec("sample", precision), whole)
    torch.testing.assert_close(by_id(again).weights, by_id(whole).weights, rtol=0, atol=0)


@pytest.mark.parametrize("draws", (255, 256, 65535))
def test_one_id_may_have_all_the_draws(draws: int) -> None:
    whole = make_targets("sample", logits(n=2))
    ids, logprobs = torch.zeros(2, 4, dtype=torch.int64), torch.full((2, 4), -torch.inf)
    logprobs[:, 0] = torch.nan
    weights = torch.tensor([[1.0, 0, 0, 0]] * 2)
    whole = dataclasses.replace(
        whole, ids=ids, logprobs=logprobs, weights=weights, count=torch.ones(2, dtype=torch.int64)
    )
    for precision in ("float32", "float16", "6"):
        how = codec("sample", precision, width=4, draws=draws)
        assert torch.equal(there_and_back(how, whole).weights, weights)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ("topk", "topp", "full"))
def test_float16_keeps_its_bound(kind: str, shape: str) -> None:
    whole = make_targets(kind, logits(shape))
    again, whole = by_id(there_and_back(codec(kind, "float16"), whole)), by_id(whole)
    stated = whole.valid & (whole.logprobs > -38.8)
    assert (again.logprobs - whole.logprobs).abs()[stated].max() <= 2e-3
    assert torch.isfinite(again.logprobs[again.valid]).all()
    torch.testing.assert_close(again.log_tail, whole.log_tail, rtol=0, atol=0)
    kept = -torch.expm1(whole.log_tail[:, 0].double())
    error = (again.weights.double().sum(-1) - kept).abs()
    assert (error <= torch.where(kept >= 0.5, 2e-6, 1e-3 * kept + 1e-6)).all()


def test_float16_keeps_its_bound_on_everything_that_float32_can_hold() -> None:
    logp = torch.linspace(0.0, -38.0, 400)[:, None].expand(-1, 2).clone()
    logp[:, 1] = -38.0
    one = make_targets("topk", logits(n=1), k=2)
    how = codec("topk", "float16", k=2)
    for row in logp:
        tail = torch.log1p(-row.double().exp().sum().clamp(max=1 - 1e-12)).float().expand(1, 2)
        whole = dataclasses.replace(one, logprobs=row[None], weights=row[None].exp(), log_tail=tail)
        assert (there_and_back(how, whole).logprobs[0] - row).abs().max() <= 2e-3


@pytest.mark.parametrize("k", (1, 4))
def test_float16_keeps_its_bound_where_almost_nothing_is_kept(k: int) -> None:
    whole = make_targets("topk", logits("flat", n=8, vocab=150_000) * 20, k=k)
    again = there_and_back(codec("topk", "float16", k=k, vocab=150_000), whole)
    assert (again.logprobs - whole.logprobs).abs().max() <= 2e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ("ipps", "ipps+label"))
def test_float16_of_sampled_weights(kind: str, shape: str) -> None:
    whole = make_targets(kind, logits(shape))
    again, whole = by_id(there_and_back(codec(kind, "float16"), whole)), by_id(whole)
    close = whole.weights > 1e-12
    assert ((again.weights / whole.weights).log().abs()[close] <= 2e-3).all()


# What is not a target of this layout is refused when it is packed.


@pytest.mark.parametrize("precision", ("float32", "float16", "6"))
def test_other_targets_are_not_packed(precision: str) -> None:
    whole = make_targets("topk", logits())
    nan = whole.logprobs.clone()
    nan[3, 4] = torch.nan
    outside = whole.ids.clone()
    outside[5, 6] = 500
    for broken, how in (
        (whole, codec("topk", precision, k=13)),
        (whole, codec("topk", precision, temperatures=(1.0,))),
        (dataclasses.replace(whole, logprobs=nan), codec("topk", precision)),
        (dataclasses.replace(whole, ids=outside), codec("topk", precision)),
        (dataclasses.replace(whole, ids=-outside), codec("topk", precision)),
        (dataclasses.replace(whole, count=whole.count - 1), codec("topk", precision)),
        (dataclasses.replace(whole, count=whole.count * 0), codec("topp", precision)),
        (dataclasses.replace(whole, count=whole.count + 1), codec("topp", precision)),
        (
            dataclasses.replace(make_targets("full", logits(vocab=12)), ids=whole.ids),
            codec("full", precision, vocab=12),
        ),
    ):
        with pytest.raises(TargetError):
            how.encode(broken)


@pytest.mark.parametrize("precision", ("float16", "6"))
def test_weights_that_are_no_draws_are_not_packed(precision: str) -> None:
    whole = make_targets("sample", logits())
    for weights in (whole.weights * 0.5 + 0.01 * whole.valid, whole.weights.flip(0)):
        with pytest.raises(TargetError, match=f"{DRAWS} draws"):
            codec("sample", precision).encode(dataclasses.replace(whole, weights=weights))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    (
        ("topk", {"vocab_size": 0}, "vocabulary"),
        ("topk", {"vocab_size": 1 << 31}, "vocabulary"),
        ("topk", {"width": 0}, "entries"),
        ("topk", {"width": 501}, "entries"),
        ("full", {"width": 12}, "entries"),
        ("topk", {"temperatures": (2.0,)}, "must store temperature 1"),
        ("ipps", {"sample_temperature": 3.0}, "sample_temperature"),
        ("sample", {"draws": 65536}, "draws is 65536"),
        ("topk", {"known": Known()}, "know the partition at each"),
        ("ipps", {"known": Known(partitions=(1.0, 2.0), tails=(1.0,), tail_sum="remainder")}, "the tail at none"),
    ),
)
def test_bad_layouts(kind: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layout_of(kind, **changes)


@pytest.mark.parametrize("precision", ("float8", "3", "17"))
def test_bad_precisions(precision: str) -> None:
    with pytest.raises(ConfigError, match=f"precision is {precision}, but must be"):
        make_codec(layout_of("topk"), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unknown", (("entropy",), ("label_logprob",), ("entropy", "label_logprob")), ids=str)
def test_what_is_unknown_takes_no_bytes(kind: str, precision: str, unknown: tuple[str, ...]) -> None:
    whole, known = make_targets(kind, logits()), layout_of(kind).known
    everything = codec(kind, precision)
    how = codec(kind, precision, known=dataclasses.replace(known, **dict.fromkeys(unknown, False)))
    less = dataclasses.replace(whole, **dict.fromkeys(unknown))
    size = [sum(s.nbytes for s in each.encode(t).values()) for each, t in ((everything, whole), (how, less))]
    assert size[0] - size[1] == 60 * len(unknown) * (2 if precision.isdecimal() else 4)
    again, reference = there_and_back(how, less), there_and_back(everything, whole)
    for name in ("ids", "weights", "log_partition", "log_tail", "entropy", "label_logprob"):
        expected = None if name in unknown else getattr(reference, name)
        found = getattr(again, name)
        assert (found is None) == (expected is None) and (found is None or torch.equal(found, expected))
    assert not set(unknown) & set(how.error_bound)
    for wrong in (whole, dataclasses.replace(less, label_logprob=torch.full((60,), torch.nan))):
        with pytest.raises(TargetError, match=r"entropy|label_logprob"):
            how.encode(wrong)


# Reading trusts nothing.


def sound(targets: SparseTargets, vocab: int, most: float = 1.01) -> None:
    """What a decoder may give back, whatever it read: something that cannot make a loss read out of bounds."""
    assert ((targets.ids >= 0) & (targets.ids < vocab)).all()
    assert ((targets.count >= 1) & (targets.count <= targets.ids.shape[-1])).all()
    assert ((targets.weights >= 0) & (targets.weights <= most)).all()


HONEST: dict[tuple[str, str], tuple[Codec, Streams]] = {}
N = 7


def honest(kind: str, precision: str) -> tuple[Codec, Streams]:
    if (kind, precision) not in HONEST:
        how = codec(kind, precision, vocab=300, k=6)
        HONEST[kind, precision] = how, how.encode(make_targets(kind, logits(n=N, vocab=300), k=6))
    return HONEST[kind, precision]


LIES = st.tuples(st.integers(0, 1 << 30), st.integers(0, 255))


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.sampled_from(KINDS),
    st.sampled_from(("float32", "float16", "4", "6", "12")),
    st.integers(0, 9),
    st.lists(LIES, min_size=1, max_size=6),
    st.integers(-9, 9),
)
def test_hostile_streams(kind: str, precision: str, which: int, lies: list[tuple[int, int]], longer: int) -> None:
    how, streams = honest(kind, precision)
    name = list(streams)[which % len(streams)]
    dtype = streams[name].dtype
    octets = streams[name].copy().view(np.uint8)
    for place, value in lies:
        if len(octets):
            octets[place % len(octets)] = value
    lied = octets.view(dtype)
    if longer < 0:
        lied = lied[:longer]
    elif longer > 5:
        lied = np.concatenate([lied, lied[: longer - 5], np.full(longer - 5, lies[0][1]).astype(dtype)])
    try:
        again = how.decode({**streams, name: lied}, N)
    except CorruptCacheError:
        return
    sound(again, 300, 1 << 41 if kind == "sample+power" else 1.01)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(KINDS), st.sampled_from(("float32", "float16", "6", "12")), st.data())
def test_noise(kind: str, precision: str, data: st.DataObject) -> None:
    how, streams = honest(kind, precision)
    noise = {}
    for name, (dtype, shape) in how.streams(N).items():
        size = data.draw(st.sampled_from((len(streams[name]), int(np.prod(shape)), 0, 1)))
        seed = data.draw(st.integers(0, 1 << 20))
        noise[name] = np.random.default_rng(seed).integers(0, 256, size * dtype.itemsize, np.uint8).view(dtype)
    try:
        again = how.decode(noise, N)
    except CorruptCacheError:
        return
    sound(again, 300, 1 << 41 if kind == "sample+power" else 1.01)


@pytest.mark.parametrize("precision", ("float32", "float16", "6"))
@pytest.mark.parametrize("kind", KINDS)
def test_streams_of_another_form_are_refused(kind: str, precision: str) -> None:
    how, streams = honest(kind, precision)
    for name, stream in streams.items():
        other = np.dtype("<u8") if stream.dtype.itemsize != 8 else np.dtype("<u4")
        for wrong in (
            np.zeros(len(stream), other),
            stream.reshape(1, -1),
            stream.byteswap().view(stream.dtype.newbyteorder()),
        ):
            if wrong.dtype == stream.dtype and wrong.ndim == 1:  # bytes have no order
                continue
            with pytest.raises(CorruptCacheError, match=name):
                how.decode({**streams, name: wrong}, N)
        with pytest.raises(CorruptCacheError, match=name):
            how.decode({other: streams[other] for other in streams if other != name}, N)
    for positions in (N - 1, N + 1):
        with pytest.raises(CorruptCacheError):
            how.decode(streams, positions)


@pytest.mark.parametrize("precision", ("float32", "float16", "6"))
def test_a_stream_that_is_not_aligned_is_read_all_the_same(precision: str) -> None:
    how, streams = honest("ipps", precision)
    shifted = {}
    for name, stream in streams.items():
        raw = np.frombuffer(b"\0" + stream.tobytes(), np.uint8)[1:]
        shifted[name] = raw.view(stream.dtype)
    assert torch.equal(how.decode(shifted, N).ids, how.decode(streams, N).ids)


# Compression.


def test_a_frame_is_believed_only_within_its_bound() -> None:
    data = np.random.default_rng(0).integers(0, 9, 5000, np.uint16)
    frame = deflate(data)
    assert (inflate(frame, 10_000, np.uint16) == data).all()
    assert (inflate(memoryview(frame), 20_000) == data.view(np.uint8)).all()
    assert not inflate(deflate(data), 10_000).flags.writeable
    for bad, most, dtype in (
        (frame, 9_999, np.uint8),
        (deflate(np.zeros(5001, np.uint8)), 10_000, np.uint16),
        (deflate(np.zeros(1 << 26, np.uint8)), 10_000, np.uint8),
        (frame[:-3], 10_000, np.uint8),
        (frame[:9], 10_000, np.uint8),
        (frame[:3], 10_000, np.uint8),
        (frame + b"x", 10_000, np.uint8),
        (frame + frame, 20_000, np.uint8),
        (b"\x50\x2a\x4d\x18" + bytes(20), 10_000, np.uint8),
        (bytes(50), 10_000, np.uint8),
        (frame[:12] + bytes(len(frame) - 12), 10_000, np.uint8),
    ):
        with pytest.raises(CorruptCacheError):
            inflate(bad, most, dtype)


def test_nothing_is_a_frame_of_nothing() -> None:
    assert deflate(np.zeros(0)) == b""
    assert inflate(b"", 0, np.float32).dtype == np.float32 and not len(inflate(b"", 10))


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 300))
def test_noise_is_no_frame(data: bytes, most: int) -> None:
    for frame in (data, b"\x28\xb5\x2f\xfd" + data):
        with contextlib.suppress(CorruptCacheError):
            assert len(inflate(frame, most)) <= most
