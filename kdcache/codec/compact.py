"""The compact codec: entries sorted by a re-ranked id, values in a few bits, log-odds where a mass may be tiny.

Streams of a row of n positions, E entries in all, K at most in each; all are bytes:

    ids          E distances of ranks and their far ends (id_deltas.py); absent where each position has every id
    values       truncated: E levels (quantizer.py), each less the least of its position; sampled: the heavies' levels,
                 or how often each light was drawn, where that decides; two planes, high bytes first, where one is too
                 little
    scalars      counts, and the high bytes of measures (scalars.py)
    scalars_low  the low bytes of measures

The scalars of a position, in this order:

    count        entries, where they differ
    heavies      sampled: where any entry may be heavy
    floor        truncated: the least level
    odds         log-odds of the tail at each T that is stored; sampled with heavies: of the lights
    renyi        sampled: the Rényi entropy of order 1/T for each T but 1, from which the partition follows
    entropy, label_logprob (negated), each where it is known

What is kept is scaled to what the tail or the lights leave, so a peaked position keeps its tail and a flat one its few
entries; a truncated kind's partitions follow from both. `streams` and `scalars_low` depend on the layout alone.

Cost: docs/decisions/0009.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.id_deltas import IdTable, Runs, unpack_ids
from kdcache.codec.id_ranks import IdOrder
from kdcache.codec.layout import Layout
from kdcache.codec.lights import light_odds, multiplicities, unpack_lights
from kdcache.codec.quantizer import BITS, Levels, LevelTable, merge, pack_levels, split, unpack_levels
from kdcache.codec.scalars import (
    ERROR_BOUND,
    MEASURES,
    ScalarLayout,
    nats_to_words,
    odds_to_words,
    read_count,
    read_measures,
    read_word,
    renyi_entropy,
)
from kdcache.codec.streams import (
    COUNT,
    MEASURE,
    PROBLEMS,
    VALUES,
    Bytes,
    Columns,
    Doubles,
    Floats,
    Ids,
    Ints,
    Keys,
    Shapes,
    Streams,
    Values,
    id_dtype,
    whole,
)
from kdcache.compiled import compiled
from kdcache.errors import ConfigError, CorruptCacheError, TargetError
from kdcache.targets import SparseTargets

_BYTE = np.dtype("u1")
_NOTHING = np.zeros(0, np.uint8)
_NOTHING.flags.writeable = False
Packed = tuple[Keys, Ints, NDArray[np.float64], list[NDArray[np.float64]]]
"""Sorted keys, `[n]` heavies, `[*, n]` log-odds, and nats in front of those that every kind has."""

_SMALL_TAIL = -1e-3  # log of a tail above which one minus it is known worse than the entries' own sum


@dataclass(frozen=True, kw_only=True)
class CompactCodec:
    """How the targets of one cache are packed; everything comes from its manifest.

    Attributes:
        layout: of the targets.
        bits: of a value, 4 to 16.
        id_order: ids by falling frequency; those that are absent follow in order of id.

    Raises:
        ConfigError: bits out of range.
        CorruptCacheError: an order that repeats an id or names one outside the vocabulary.
    """

    layout: Layout
    bits: int
    id_order: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"precision is {self.bits}, outside {BITS.start} to {BITS.stop - 1} bits")
        _ = self._runs  # refuses a bad order

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """Of a stored token id."""
        return id_dtype(self.layout.vocab_size)

    @property
    def orders_ids(self) -> bool:
        """Whether an order of ids by frequency makes the streams smaller."""
        return self.layout.named_ids

    @property
    def error_bound(self) -> dict[str, float]:
        """The most by which each stored number is off, in the units that quantizer.py and scalars.py define."""
        nats = ERROR_BOUND["nats"]
        bound = {name: nats for name in ("entropy", "label_logprob") if getattr(self.layout.known, name)}
        if self._odds or (self.layout.sampled and self.layout.heavies):
            bound["log_odds"] = ERROR_BOUND["log_odds"]
        if self.layout.sampled and self.layout.others:
            bound["renyi_entropy"] = nats
        return bound | ({"multiplicity": 0.0} if self.layout.draws is not None else self._levels.error_bound)

    @cached_property
    def _runs(self) -> Runs:
        # `full` sorts by id: no order is needed to find its entries.
        order = IdOrder(self.id_order, self.layout.vocab_size)
        drawn = self.layout.draws is not None
        return Runs(
            order=order if self.layout.named_ids else IdOrder((), self.layout.vocab_size),
            vocab_size=self.layout.vocab_size,
            width=self.layout.width,
            payload_bits=8 * self._value_planes if drawn else self.bits,
        )

    @cached_property
    def _levels(self) -> Levels:
        own = self.layout.own_temperature
        if self.layout.sampled:
            return Levels(bits=self.bits, width=self.layout.width, temperatures=(own,), hottest=own)
        temperatures = self.layout.temperatures
        others = tuple(temperatures[column] for column in self.layout.others)
        return Levels(bits=self.bits, width=self.layout.width, temperatures=(1.0, *others), hottest=max(temperatures))

    @property
    def _value_planes(self) -> int:
        return self.layout.multiplicity_dtype.itemsize if self.layout.draws is not None else 1 + (self.bits > 8)

    @cached_property
    def _odds(self) -> tuple[str, ...]:
        """Names of the tail's log-odds at each T."""
        return tuple(f"odds{column}" for column in self.layout.tails)

    @cached_property
    def _numbers(self) -> ScalarLayout:
        layout = self.layout
        counts = {"count": layout.width} if layout.ragged else {}
        words = self._odds
        if layout.sampled:
            if layout.heavies:
                counts["heavies"] = self.layout.most_heavies
                words = ("odds",)
            words += tuple(f"renyi{column}" for column in layout.others)
        else:
            counts["floor"] = self._levels.top
        measured = [name for name in ("entropy", "label_logprob") if getattr(layout.known, name)]
        return ScalarLayout(counts, (*words, *measured))

    def streams(self, positions: int) -> Shapes:
        """Type and largest shape of each stream of a row."""
        entries = (positions, self.layout.width)
        ids: Shapes = {"ids": (_BYTE, (1 + self._runs.planes, *entries))} if self.layout.named_ids else {}
        values: Shapes = {"values": (_BYTE, (self._value_planes, *entries))}
        return ids | values | self._numbers.shapes(positions)

    def encode(self, targets: SparseTargets) -> Streams:
        """Pack the targets of one row.

        Raises:
            TargetError: targets that do not fit the layout.
        """
        pack, counts = self._pack_sampled if self.layout.sampled else self._pack_truncated, self.layout.counts(targets)
        keys, heavies, odds, nats = pack(targets, counts)
        if targets.entropy is not None:
            nats.append(targets.entropy.numpy().astype(np.float64))
        if targets.label_logprob is not None:
            nats.append(-targets.label_logprob.numpy().astype(np.float64))
        words = [odds_to_words(odds), *([nats_to_words(np.stack(nats))] if nats else [])]
        return self._streams(keys, counts, heavies, np.concatenate(words))

    def decode(self, streams: Mapping[str, NDArray[Any]], positions: int) -> SparseTargets:
        """Unpack the targets of a row that has `positions` of them.

        Raises:
            CorruptCacheError: a stream whose length or numbers cannot be what was encoded.
        """
        layout, n, width = self.layout, positions, self.layout.width
        high, low = self._numbers.take(streams, n)
        values = merge(whole(streams, "values", _BYTE, 0, n * width * self._value_planes), self._value_planes)
        near = whole(streams, "ids", _BYTE, 0, self._runs.most(n * width)) if layout.named_ids else _NOTHING
        ids = np.empty(n * width, np.int32) if layout.named_ids else np.tile(np.arange(width, dtype=np.int32), n)
        weights, logprobs = np.empty(n * width, np.float32), np.empty(n * width, np.float32)
        log_partition, log_tail = np.empty((2, n, len(layout.temperatures)), np.float32)
        entropy, label = np.empty((2, n), np.float32)
        counts = np.empty(n, np.int32)
        tails = [] if layout.sampled else [log_tail]
        problem = self._unpack(
            near, values, high, low, *self._constants,
            ids, weights, logprobs, counts, log_partition, *tails, entropy, label,
        )  # fmt: skip
        if problem:
            raise CorruptCacheError(PROBLEMS[problem])
        return layout.targets(
            ids=ids.reshape(n, width),
            logprobs=logprobs.reshape(n, width),
            weights=weights.reshape(n, width),
            counts=counts,
            log_partition=log_partition,
            log_tail=None if layout.sampled else log_tail,
            entropy=entropy if layout.known.entropy else None,
            label_logprob=label if layout.known.label_logprob else None,
        )

    def columns(self, streams: Mapping[str, NDArray[Any]], positions: int) -> Columns:
        """What is stored of each position: ids, levels or numbers of draws, counts, and words of measures."""
        n, width = positions, self.layout.width
        numbers, words = self._numbers.unpack(*self._numbers.take(streams, n))
        counts = numbers.get("count", np.full(n, width, np.int64))
        heavies = numbers.get("heavies", np.zeros_like(counts) if self.layout.sampled else counts)
        ids = np.tile(np.arange(width, dtype=np.int32), n)
        if self.layout.named_ids:
            near = whole(streams, "ids", _BYTE, 0, self._runs.most(n * width))
            problem = unpack_ids(near, int(counts.sum()), counts, heavies, self._runs.table, ids)
            if problem:
                raise CorruptCacheError(PROBLEMS[problem])
        starts, stops = self._valued(counts, heavies)
        column, values = np.arange(width), np.zeros((n, width), np.uint16)
        values[(column >= starts[:, None]) & (column < stops[:, None])] = merge(streams["values"], self._value_planes)
        if "floor" in numbers:
            values += numbers["floor"].astype(np.uint16)[:, None]
        return {
            "ids": ids.reshape(n, width), "values": values, "counts": counts, "heavies": heavies, "words": words.T,
        }  # fmt: skip

    def from_columns(self, columns: Columns) -> Streams:
        """The streams of positions."""
        counts, heavies = columns["counts"], columns["heavies"]
        light = np.arange(self.layout.width) >= heavies[:, None]
        keys, _ = self._runs.keys(columns["ids"], counts, light, columns["values"].astype(np.int64))
        return self._streams(keys, counts, heavies, columns["words"].T)

    @property
    def _unpack(self) -> Any:
        return unpack_sampled if self.layout.sampled else unpack_truncated

    @cached_property
    def _constants(self) -> tuple[Any, ...]:
        """What unpacking needs besides a row's streams, in the order in which its kernel names them."""
        named = self._named_constants
        return tuple(named[name] for name in inspect.signature(self._unpack).parameters if name in named)

    @property
    def _named_constants(self) -> dict[str, Any]:
        layout, sizes = self.layout, self._numbers.sizes
        found: dict[str, Any] = {
            **self._runs.table._asdict(),
            **self._levels.table._asdict(),
            **MEASURES._asdict(),
            "has_entropy": layout.known.entropy,
            "has_label": layout.known.label_logprob,
        }
        if layout.sampled:
            return found | {
                "draws": layout.draws or 0,
                "most_heavies": layout.most_heavies,
                "count_size": sizes[0],
                "heavy_size": sizes[1] if layout.heavies else 0,
                "temperatures": np.array(layout.temperatures),
                "columns": np.array(layout.others, np.int64),
                "own_column": layout.temperatures.index(layout.own_temperature),
            }
        return found | {
            "named_ids": layout.named_ids,
            "count_size": sizes[0] if layout.ragged else 0,
            "floor_size": sizes[-1],
            "exponents": 1 / np.array(self._levels.temperatures),
            "columns": np.array([layout.temperatures.index(1.0), *layout.others]),
        }

    def _pack_truncated(self, targets: SparseTargets, counts: Ints) -> Packed:
        keys, heavies = self._sort(targets, counts)
        if (heavies != counts).any():
            raise TargetError("an entry has no log-probability")
        if not self.layout.named_ids and (keys >> self.bits != np.arange(self.layout.width)).any():
            raise TargetError("a target of every id does not name each once")
        odds = _tail_odds(targets) if self._odds else np.empty((0, len(counts)))
        return keys, heavies, odds, []

    def _pack_sampled(self, targets: SparseTargets, counts: Ints) -> Packed:
        layout = self.layout
        valid = np.arange(layout.width) < counts[:, None]
        light = np.isnan(targets.logprobs.numpy()) & valid
        weights = np.where(valid, targets.weights.double().numpy(), 0.0)
        if layout.draws is None:
            keys, heavies = self._sort(targets, counts)
        else:
            keys, heavies = self._runs.keys(
                targets.ids.numpy(), counts, light, multiplicities(layout.draws, weights, light)
            )
        if heavies.max(initial=0) > self.layout.most_heavies:
            raise TargetError("a sampled target has more entries with a probability than its forced label")
        odds = light_odds(weights, light)[None] if layout.heavies else np.empty((0, len(counts)))
        partitions = targets.log_partition.numpy()
        nats = [renyi_entropy(partitions[:, column], layout.temperatures[column]) for column in layout.others]
        return keys, heavies, odds, nats

    def _sort(self, targets: SparseTargets, counts: Ints) -> tuple[Keys, Ints]:
        ids = np.ascontiguousarray(targets.ids.numpy(), np.int64)
        logprobs = np.ascontiguousarray(targets.logprobs.numpy(), np.float32)
        return self._levels.keys(self._runs, ids, logprobs, counts)

    def _valued(self, counts: Ints, heavies: Ints) -> tuple[Ints, Ints]:
        """`[n]` the first entry of each position that has a value, and where those end."""
        return (np.zeros_like(counts), heavies) if self.layout.draws is None else (heavies, counts)

    def _streams(self, keys: Keys, counts: Ints, heavies: Ints, words: NDArray[np.uint16]) -> Streams:
        """All streams, from sorted keys."""
        starts, stops = self._valued(counts, heavies)
        values: Any = np.empty(int((stops - starts).sum()), np.uint8 if self._value_planes == 1 else np.uint16)
        floors = np.empty_like(starts)
        lift = not self.layout.sampled
        pack_levels(keys, starts, stops, (1 << self._runs.payload_bits) - 1, lift, floors, values)
        ids = {"ids": self._runs.pack(keys, counts, heavies)} if self.layout.named_ids else {}
        numbers = {"count": counts, "heavies": heavies, "floor": floors}
        return {**ids, "values": split(values, self._value_planes), **self._numbers.pack(numbers, words)}


