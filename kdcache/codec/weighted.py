"""The weighted codec: entries with free weights, such as importance weights, as heavies of another codec.

Another codec keeps the weights as parts of a unit; one more stream keeps the unit:

    unit    [n] float32: the sum of a position's weights; for float32 the least power of two that is not below it

Guarantee: that of the other codec for each weight as a part of its position's sum; `float32` loses nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.layout import Layout
from kdcache.codec.streams import Columns, Shapes, Streams, take
from kdcache.errors import CorruptCacheError
from kdcache.lazy_torch import torch
from kdcache.targets import SparseTargets

if TYPE_CHECKING:
    from kdcache.codec.layout import Codec

_UNIT, _SINGLE = "unit", np.dtype("<f4")
_MOST = 2.0**40
"""p / q is at most sqrt(V) for t below 1, and Z / p above; an id whose q is below 2^-53 is never drawn."""


@dataclass(frozen=True, kw_only=True)
class WeightedCodec:
    """The layout of the targets of one cache; everything comes from its manifest.

    Attributes:
        layout: of the targets.
        inner: the codec of the weights, as many heavies and no lights.
        exact: whether that one keeps every bit.
    """

    layout: Layout
    inner: Codec
    exact: bool

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """Of a stored token id."""
        return self.inner.id_dtype

    @property
    def orders_ids(self) -> bool:
        """Whether an order of ids by frequency makes the streams smaller."""
        return self.inner.orders_ids

    @property
    def error_bound(self) -> dict[str, float]:
        """The most by which each stored number is off, of weights as parts of their sum."""
        return self.inner.error_bound

    def streams(self, positions: int) -> Shapes:
        """Type and largest shape of each stream of a row."""
        return {**self.inner.streams(positions), _UNIT: (_SINGLE, (positions,))}

    def encode(self, targets: SparseTargets) -> Streams:
        """Pack the targets of one row.

        Raises:
            TargetError: targets that do not fit the layout.
        """
        self.layout.counts(targets)
        weights = torch.where(targets.valid, targets.weights.double(), 0.0)
        unit = weights.sum(-1, keepdim=True).float().double()
        if self.exact:
            unit = torch.exp2(unit.log2().ceil())
        heavy = dataclasses.replace(
            targets,
            weights=(weights / unit).float(),
            logprobs=(self.layout.own_temperature * (weights / unit).log()).float(),
        )
        return {**self.inner.encode(heavy), _UNIT: unit[:, 0].numpy().astype(_SINGLE)}

    def decode(self, streams: Mapping[str, NDArray[Any]], positions: int) -> SparseTargets:
        """Unpack the targets of a row that has `positions` of them.

        Raises:
            CorruptCacheError: a stream whose length or numbers cannot be what was encoded.
        """
        unit = take(streams, _UNIT, _SINGLE, positions)
        # A comparison with NaN is false.
        if not ((unit > 0) & (unit <= _MOST)).all():
            raise CorruptCacheError("the weights of a position do not have a sum that they can have")
        heavy = self.inner.decode(streams, positions)
        if heavy.logprobs.isnan().any():
            raise CorruptCacheError("a weighted draw has no weight of its own")
        return dataclasses.replace(
            heavy,
            weights=heavy.weights * torch.from_numpy(unit.copy())[:, None],
            logprobs=torch.where(heavy.valid, torch.nan, -torch.inf),
        )

    def columns(self, streams: Mapping[str, NDArray[Any]], positions: int) -> Columns:
        """What is stored of each position."""
        return {**self.inner.columns(streams, positions), _UNIT: take(streams, _UNIT, _SINGLE, positions)}

    def from_columns(self, columns: Columns) -> Streams:
        """The streams of positions."""
        return {**self.inner.from_columns(columns), _UNIT: columns[_UNIT].astype(_SINGLE)}
