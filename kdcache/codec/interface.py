"""Codec: what a store may ask of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kdcache.codec.layout import Layout
from kdcache.codec.streams import Shapes, Streams
from kdcache.targets import SparseTargets


class Codec(Protocol):
    """SparseTargets of a row to named streams of numbers, and back."""

    @property
    def layout(self) -> Layout:
        """What the targets are, whatever their precision."""

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """Of a stored token id."""

    @property
    def orders_ids(self) -> bool:
        """Whether an order of ids by frequency makes the streams smaller."""

    @property
    def error_bound(self) -> dict[str, float]:
        """The most by which each stored number is off, by name: what the manifest promises."""

    def streams(self, positions: int) -> Shapes:
        """Little-endian type and largest shape of each stream of a row with so many positions.

        Names and their order depend on the codec alone; a stream may be shorter than its shape.
        """

    def encode(self, targets: SparseTargets) -> Streams:
        """Pack the targets of one row's n positions into one-dimensional contiguous arrays.

        Raises:
            TargetError: targets that are not what this codec was made for.
        """

    def decode(self, streams: Mapping[str, NDArray[Any]], positions: int) -> SparseTargets:
        """Unpack the targets of a row that has `positions` of them; nothing in `streams` is trusted.

        Raises:
            CorruptCacheError: a stream whose length or numbers cannot be what was encoded.
        """