def _tail_odds(targets: SparseTargets) -> NDArray[np.float64]:
    """`[n_T, n]` log-odds of the tail.

    One minus the tail is the kept mass, and exact enough but where little is kept: there the entries are summed.
    """
    assert targets.log_tail is not None  # of truncated targets
    log_tail = targets.log_tail.numpy().T.astype(np.float64)
    with np.errstate(divide="ignore"):
        log_kept = np.log(-np.expm1(np.minimum(log_tail, 0.0)))
    for column, t in enumerate(targets.temperatures):
        flat = np.flatnonzero(log_tail[column] > _SMALL_TAIL)
        if len(flat):
            some = targets[flat]
            summed = (some.logprobs.double() / t).logsumexp(-1) - some.log_partition[:, column].double()
            log_kept[column, flat] = summed.numpy()
    return np.asarray(log_tail - log_kept, np.float64)


# fmt: off
@compiled
def unpack_truncated(
    near: Bytes, values: Values, high: Bytes, low: Bytes,
    width: int, planes: int, lookup: Ids, vocab_size: int,
    top: int, level_weights: Floats, level_logs: Floats, fixed: Ints, fields: int, unit: float,
    log_mass: Doubles, log_rest: Doubles, nats: Floats, has_entropy: bool, has_label: bool,
    named_ids: bool, count_size: int, floor_size: int, exponents: Doubles, columns: Ints,
    ids: Ids, weights: Floats, logprobs: Floats, count: NDArray[np.int32],
    log_partition: Floats, log_tail: Floats, entropy: Floats, label: Floats,
) -> int:
    # fmt: on
    """Fill the targets of a row of a truncated kind; streams and numbers as the module has them.

    The first line of arguments is the row; the fields of `IdTable`, `LevelTable` and `MeasureTables` follow; the last
    two lines are filled. They are flat because a named tuple would take time by its fields at each call:
    docs/decisions/0016.

    Returns:
        0, or a problem.
    """
    n, first, odds = high.shape[1], count_size + floor_size, len(low) - has_entropy - has_label
    counts = np.full(n, width)
    if count_size:
        read_count(high, 0, count_size, counts)
    entries = 0
    for i in range(n):
        if counts[i] < 1 or counts[i] > width:
            return COUNT
        entries += counts[i]
    if len(values) != entries:
        return VALUES
    if named_ids:
        table = IdTable(width, planes, lookup, vocab_size)
        problem = unpack_ids(near, entries, counts, counts, table, ids)
        if problem:
            return problem
    floors, sums, kept = np.empty(n, np.int64), np.empty((n, len(columns))), np.zeros((len(columns), n))
    read_count(high, count_size, floor_size, floors)
    log_tail[:] = -np.inf
    for k in range(len(columns) if odds else 0):
        read_word(high, low, first, columns[k], log_rest, kept[k])
        read_word(high, low, first, columns[k], log_mass, log_tail[:, columns[k]])
    levels = LevelTable(top, level_weights, level_logs, fixed, fields, unit)
    problem = unpack_levels(values, counts, floors, kept[0], levels, 1.0, exponents, weights, logprobs, sums)
    if problem:
        return problem
    for k in range(len(columns)):
        for i in range(n):
            log_partition[i, columns[k]] = sums[i, k] - kept[k, i] if k else 0.0
    for i in range(n):
        count[i] = counts[i]
    return read_measures(high, low, first, odds, nats, has_entropy, has_label, entropy, label)


