"""The compact codec: entries sorted by a re-ranked id, values in a few bits, everything under zstd.

Streams of a row of n positions, each a zstd frame:

    ids       [n, K] uint8: ranks rise along a position; each is stored as its distance to the one before, less
              one (the first: as it is); 255 stands for 255 or more
    ids_far   uint32 for each 255, in order: by how much the distance exceeds it
    values    [n, K] round(c p^(1/e)), at least 1, c = 2^bits - 1; uint8, or a plane of high and one of low bytes
    scalars   [2, F, n] uint8: high and low bytes of 32768 + round(64 logit(tail)) for each T, 0 for an empty tail;
              then of round(128 x) for entropy and -label_logprob

A rank is the place of an id in an order that puts the ids that the teacher proposes most often first; it comes
from the manifest. Sorting by rank makes distances small. The exponent is e = 2 + 2 ceil(max T): at T = 1 large
probabilities count, at a higher T small ones do too, and the least value, c^-e, must stay small when it is
softened. Tails are stored apart and the kept part is scaled to what they leave, so a peaked position keeps its
tail; log_partition follows from both, at every T.

Bounds: |p^(1/e) - stored| <= 0.5 / c before scaling (1 / c where p < c^-e); entropy and
label_logprob within 1/256 nat; the log-odds of each tail within 1/128 up to 511, so neither a small tail nor a
small kept mass is lost. docs/decisions/0005 has the measured KL and the losing alternatives.
Cost of decoding: about 15 ns an entry on one core for rows of 500 positions, a fifth of it zstd.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.codec.streams import Buffer, deflate, id_dtype, inflate
from kdcache.errors import ConfigError, CorruptCacheError
from kdcache.targets import SparseTargets

BITS = range(4, 17)

_FAR = 255
_TAIL_STEPS, _STEPS = 64.0, 128.0  # a nat
_MIDDLE = 32768


@dataclass(frozen=True, kw_only=True)
class CompactCodec:
    """How the targets of one cache are laid out; everything comes from its manifest.

    Attributes:
        kind: the selection.
        width: K.
        vocab_size: ids lie below it.
        temperatures: T of each tail; 1 among them.
        bits: of a value, 4 to 16.
        id_order: ids by falling frequency; those that are absent follow in order of id.

    Raises:
        ConfigError: bits out of range, or no temperature 1.
        CorruptCacheError: an order that repeats an id or names one outside the vocabulary.
    """

    kind: str
    width: int
    vocab_size: int
    temperatures: tuple[float, ...]
    bits: int
    id_order: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ConfigError(f"--precision {self.bits} is outside {BITS.start} to {BITS.stop - 1} bits")
        if 1.0 not in self.temperatures:
            raise ConfigError("a cache must store temperature 1")
        order = self.id_order
        if len(set(order)) != len(order) or any(type(i) is not int or not 0 <= i < self.vocab_size for i in order):
            raise CorruptCacheError("the id order repeats an id or names one outside the vocabulary")

    @cached_property
    def _ids(self) -> NDArray[np.int32]:
        """`[V]` the id of each rank."""
        seen = np.array(self.id_order, np.int32)
        rest = np.ones(self.vocab_size, bool)
        rest[seen] = False
        return np.concatenate([seen, np.flatnonzero(rest).astype(np.int32)])

    @cached_property
    def _ranks(self) -> NDArray[np.uint64]:
        """`[V]` the rank of each id."""
        ranks = np.empty(self.vocab_size, np.uint64)
        ranks[self._ids] = np.arange(self.vocab_size, dtype=np.uint64)
        return ranks

    @property
    def id_dtype(self) -> np.dtype[Any]:
        """Of a stored token id."""
        return id_dtype(self.vocab_size)

    @property
    def _levels(self) -> int:
        return (1 << self.bits) - 1

    @property
    def _exponent(self) -> int:
        return 2 + 2 * math.ceil(max(self.temperatures))

    @cached_property
    def _values(self) -> NDArray[np.float32]:
        """`[c + 1]` what each stored value stands for, before scaling."""
        return ((np.arange(self._levels + 1) / self._levels) ** self._exponent).astype(np.float32)

    def encode(self, targets: SparseTargets) -> dict[str, bytes]:
        """Pack the targets of one row's n positions, each with exactly K entries."""
        root = (targets.logprobs.double() / self._exponent).exp().numpy() * self._levels
        values = np.maximum(np.rint(root), 1).astype(np.uint64)
        key = self._ranks[targets.ids.numpy()] << np.uint64(16) | values  # [n, K]
        key.sort(axis=-1)
        ranks = (key >> np.uint64(16)).astype(np.int64)
        distance = np.diff(ranks, axis=-1, prepend=-1) - 1
        near = np.minimum(distance, _FAR).astype(np.uint8)
        low, high = key.astype(np.uint8), (key >> np.uint64(8)).astype(np.uint8)
        pairs = [targets.at_temperature(t) for t in self.temperatures]
        # Both masses summed directly: one minus the other would cancel where either is small.
        odds = torch.stack([tail - logprobs.logsumexp(-1) for logprobs, tail in pairs], -1)  # [n, n_T]
        tails = (odds * _TAIL_STEPS).round().clamp(1 - _MIDDLE, _MIDDLE - 1) + _MIDDLE
        tails = torch.where(torch.isneginf(odds), 0, tails)
        plain = torch.stack([targets.entropy, -targets.label_logprob]) * _STEPS
        words = torch.cat([tails.T, plain.round().clamp(0, 65535)]).numpy().astype(np.uint16)  # [F, n]
        return {
            "ids": deflate(near),
            "ids_far": deflate((distance[near == _FAR] - _FAR).astype("<u4").view(np.uint8)),
            "values": deflate(low if self.bits <= 8 else np.stack([high, low])),
            "scalars": deflate(np.stack([(words >> 8).astype(np.uint8), words.astype(np.uint8)])),
        }

    def decode(self, streams: Mapping[str, Buffer], positions: int) -> SparseTargets:
        """Unpack the targets of a row that has `positions` of them.

        Raises:
            CorruptCacheError: a stream whose length or numbers cannot be what was encoded.
        """
        odds, entropy, label_logprob = self._scalars(streams, positions)
        log_tail, log_kept = (torch.nn.functional.logsigmoid(x) for x in (odds, -odds))
        weights = self._probabilities(streams, positions, log_kept[:, self.temperatures.index(1.0)])
        logprobs = weights.log()
        partitions = [
            torch.zeros(positions) if t == 1 else (logprobs / t).exp().sum(-1).log() - log_kept[:, column]
            for column, t in enumerate(self.temperatures)
        ]
        return SparseTargets(
            ids=self._entry_ids(streams, positions),
            logprobs=logprobs,
            weights=weights,
            count=torch.full((positions,), self.width, dtype=torch.int32),
            log_partition=torch.stack(partitions, -1),
            log_tail=log_tail,
            entropy=entropy,
            label_logprob=label_logprob,
            temperatures=self.temperatures,
            kind=self.kind,
        )

    def _entry_ids(self, streams: Mapping[str, Buffer], positions: int) -> torch.Tensor:
        near = inflate(streams, "ids", positions * self.width)
        distance = near.astype(np.int32)
        far = np.flatnonzero(near == _FAR)
        beyond = inflate(streams, "ids_far", 4 * len(far)).view("<u4")
        if len(far):
            if beyond.max() >= self.vocab_size:
                raise CorruptCacheError("an entry lies outside the vocabulary")
            distance[far] += beyond.astype(np.int32)
        rising = distance.reshape(positions, self.width)
        rising[:, 1:] += 1
        # In 64 bits where K distances below V could overflow 32.
        wide = torch.int32 if self.width * self.vocab_size < 1 << 31 else torch.int64
        ranks = torch.from_numpy(rising).cumsum(-1, dtype=wide)
        if positions and ranks.numpy()[:, -1].max() >= self.vocab_size:
            raise CorruptCacheError(f"an entry lies outside the vocabulary of {self.vocab_size} tokens")
        return torch.from_numpy(self._ids).index_select(0, ranks.view(-1)).view(positions, self.width)

    def _probabilities(self, streams: Mapping[str, Buffer], positions: int, log_kept: torch.Tensor) -> torch.Tensor:
        size = positions * self.width
        if self.bits <= 8:
            levels = inflate(streams, "values", size)
        else:
            high, low = inflate(streams, "values", 2 * size).reshape(2, size).astype(np.uint16)
            levels = high << 8 | low
        if size and (levels.min() < 1 or levels.max() > self._levels):
            raise CorruptCacheError(f"a value lies outside 1 to {self._levels}")
        p = torch.from_numpy(self._values.take(levels)).view(positions, self.width)  # before scaling
        return p.mul_((log_kept.exp() / p.sum(-1))[:, None])

    def _scalars(self, streams: Mapping[str, Buffer], positions: int) -> tuple[torch.Tensor, ...]:
        count = len(self.temperatures) + 2
        high, low = inflate(streams, "scalars", 2 * count * positions).reshape(2, count, positions).astype(np.uint16)
        words = (high << 8 | low).astype(np.float32)
        tails = words[:-2].T
        odds = np.where(tails == 0, -np.inf, (tails - _MIDDLE) / _TAIL_STEPS)  # [n, n_T]
        found = (odds.astype(np.float32), words[-2] / _STEPS, -words[-1] / _STEPS)
        return tuple(torch.from_numpy(x) for x in found)
