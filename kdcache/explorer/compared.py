"""Compared: a second opinion on each position of a cache: that of a student, or of another teacher's cache.

What is compared gives targets at the same positions, and the KL of each from the cache's. A student is run, and its
targets are the largest of its own probabilities. The KL from a truncated target to a student has the tail as one
bucket; between two truncated targets, all that not both keep is one bucket:

    KL >= sum over ids that both keep of p log(p / q) + P log(P / Q)

where P and Q are the masses of everything else, each summed over its own parts. Both are lower bounds, exact where
everything is kept. Of a sampled target there is no KL to another target, and to a student it is an estimate, which may
be negative at a position.

Shapes: N labelled positions of a row, K entries, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kdcache.cache import Cache, open_cache
from kdcache.errors import ConfigError
from kdcache.losses import LogitSource
from kdcache.losses import measure as measure_targets
from kdcache.pretrained import find_device
from kdcache.rows import IGNORE, PackedRow, labelled_tokens
from kdcache.selection import select
from kdcache.selection.topk import TopK
from kdcache.store.manifest import NAME, Manifest
from kdcache.store.open_storage import open_storage
from kdcache.student.data import batches
from kdcache.student.evaluation import head_or_none, kl_kind
from kdcache.student.fused_head import with_logits
from kdcache.student.model import load_student, require_students
from kdcache.targets import SparseTargets

_TILE = 1 << 24
"""Logits that a student's targets are selected from at once."""


class Compared(Protocol):
    """A second opinion.

    Attributes:
        name: as it was given.
        what: `student` or `cache`.
        kl_kind: of the KL: `dense`, `lower-bound`, `estimate`, or `unknown`.
        sampled: whether its targets are sampled.
        temperatures: at which its targets are exact.
    """

    name: str
    what: str
    kl_kind: str
    sampled: bool
    temperatures: tuple[float, ...]

    def read(self, index: int, row: PackedRow, targets: SparseTargets) -> tuple[SparseTargets, Tensor]:
        """The targets `[N]` of a row, and the KL `[N]` of each from the cache's, nats; NaN where there is none.

        Args:
            index: of the row in the cache.
            row: the row.
            targets: `[N]` of the cache.
        """


def open_compared(name: str, cache: Cache, top: int, device: str) -> Compared:
    """What is to be compared: the cache in a folder or at a URL if there is one, else a student.

    Raises:
        KdcacheError: it cannot be opened, or is of other rows or another vocabulary.
    """
    if open_storage(name).size(NAME) is not None:
        return ComparedCache(name, cache)
    return ComparedStudent(name, cache, top, device)