# fmt: off
@compiled
def unpack_sampled(
    near: Bytes, values: Values, high: Bytes, low: Bytes,
    width: int, planes: int, lookup: Ids, vocab_size: int,
    top: int, level_weights: Floats, level_logs: Floats, fixed: Ints, fields: int, unit: float,
    log_mass: Doubles, log_rest: Doubles, nats: Floats, has_entropy: bool, has_label: bool,
    draws: int, most_heavies: int, count_size: int, heavy_size: int,
    temperatures: Doubles, columns: Ints, own_column: int,
    ids: Ids, weights: Floats, logprobs: Floats, count: NDArray[np.int32],
    log_partition: Floats, entropy: Floats, label: Floats,
) -> int:
    # fmt: on
    """Fill the targets of a row of a sampled kind; `draws` is 0 where lights weigh alike. See `unpack_truncated`.

    Returns:
        0, or a problem.
    """
    n, first, odds = high.shape[1], count_size + heavy_size, 1 if heavy_size else 0
    counts, heavies, log_lights, log_heavies = np.empty(n, np.int64), np.empty(n, np.int64), np.zeros(n), np.zeros(n)
    log_partition[:] = 0
    read_count(high, 0, count_size, counts)
    read_count(high, count_size, heavy_size, heavies)
    entries, valued = 0, 0
    for i in range(n):
        if counts[i] < 1 or counts[i] > width or heavies[i] > min(counts[i], most_heavies):
            return COUNT
        entries += counts[i]
        valued += counts[i] - heavies[i] if draws else heavies[i]
    if len(values) != valued:
        return VALUES
    problem = unpack_ids(near, entries, counts, heavies, IdTable(width, planes, lookup, vocab_size), ids)
    if problem:
        return problem
    if odds:
        read_word(high, low, first, 0, log_mass, log_lights)
        read_word(high, low, first, 0, log_rest, log_heavies)
    for k in range(len(columns)):
        if not read_word(high, low, first, odds + k, nats, entropy):
            return MEASURE
        for i in range(n):
            log_partition[i, columns[k]] = entropy[i] * (1 - 1 / temperatures[columns[k]])
    temperature = temperatures[own_column]
    for i in range(n):
        if heavies[i] == counts[i]:
            log_heavies[i] = 0.0
    if draws:
        weights[:] = 0
        logprobs[:] = -np.inf
        for i in range(n):
            if heavies[i]:
                weights[i * width], logprobs[i * width] = math.exp(log_heavies[i]), temperature * log_heavies[i]
    else:
        levels = LevelTable(top, level_weights, level_logs, fixed, fields, unit)
        problem = unpack_levels(
            values, heavies, np.zeros(n, np.int64), log_heavies, levels, temperature, np.ones(1), weights, logprobs,
            np.empty((n, 1)),
        )  # fmt: skip
        if problem:
            return problem
    if own_column in columns:
        for i in range(n):
            for j in range(i * width, i * width + heavies[i]):
                logprobs[j] += temperature * log_partition[i, own_column]
    problem = unpack_lights(values, counts, heavies, log_lights, draws, weights, logprobs)
    if problem:
        return problem
    for i in range(n):
        count[i] = counts[i]
    return read_measures(high, low, first, odds + len(columns), nats, has_entropy, has_label, entropy, label)
