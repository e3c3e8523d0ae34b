"""Extras: what each precision keeps, compared with a float64 oracle, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kdcache.errors import ConfigError, CorruptCacheError, TargetError
from kdcache.extras import PRECISIONS, ExtraSpec, read_specs, stream_names

RANDOM = np.random.default_rng(0)
VALUES = (RANDOM.standard_normal((7, 12)) * 10.0 ** RANDOM.integers(-3, 4, (7, 1))).astype(np.float32)


WIDE = np.random.default_rng(1).standard_normal((40, 160)).astype(np.float32)
WIDE[:, [3, 77]] *= 3e3  # as hidden states are: a few channels are much larger than the others
WIDE[0], WIDE[1, 50:60], WIDE[2] = 0, 9e4, np.arange(160) % 3 - 1  # no number, more than eight that are equal, many


def oracle(values: np.ndarray, precision: str) -> np.ndarray:
    """The nearest number that each precision can store, in float64."""
    exact = values.astype(np.float64)
    if precision == "int8":
        scale = (np.abs(exact).max(-1, keepdims=True) / 127).astype(np.float32).astype(np.float64)
        return np.rint(exact / scale) * scale
    if precision == "bfloat16":
        exponent = np.floor(np.log2(np.abs(exact)))
        return np.rint(exact / 2.0 ** (exponent - 7)) * 2.0 ** (exponent - 7)
    return exact.astype(precision).astype(np.float64)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_values_are_the_nearest_that_a_precision_can_store(precision: str) -> None:
    spec = ExtraSpec(width=12, precision=precision)
    streams = spec.encode(VALUES)
    assert {n: (s.dtype, s.size) for n, s in streams.items()} == {
        n: (dtype, int(np.prod(shape))) for n, (dtype, shape) in spec.shapes(7).items()
    }
    found = spec.decode(streams, 7)
    assert found.dtype == np.float32 and found.shape == (7, 12)
    np.testing.assert_allclose(found, oracle(VALUES, precision), rtol=2e-7)
    if precision == "int8":
        assert (np.abs(found - VALUES) <= 0.5001 * np.abs(VALUES).max(-1, keepdims=True) / 127).all()
    again = spec.encode(found)
    assert all(np.array_equal(again[name], streams[name]) for name in streams)


def test_int8_keeps_the_largest_numbers_of_a_vector_apart() -> None:
    spec = ExtraSpec(width=160, precision="int8")
    streams = spec.encode(WIDE)
    found, exact = spec.decode(streams, 40), WIDE.astype(np.float64)
    assert spec.apart == 8
    order = np.argsort(-np.abs(exact), axis=-1, kind="stable")[:, :8]
    assert np.array_equal(streams["channel"].reshape(40, 8), np.sort(order, -1))
    rest = exact.copy()
    np.put_along_axis(rest, order, 0.0, -1)
    wanted = oracle(np.where(rest.any(-1, keepdims=True), rest, 1), "int8") * rest.any(-1, keepdims=True)
    np.put_along_axis(wanted, order, np.take_along_axis(exact, order, -1), -1)
    np.testing.assert_allclose(found, wanted, rtol=2e-7, atol=1e-30)
    assert np.abs(np.delete(found - exact, [3, 77], -1))[3:].max() < 0.02  # with one scale: 12


@pytest.mark.parametrize("width", [1, 15, 16, 40, 128, 1000])
def test_the_error_of_a_vector_stays_within_its_bound(width: int) -> None:
    random = np.random.default_rng(width)
    flat = np.sign(random.standard_normal((300, width)))
    rounded_most = flat * np.where(np.arange(width) % 2, 1, (random.integers(0, 127, (300, 1)) + 0.5) / 127)
    for values in (random.standard_normal((300, width)) ** 3, flat, rounded_most):
        for precision in ("bfloat16", "int8"):
            spec, given = ExtraSpec(width=width, precision=precision), values.astype(np.float32)
            off = np.linalg.norm(spec.decode(spec.encode(given), 300) - given.astype(np.float64), axis=-1)
            assert spec.error_bound is not None
            assert (off <= spec.error_bound * np.linalg.norm(given.astype(np.float64), axis=-1)).all()
    assert ExtraSpec(width=width).error_bound == 0 and ExtraSpec(width=width, precision="float16").error_bound is None


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_tensors_of_any_float_type_are_taken(precision: str, dtype: torch.dtype) -> None:
    spec, values = ExtraSpec(width=12, precision=precision), torch.from_numpy(VALUES).to(dtype)
    found, wanted = spec.encode(values), spec.encode(values.float().numpy())
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zeros_the_smallest_and_no_vectors_come_back(precision: str) -> None:
    spec = ExtraSpec(width=3, precision=precision)
    for values in (np.zeros((2, 3)), np.zeros((0, 3)), np.full((1, 3), 1e-45), np.array([[0, 0, -2.0]])):
        found = spec.decode(spec.encode(values), len(values))
        assert np.abs(found - values).max(initial=0) < 1e-44 and found.shape == values.shape


def test_the_largest_numbers_are_kept_or_refused() -> None:
    largest = np.full((1, 2), np.finfo(np.float32).max)
    for precision in ("float32", "int8"):
        spec = ExtraSpec(width=2, precision=precision)
        np.testing.assert_allclose(spec.decode(spec.encode(largest), 1), largest, rtol=1e-6)
    for precision in ("float16", "bfloat16"):
        with pytest.raises(TargetError, match=rf"size 3\.4.*e\+38, which {precision} cannot hold"):
            ExtraSpec(width=2, precision=precision).encode(largest)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_not_finite_is_refused(bad: float, precision: str) -> None:
    values = VALUES.astype(np.float64)
    values[3, 4] = bad
    with pytest.raises(TargetError, match="NaN or an infinite"):
        ExtraSpec(width=12, precision=precision).encode(values)


@pytest.mark.parametrize("shape", [(7,), (7, 11), (84,), (1, 7, 12)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(TargetError, match=r"not \[vectors, 12\]"):
        ExtraSpec(width=12).encode(np.zeros(shape))


@pytest.mark.parametrize(
    ("precision", "stream", "change"),
    [
        ("float32", "values", lambda s: s[:-1]),
        ("float32", "values", lambda s: s.astype("<f8")),
        ("float32", "values", lambda s: np.where(np.arange(s.size) == 5, np.float32(np.nan), s)),
        ("float16", "values", lambda s: np.where(np.arange(s.size) == 5, np.float16(np.inf), s)),
        ("bfloat16", "values", lambda s: np.where(np.arange(s.size) == 5, np.uint16(0x7F80), s)),
        ("bfloat16", "values", lambda s: np.where(np.arange(s.size) == 5, np.uint16(0xFFFF), s)),
        ("int8", "values", lambda s: np.where(np.arange(s.size) == 5, np.int8(-128), s)),
        ("int8", "values", lambda s: s[:0]),
        ("int8", "scale", lambda s: s[:-1]),
        ("int8", "scale", lambda s: np.append(s, s[:1])),
        ("int8", "scale", lambda s: -s),
        ("int8", "scale", lambda s: np.where(np.arange(7) == 2, np.float32(np.nan), s)),
        ("int8", "scale", lambda s: np.where(np.arange(7) == 2, np.float32(np.inf), s)),
        ("int8", "scale", lambda s: np.where(np.arange(7) == 2, np.float32(1e37), s)),
    ],
)
def test_streams_that_nobody_encoded_are_refused(precision: str, stream: str, change: object) -> None:
    spec = ExtraSpec(width=12, precision=precision)
    streams = spec.encode(VALUES)
    with pytest.raises(CorruptCacheError):
        spec.decode({**streams, stream: change(streams[stream])}, 7)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("stream", "change"),
    [
        ("channel", lambda s: s[:-1]),
        ("channel", lambda s: s.astype("<u4")),
        ("channel", lambda s: np.where(np.arange(s.size) == 15, np.uint16(160), s)),
        ("channel", lambda s: np.where(np.arange(s.size) == 1, s[0], s)),
        ("channel", lambda s: s[::-1]),
        ("apart", lambda s: s[:0]),
        ("apart", lambda s: np.where(np.arange(s.size) == 5, np.float32(np.inf), s)),
    ],
)
def test_numbers_apart_that_nobody_encoded_are_refused(stream: str, change: object) -> None:
    spec = ExtraSpec(width=160, precision="int8")
    streams = spec.encode(WIDE)
    with pytest.raises(CorruptCacheError):
        spec.decode({**streams, stream: change(streams[stream])}, 40)  # type: ignore[operator]


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 0}, {"width": -1}, {"width": 1.0}, {"width": True}, {"width": 1 << 31}, {"width": 1, "dtype": "int8"},
        {"width": 1, "precision": "6"}, {"width": 1, "precision": ["int8"]}, {"width": 1, "per": "row"},
    ],
)  # fmt: skip
def test_a_spec_that_says_nothing_sound_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        ExtraSpec(**fields)  # type: ignore[arg-type]


def test_specs_of_a_manifest() -> None:
    spec = ExtraSpec(width=4, precision="int8", per="position")
    names = ["hidden:-1", "a", "0.5_b", "hidden-1", "hidden:1"]
    found = read_specs({name: spec.to_fields() for name in names})
    assert found == dict.fromkeys(sorted(names), spec) and list(found) == sorted(names)
    streams = [stream for name in names for stream in stream_names(name, spec).values()]
    assert len(set(streams)) == 2 * len(names)
    assert stream_names("hidden:-1", spec) == {"values": "extra.hidden~-1", "scale": "scale.hidden~-1"}
    for name in ("", "Hidden", "a/b", "a~b", "..\\", "ä", "a" * 81, "a\n"):
        with pytest.raises(ConfigError, match="cannot name an extra"):
            read_specs({name: spec.to_fields()})
    for fields in ({"width": 4}, {**spec.to_fields(), "more": 1}, [4], "int8"):
        with pytest.raises(ConfigError, match="fields of an extra"):
            read_specs({"a": fields})
    with pytest.raises(ConfigError, match="error_bound of 0"):
        read_specs({"a": {**spec.to_fields(), "error_bound": 0}})
    with pytest.raises(ConfigError, match="65 extras"):
        read_specs({str(i): spec.to_fields() for i in range(65)})
