"""The plain codec: values as floats, nothing compressed, entries in the order of the selection.

Streams of a row of n positions, little-endian, positions first, entries by falling probability:

    ids       [n, K] uint16 when the vocabulary fits, else uint32
    values    [n, K] float32 log p, or float16 sqrt(p) * 2^15
    scalars   [F, n] float32: log_tail for each T, log_partition for each T but 1, entropy,
              label_logprob

Guarantee: `float32` loses nothing. `float16` keeps every log p within 2e-3 nats down to
p = 2^-56 (-38.8 nats), and smaller ones stay above zero; a kept mass of a half or more is scaled to
what the exactly stored tail leaves, so neither the tail nor a probability near 1 is ever distorted.
(A float16 of log p itself would be off by 4e-3 at p = e^-12, and by 5e-4 of mass at p near 1.)
Cost: a handful of vectorised passes; nothing is compressed.

Decoding trusts nothing: lengths and ids are checked before use and every lie is a CorruptCacheError.

Shapes: n positions with a target in the row, K entries, n_T temperatures, F scalars.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from kdcache.codec.streams import Buffer, id_dtype, whole
from kdcache.errors import ConfigError, CorruptCacheError
from kdcache.targets import SparseTargets

PRECISIONS = ("float32", "float16")

_HALF_SCALE = 2.0**15
_HALF_SMALLEST = 2.0**-24  # the least positive float16


@dataclass(frozen=True, kw_only=True)
class PlainCodec:
    """How the targets of one cache are laid out; everything comes from its manifest.

    Attributes:
        kind: the selection.
        width: K.
        vocab_size: ids lie below it.
        temperatures: T of each stored partition and tail.
        precision: `float32` or `float16`.

    Raises:
        ConfigError: an unknown precision.
    """

    kind: str
    width: int
    vocab_size: int
    temperatures: tuple[float, ...]
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ConfigError(f"--precision {self.precision} is not one of {', '.join(PRECISIONS)}")
        if 1.0 not in self.temperatures:
            raise ConfigError("a cache must store temperature 1")

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """Of a stored id."""
        return id_dtype(self.vocab_size)

    @property
    def _value_dtype(self) -> np.dtype[np.floating]:
        return np.dtype("<f4" if self.precision == "float32" else "<f2")

    @property
    def _scalar_count(self) -> int:
        return len(self.temperatures) + sum(t != 1 for t in self.temperatures) + 2

    def encode(self, targets: SparseTargets) -> dict[str, bytes]:
        """Pack the targets of one row's n positions, each with exactly K entries."""
        if self.precision == "float32":
            values = targets.logprobs.numpy().astype("<f4")
        else:
            half = (targets.logprobs.double() / 2).exp().numpy() * _HALF_SCALE
            values = np.maximum(half, _HALF_SMALLEST).astype("<f2")
        columns = [*targets.log_tail.unbind(-1)]
        columns += [c for t, c in zip(self.temperatures, targets.log_partition.unbind(-1), strict=True) if t != 1]
        columns += [targets.entropy, targets.label_logprob]
        return {
            "ids": targets.ids.numpy().astype(self.id_dtype).tobytes(),
            "ids_far": b"",
            "values": values.tobytes(),
            "scalars": torch.stack(columns).numpy().astype("<f4").tobytes(),
        }

    def decode(self, streams: Mapping[str, Buffer], positions: int) -> SparseTargets:
        """Unpack the targets of a row that has `positions` of them.

        Raises:
            CorruptCacheError: a stream whose length, ids or numbers cannot be what was encoded.
        """
        n, k = positions, self.width
        ids = whole(streams, "ids", self.id_dtype, (n, k)).astype(np.int32)
        if ids.size and (ids.min() < 0 or ids.max() >= self.vocab_size):
            raise CorruptCacheError(f"an entry has id {ids.max()}, but the vocabulary has {self.vocab_size} tokens")
        raw = whole(streams, "values", self._value_dtype, (n, k))
        scalars = whole(streams, "scalars", np.dtype("<f4"), (self._scalar_count, n)).astype(np.float32)
        if np.isnan(raw).any() or np.isnan(scalars[:-1]).any():
            raise CorruptCacheError("a stored value is not a number")
        columns = torch.from_numpy(scalars)
        log_tail, column, partitions = columns[: len(self.temperatures)].T.contiguous(), len(self.temperatures), []
        for t in self.temperatures:
            partitions.append(torch.zeros(n) if t == 1 else columns[column])
            column += t != 1
        logprobs = self._logprobs(raw, log_tail[:, self.temperatures.index(1.0)])
        return SparseTargets(
            ids=torch.from_numpy(ids),
            logprobs=logprobs,
            weights=logprobs.exp(),
            count=torch.full((n,), k, dtype=torch.int32),
            log_partition=torch.stack(partitions, -1),
            log_tail=log_tail,
            entropy=columns[column],
            label_logprob=columns[column + 1],
            temperatures=self.temperatures,
            kind=self.kind,
        )

    def _logprobs(self, raw: np.ndarray, log_tail: torch.Tensor) -> torch.Tensor:
        if self.precision == "float32":
            return torch.from_numpy(raw.astype(np.float32))
        logprobs = 2 * torch.from_numpy(raw.astype(np.float32) / _HALF_SCALE).log()
        # Where little is kept, float32 knows the kept mass worse from the tail than the entries know it.
        kept_mass = -torch.expm1(log_tail)
        shift = torch.where(kept_mass >= 0.5, kept_mass.log() - logprobs.logsumexp(-1), 0.0)
        return logprobs + shift[:, None]
