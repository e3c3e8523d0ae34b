"""The plain codec: values as floats, entries in the order of the selection (`full`: in order of id).

Streams of a row of n positions, E entries in all, little-endian; positions first, but F scalars one after the other:

    counts    [n] entries, where they differ; then [n] heavies of a sampled kind that has any
    ids       [E]; absent for `full`
    values    float32: log p of each entry, of the heavies in sampled kinds
              float16: 2^15 sqrt(p), or sqrt(p_T) of the heavies of `ipps`; how often each light of `sample` was drawn
    weights   float32 only: [E]; empty where a truncated kind's are exactly exp(values)
    scalars   [F, n] float32: truncated kinds but `full`: log_tail for each T; float16 of sampled kinds with heavies:
              log-odds of the lights; log_partition for each T but 1; entropy; label_logprob

Guarantee: `float32` loses nothing. `float16` keeps every log p within 2e-3 nats down to p = 2^-56 (-38.8 nats), and
smaller ones stay above zero; a kept mass of a half or more is scaled to what the exactly stored tail leaves, so neither
the tail nor a probability near 1 is ever distorted. (A float16 of log p itself would be off by 4e-3 at p = e^-12, and
by 5e-4 of mass at p near 1.)
Cost: a handful of vectorised passes.

Decoding trusts nothing: lengths, ids and numbers are checked before use and every wrong claim is a CorruptCacheError.

Shapes: n positions with a target in the row, K entries, n_T temperatures, F scalars.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.layout import Layout
from kdcache.codec.lights import light_odds, multiplicities, unpack_lights
from kdcache.codec.streams import PROBLEMS, Columns, Floats, Ints, Shapes, Streams, id_dtype, take, whole
from kdcache.errors import ConfigError, CorruptCacheError, TargetError
from kdcache.lazy_torch import torch
from kdcache.targets import SparseTargets

PRECISIONS = ("float32", "float16")

_SINGLE, _HALF = np.dtype("<f4"), np.dtype("<f2")
_HALF_SCALE = 2.0**15
_HALF_SMALLEST = 2.0**-24  # the least positive float16
_SLACK = 1e-3  # of a logarithm that cannot be positive

Mask = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class PlainCodec:
    """The layout of the targets of one cache; everything comes from its manifest.

    Attributes:
        layout: of the targets.
        precision: `float32` or `float16`.

    Raises:
        ConfigError: an unknown precision.
    """

    layout: Layout
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"precision is {self.precision}, but must be {' or '.join(PRECISIONS)}")

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """Of a stored id."""
        return id_dtype(self.layout.vocab_size)

    @property
    def orders_ids(self) -> bool:
        """Whether an order of ids by frequency makes the streams smaller."""
        return False

    @property
    def error_bound(self) -> dict[str, float]:
        """The most by which each stored number is off; nothing that is not named is off at all."""
        if self._exact:
            return {"logprob": 0.0, "weight": 0.0}
        if self.layout.draws is not None:
            return {"multiplicity": 0.0}
        return {"logprob": 2e-3, "logprob_down_to": -38.8}

    @property
    def _exact(self) -> bool:
        return self.precision == "float32"

    @property
    def _draws(self) -> bool:
        """Whether values are numbers of draws."""
        return self.layout.draws is not None and not self._exact

    @property
    def _value_dtype(self) -> np.dtype[Any]:
        return self.layout.multiplicity_dtype if self._draws else _SINGLE if self._exact else _HALF

    @property
    def _odds(self) -> bool:
        return self.layout.heavies and not self._exact

    @property
    def _scalar_names(self) -> list[str]:
        layout = self.layout
        measured = ["entropy"] * layout.known.entropy + ["label"] * layout.known.label_logprob
        odds = ["odds"] * self._odds
        return [*(f"tail{c}" for c in layout.tails), *odds, *(f"partition{c}" for c in layout.others), *measured]

    @property
    def _count_dtype(self) -> np.dtype[Any]:
        return np.dtype("<u2" if self.layout.width < 1 << 16 else "<u4")

    def streams(self, positions: int) -> Shapes:
        """Type and largest shape of each stream of a row."""
        layout, entries = self.layout, (positions, self.layout.width)
        shapes: Shapes = {}
        if layout.ragged:
            shapes["counts"] = (self._count_dtype, (1 + layout.heavies, positions))
        if layout.named_ids:
            shapes["ids"] = (self.id_dtype, entries)
        shapes["values"] = (self._value_dtype, entries)
        if self._exact:
            shapes["weights"] = (_SINGLE, entries)
        return {**shapes, "scalars": (_SINGLE, (len(self._scalar_names), positions))}

    def encode(self, targets: SparseTargets) -> Streams:
        """Pack the targets of one row.

        Raises:
            TargetError: targets that do not fit the layout.
        """
        counts = self.layout.counts(targets)
        valid = np.arange(self.layout.width) < counts[:, None]
        ids, logprobs, weights = (getattr(targets, name).numpy() for name in ("ids", "logprobs", "weights"))
        if ((ids < 0) | (ids >= self.layout.vocab_size))[valid].any():
            raise TargetError("a target names an id outside the vocabulary")
        light = np.isnan(logprobs) & valid
        if light.any() and not self.layout.sampled:
            raise TargetError("an entry has no log-probability")
        # Heavies first, and `full` by id; else as they are.
        order = np.argsort(np.where(valid, light, 2) if self.layout.named_ids else ids, axis=-1, kind="stable")
        ids, logprobs, weights, light = (np.take_along_axis(x, order, -1) for x in (ids, logprobs, weights, light))
        heavies = counts - light.sum(-1)
        if not self.layout.heavies and heavies.any() and self.layout.sampled:
            raise TargetError("a drawn entry has a log-probability")
        if not self.layout.named_ids and (ids != np.arange(self.layout.width)).any():
            raise TargetError("a target of every id does not name each once")
        doubles = np.where(valid, weights, 0).astype(np.float64)
        values = self._values(logprobs, doubles, light, valid & ~light)
        odds = light_odds(doubles, light) if self._odds else None
        return self._streams(counts, heavies, ids[valid], values, weights[valid], self._scalars(targets, odds))

    def _streams(
        self, counts: Ints, heavies: Ints, ids: Ints, values: NDArray[Any], weights: Floats, scalars: NDArray[Any]
    ) -> Streams:
        """All streams; those of entries come as `[E]`, or as many as have a value, heavies of a position first."""
        streams: Streams = {}
        if self.layout.ragged:
            found = [counts, heavies] if self.layout.heavies else [counts]
            streams["counts"] = np.stack(found).astype(self._count_dtype).reshape(-1)
        if self.layout.named_ids:
            streams["ids"] = ids.astype(self.id_dtype)
        streams["values"] = values
        if self._exact:
            exact = weights.astype(_SINGLE)
            same = not self.layout.sampled and np.array_equal(exact, _exp(values))
            streams["weights"] = exact[:0] if same else exact
        return {**streams, "scalars": scalars}

    def _values(self, logprobs: Floats, weights: NDArray[np.float64], light: Mask, heavy: Mask) -> NDArray[Any]:
        if self._draws:
            return multiplicities(self.layout.draws or 0, weights, light)[light].astype(self._value_dtype)
        if self._exact:
            return logprobs[heavy].astype(_SINGLE)
        root = np.sqrt(weights[heavy]) if self.layout.sampled else np.exp(logprobs[heavy].astype(np.float64) / 2)
        return np.maximum(root * _HALF_SCALE, _HALF_SMALLEST).astype(_HALF)

    def _scalars(self, targets: SparseTargets, odds: NDArray[np.float64] | None) -> NDArray[Any]:
        rows: dict[str, torch.Tensor | None] = {"entropy": targets.entropy, "label": targets.label_logprob}
        for column in range(len(self.layout.temperatures)):
            rows[f"tail{column}"] = None if targets.log_tail is None else targets.log_tail[:, column]
            rows[f"partition{column}"] = targets.log_partition[:, column]
        if odds is not None:
            rows["odds"] = torch.from_numpy(odds)
        found = [rows[name] for name in self._scalar_names]
        if not found:
            return np.zeros(0, _SINGLE)
        return np.stack([row.numpy().astype(_SINGLE) for row in found if row is not None]).reshape(-1)

    def decode(self, streams: Mapping[str, NDArray[Any]], positions: int) -> SparseTargets:
        """Unpack the targets of a row that has `positions` of them.

        Raises:
            CorruptCacheError: a stream whose length, ids or numbers cannot be what was encoded.
        """
        counts, heavies = self._counts(streams, positions)
        column = np.arange(self.layout.width)
        row = _Row(
            streams=streams,
            valid=column < counts[:, None],
            heavy=column < heavies[:, None],
            scalars=self._read_scalars(streams, positions),
        )
        log_partition = np.zeros((positions, len(self.layout.temperatures)), np.float32)
        log_tail = np.full_like(log_partition, -np.inf)
        for place in range(len(self.layout.temperatures)):
            log_tail[:, place] = row.scalars.get(f"tail{place}", log_tail[:, place])
            log_partition[:, place] = row.scalars.get(f"partition{place}", log_partition[:, place])
        if self._exact:
            logprobs, weights = self._read_exact(row)
        elif self.layout.sampled:
            logprobs, weights = self._read_sampled(row, log_partition)
        else:
            logprobs, weights = self._read_truncated(row, log_tail)
        return self.layout.targets(
            ids=self._ids(row),
            logprobs=logprobs,
            weights=weights,
            counts=counts.astype(np.int32),
            log_partition=log_partition,
            log_tail=None if self.layout.sampled else log_tail,
            entropy=row.scalars.get("entropy"),
            label_logprob=row.scalars.get("label"),
        )

    def columns(self, streams: Mapping[str, NDArray[Any]], positions: int) -> Columns:
        """What is stored of each position: ids, values, weights, counts and scalars."""
        counts, heavies = self._counts(streams, positions)
        valid, valued = self._in_use(counts, heavies)
        ids, values = np.zeros(valid.shape, np.int32), np.zeros(valid.shape, self._value_dtype)
        ids[valid] = streams["ids"] if self.layout.named_ids else np.tile(np.arange(self.layout.width), positions)
        values[valued] = streams["values"]
        weights = np.zeros(valid.shape, _SINGLE)
        if self._exact:
            stored = streams["weights"]
            weights[valid] = stored if len(stored) else _exp(streams["values"])
        scalars = streams["scalars"].reshape(len(self._scalar_names), positions).T
        return {
            "ids": ids, "values": values, "weights": weights, "counts": counts, "heavies": heavies, "scalars": scalars,
        }  # fmt: skip

    def from_columns(self, columns: Columns) -> Streams:
        """The streams of positions."""
        counts, heavies = columns["counts"], columns["heavies"]
        valid, valued = self._in_use(counts, heavies)
        ids, values, weights = columns["ids"][valid], columns["values"][valued], columns["weights"][valid]
        return self._streams(counts, heavies, ids, values, weights, columns["scalars"].T.reshape(-1))

    def _in_use(self, counts: Ints, heavies: Ints) -> tuple[Mask, Mask]:
        """`[n, K]` entries, and those of them that have a value."""
        column = np.arange(self.layout.width)
        valid, heavy = column < counts[:, None], column < heavies[:, None]
        return valid, valid & ~heavy if self._draws else heavy

    def _counts(self, streams: Mapping[str, NDArray[Any]], positions: int) -> tuple[Ints, Ints]:
        """`[n]` entries, and `[n]` heavies: all of them in truncated kinds."""
        layout = self.layout
        if not layout.ragged:
            full = np.full(positions, layout.width)
            return full, full
        rows = take(streams, "counts", self._count_dtype, (1 + layout.heavies) * positions).astype(np.int64)
        counts = rows[:positions]
        heavies = rows[positions:] if layout.heavies else np.zeros_like(counts) if layout.sampled else counts
        most = np.minimum(counts, layout.most_heavies) if layout.heavies else counts
        if ((counts < 1) | (counts > layout.width) | (heavies > most)).any():
            raise CorruptCacheError(f"a position has more than {layout.width} entries, more heavies than fit, or none")
        return counts, heavies

    def _ids(self, row: _Row) -> NDArray[np.int32]:
        if not self.layout.named_ids:
            return np.tile(np.arange(self.layout.width, dtype=np.int32), (len(row.valid), 1))
        stored = take(row.streams, "ids", self.id_dtype, int(row.valid.sum()))
        if stored.size and stored.max() >= self.layout.vocab_size:
            raise CorruptCacheError(f"an id of {stored.max()} is outside a vocabulary of {self.layout.vocab_size}")
        ids = np.zeros(row.valid.shape, np.int32)
        ids[row.valid] = stored
        return ids

    def _read_scalars(self, streams: Mapping[str, NDArray[Any]], positions: int) -> dict[str, Floats]:
        names = self._scalar_names
        rows = take(streams, "scalars", _SINGLE, len(names) * positions).reshape(len(names), positions)
        found = {name: row.copy() for name, row in zip(names, rows, strict=True)}
        for name, row in found.items():
            log = name.startswith("tail") or name == "label"
            missing = np.isnan(row)
            endless = np.isinf(row) & (name.startswith("partition") or name == "entropy")
            if (missing | endless | (log & (row > _SLACK))).any():
                raise CorruptCacheError(f"a stored {name.rstrip('0123456789')} is not a number that it can be")
        return found

    def _read_exact(self, row: _Row) -> tuple[Floats, Floats]:
        size = int(row.valid.sum())
        values = take(row.streams, "values", _SINGLE, int(row.heavy.sum()))
        stored = whole(row.streams, "weights", _SINGLE, size if self.layout.sampled else 0, size)
        if len(stored) not in (0, size):
            raise CorruptCacheError(f"stream 'weights' has {len(stored)} numbers for {size} entries")
        exact = stored if len(stored) else _exp(values)
        # A comparison with NaN is false.
        if not (values <= _SLACK).all() or not ((exact >= 0) & (exact <= 1 + _SLACK)).all():
            raise CorruptCacheError("a stored value is not a probability")
        logprobs = np.full(row.valid.shape, -np.inf, np.float32)
        logprobs[row.valid] = np.nan
        logprobs[row.heavy] = values
        weights = np.zeros(row.valid.shape, np.float32)
        weights[row.valid] = exact
        return logprobs, weights

    def _read_half(self, row: _Row) -> torch.Tensor:
        """`[n, K]` log of each heavy entry's value, float32, -inf elsewhere."""
        values = take(row.streams, "values", _HALF, int(row.heavy.sum())).astype(np.float32)
        if not ((values > 0) & (values <= _HALF_SCALE * (1 + _SLACK))).all():
            raise CorruptCacheError("a stored value is not a probability")
        logs = torch.full(row.heavy.shape, -torch.inf)
        logs[torch.from_numpy(row.heavy)] = 2 * torch.from_numpy(values / _HALF_SCALE).log()
        return logs

    def _read_truncated(self, row: _Row, log_tail: Floats) -> tuple[Floats, Floats]:
        logs = self._read_half(row)
        # Where little is kept, float32 knows the kept mass worse from the tail than the entries know it.
        kept = -torch.expm1(torch.from_numpy(log_tail[:, self.layout.temperatures.index(1.0)]))
        logs += torch.where(kept >= 0.5, kept.log() - logs.logsumexp(-1), 0.0)[:, None]
        return logs.numpy(), logs.exp().numpy()

    def _read_sampled(self, row: _Row, log_partition: Floats) -> tuple[Floats, Floats]:
        counts, heavies, own = row.valid.sum(-1), row.heavy.sum(-1), self.layout.own_temperature
        odds = row.scalars.get("odds", np.zeros(len(counts), np.float32)).astype(np.float64)
        log_mass, log_rest = -np.logaddexp(0, -odds), -np.logaddexp(0, odds)
        log_rest = np.where(heavies == counts, 0, log_rest)[:, None]
        if self._draws:
            logs = np.where(row.heavy, log_rest, -np.inf)
            drawn = take(row.streams, "values", self._value_dtype, int((counts - heavies).sum()))
        else:
            values = self._read_half(row).double()
            total = values.logsumexp(-1, keepdim=True).numpy()
            logs = np.where(row.heavy, values.numpy() - np.where(np.isneginf(total), 0, total) + log_rest, -np.inf)
            drawn = np.zeros(0, np.uint8)
        weights = np.exp(logs).astype(np.float32)
        lead = log_partition[:, self.layout.temperatures.index(own), None]
        logprobs = (own * (logs + lead)).astype(np.float32)
        draws = self.layout.draws or 0
        problem = unpack_lights(drawn, counts, heavies, log_mass, draws, weights.reshape(-1), logprobs.reshape(-1))
        if problem:
            raise CorruptCacheError(PROBLEMS[problem])
        return logprobs, weights


@dataclass(frozen=True, kw_only=True)
class _Row:
    """A row that is being read: its streams, which entries are in use, which of them are heavy, and its scalars."""

    streams: Mapping[str, NDArray[Any]]
    valid: Mask
    heavy: Mask
    scalars: dict[str, Floats]


def _exp(values: NDArray[Any]) -> Floats:
    """exp as torch takes it in float32: what a selection calls a weight."""
    return torch.from_numpy(values.astype(np.float32)).exp().numpy()
