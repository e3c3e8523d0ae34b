"""Stored numbers of positions can be taken from one row into another: nothing is rounded a second time."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from kdcache import open_cache
from kdcache.codec import make_codec
from kdcache.targets import SparseTargets
from tests.golden.make import FOLDER, names

ARROW = [name for name in names() if name.endswith("arrow")]
QUICK = ("topk-6-arrow", "ipps-6-arrow", "sample-label-6-arrow", "ipps-float16-arrow", "topk-float32-arrow")
SOME_SLOW = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in ARROW]


def same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(one) == list(other)
    for name, stream in one.items():
        assert stream.dtype == other[name].dtype and np.array_equal(stream, other[name]), name


def entries(target: SparseTargets) -> list[Any]:
    """Ids, log-probabilities and weights of a position, by id."""
    count = int(target.count)
    order = np.argsort(target.ids[:count].numpy())
    return [values[:count].numpy()[order] for values in (target.ids, target.logprobs, target.weights)]


@pytest.mark.parametrize("name", ARROW)
def test_streams_come_back_as_they_were(name: str) -> None:
    cache = open_cache(FOLDER / name)
    codec = cache.manifest.codec
    for index in range(len(cache)):
        record = cache.shard(cache.locate(index)[0]).record(cache.locate(index)[1])
        streams = {stream: record.streams[stream] for stream in codec.streams(record.positions)}
        same(codec.from_columns(codec.columns(streams, record.positions)), streams)


@pytest.mark.parametrize("name", SOME_SLOW)
def test_positions_of_several_rows_are_joined_and_ids_ordered_anew(name: str) -> None:
    cache = open_cache(FOLDER / name)
    codec, parts, columns = cache.manifest.codec, [], []
    for index in range(len(cache)):
        record = cache.shard(cache.locate(index)[0]).record(cache.locate(index)[1])
        chosen = np.arange(record.positions) % 3 != 1
        parts.append(codec.decode(record.streams, record.positions)[chosen])
        found = codec.columns(record.streams, record.positions)
        columns.append({column: values[chosen] for column, values in found.items()})
    order = tuple(np.random.default_rng(0).permutation(cache.manifest.vocab_size).tolist())
    other = make_codec(codec.layout, cache.manifest.precision, order if codec.orders_ids else ())
    joined = {column: np.concatenate([part[column] for part in columns]) for column in columns[0]}
    positions = len(joined["counts"])
    streams = other.from_columns(joined)
    found, expected = other.decode(streams, positions), type(parts[0]).cat(parts)
    for field in dataclasses.fields(expected):
        mine, theirs = getattr(found, field.name), getattr(expected, field.name)
        if field.name not in ("ids", "logprobs", "weights"):  # their order is that of the stored ids
            np.testing.assert_array_equal(mine, theirs, err_msg=field.name)
    for position in range(positions):
        for mine, theirs in zip(entries(found[position]), entries(expected[position]), strict=True):
            np.testing.assert_array_equal(mine, theirs)
    assert positions
    same(other.from_columns(other.columns(streams, positions)), streams)