class ComparedStudent:
    """A student, run on each row that is looked at; the largest `top` of its probabilities are its targets."""

    what = "student"

    def __init__(self, name: str, cache: Cache, top: int, device: str) -> None:
        require_students([name])
        self.name, self._cache, self._device = name, cache, find_device(device)
        self._model = load_student(name, cache, self._device, seed=0, trained=False).eval()
        self._head = head_or_none(self._model, self._device)
        self._rule = TopK(k=min(top, cache.manifest.vocab_size))
        self.kl_kind, self.sampled, self.temperatures = kl_kind(cache.manifest), False, cache.manifest.temperatures

    @torch.inference_mode()
    def read(self, index: int, row: PackedRow, targets: SparseTargets) -> tuple[SparseTargets, Tensor]:
        """One forward pass over the row."""
        vocab = self._cache.manifest.vocab_size
        (batch,) = batches(self._cache, [index], 1)
        if not len(targets.count):
            return targets, torch.zeros(0)
        labels = torch.from_numpy(row.labels(len(row.tokens)))
        labels = labels[labels != IGNORE].to(self._device)

        def use(source: LogitSource) -> tuple[SparseTargets, Tensor]:
            figures = measure_targets(source, batch["targets"].to(self._device), labels)
            parts, step = [], max(1, _TILE // vocab)
            for start in range(0, source.positions, step):
                rows = slice(start, min(start + step, source.positions))
                out = torch.empty(rows.stop - start, vocab, dtype=source.dtype, device=source.device)
                tile = source.logits(rows, out)
                parts.append(select(tile, self._rule, labels=labels[rows], temperatures=self.temperatures).to("cpu"))
            kl = figures.get("kl", torch.full(labels.shape, torch.nan))
            return SparseTargets.cat(parts), kl.cpu()

        own, kl = with_logits(self._model, self._head, batch, self._device, vocab, use)
        return own, torch.where(targets.count > 0, kl.double(), torch.nan)


class ComparedCache:
    """The cache of another teacher over the same rows."""

    what = "cache"

    def __init__(self, name: str, cache: Cache) -> None:
        self.name, self._first, self._other = name, cache, open_cache(name, partial=True)
        mine, theirs = cache.manifest, self._other.manifest
        differing = [
            f"{what} ({one} and {two})"
            for what, one, two in (
                ("tokenizer", mine.tokenizer_sha256[:12], theirs.tokenizer_sha256[:12]),
                ("vocab_size", mine.vocab_size, theirs.vocab_size),
                ("seq_len", mine.seq_len, theirs.seq_len),
            )
            if one != two
        ]
        if differing:
            raise ConfigError(f"{cache.storage} and {name} cannot be compared: they differ in {', '.join(differing)}")
        self.kl_kind, self.sampled = _kl_kind_of(mine, theirs), theirs.rule.sampled
        self.temperatures = (theirs.rule.target_temperature,) if self.sampled else theirs.temperatures

    def read(self, index: int, row: PackedRow, targets: SparseTargets) -> tuple[SparseTargets, Tensor]:
        """The same row of the other cache.

        Raises:
            CacheError: it has no such row.
            ConfigError: its row is another one.
        """
        where = self._first.locate(index)
        other, found = self._other.read_packed(self._other.index(*where))
        if not _same_row(row, other):
            raise ConfigError(
                f"row {where[1]} of shard {where[0]} holds other tokens in {self._first.storage} than in {self.name}; "
                "compare caches of one corpus, packed alike"
            )
        return found, coarse_kl(targets, found, self._first.manifest.vocab_size)


def _kl_kind_of(one: Manifest, other: Manifest) -> str:
    kinds = {kl_kind(one), kl_kind(other)}
    if "estimate" in kinds:
        return "unknown"
    return "dense" if kinds == {"dense"} else "lower-bound"


def _same_row(one: PackedRow, other: PackedRow) -> bool:
    return (
        np.array_equal(one.tokens, other.tokens)
        and np.array_equal(one.piece_lengths, other.piece_lengths)
        and np.array_equal(labelled_tokens(one), labelled_tokens(other))
    )


def coarse_kl(p: SparseTargets, q: SparseTargets, vocab_size: int) -> Tensor:
    """`[N]` float64 KL(p ‖ q) at T = 1 over the ids that both keep and one bucket of all others: a lower bound.

    NaN where either has no target, and everywhere if either is sampled.
    """
    if p.log_tail is None or q.log_tail is None:
        return torch.full(p.count.shape, torch.nan, dtype=torch.float64)
    there, place = _find(p, q, vocab_size)
    logs = torch.where(p.valid, p.logprobs.double(), -torch.inf)
    mine = torch.where(there, logs, -torch.inf)
    theirs = torch.where(there, q.logprobs.double().gather(-1, place), 0.0)
    taken = torch.zeros(q.ids.shape, dtype=torch.bool).scatter_reduce(-1, place, there, "amax")
    rest_p = _rest(torch.where(there, -torch.inf, logs), p)
    rest_q = _rest(torch.where(q.valid & ~taken, q.logprobs.double(), -torch.inf), q)
    kept = torch.where(there, mine.exp() * (mine - theirs), 0.0).sum(-1)
    bucket = torch.where(torch.isneginf(rest_p), 0.0, rest_p.exp() * (rest_p - rest_q))
    return torch.where((p.count > 0) & (q.count > 0), kept + bucket, torch.nan)


def _rest(others: Tensor, targets: SparseTargets) -> Tensor:
    """`[N]` log of the mass of some entries `[N, K]` and the tail."""
    assert targets.log_tail is not None
    tail = targets.log_tail[..., targets.temperatures.index(1.0)].double()
    return torch.cat([others, tail[..., None]], -1).logsumexp(-1)


def _find(p: SparseTargets, q: SparseTargets, vocab_size: int) -> tuple[Tensor, Tensor]:
    """`[N, K]` whether q keeps each entry of p, and where among its entries."""
    base = torch.arange(len(q.count))[:, None] * (vocab_size + 1)
    keys = base + torch.where(q.valid, q.ids, vocab_size)  # those past `count` behind all others
    keys, order = keys.sort(-1)
    wanted = base + torch.where(p.valid, p.ids, -1)
    flat = torch.searchsorted(keys.flatten(), wanted.flatten()).clamp(max=keys.numel() - 1).view(wanted.shape)
    there = p.valid & (keys.flatten()[flat] == wanted)
    place = order.flatten()[flat]
    return there, torch.where(there, place, 0)
