"""Pieces: the rows of a cache as single sequences, for tools that know no packed rows.

A piece of a row is a sequence of its own, and its targets are those of its slots, so nothing crosses a boundary.

Shapes: n tokens of a piece, m slots of it that carry a target, K entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.cache import Cache
from kdcache.rows import IGNORE, PackedRow
from kdcache.store.manifest import Manifest
from kdcache.targets import SparseTargets

ABSENT = -1e4
"""The log-probability of an entry that is not there, where a tool needs one: its probability is 0 in every dtype."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One piece of a row.

    Attributes:
        tokens: `[n]` its tokens.
        slots: `[m]` its slots that carry a target, counted from its first token.
        ids: `[m, K]` ids of the entries.
        values: `[m, K]` log p of each, or of sampled targets the log of its weight; -inf past `count`.
        count: `[m]` entries in use.
        label_logprob: `[m]` log p of the true next token; None where the cache does not know it.
    """

    tokens: NDArray[np.int64]
    slots: NDArray[np.int64]
    ids: NDArray[np.int64]
    values: NDArray[np.float64]
    count: NDArray[np.int64]
    label_logprob: NDArray[np.float64] | None


def entry_values(targets: SparseTargets) -> NDArray[np.float64]:
    """`[m, K]` log p of the entries, of sampled targets the log of their weights; -inf past `count`."""
    kept = targets.weights.double().log() if targets.sampled else targets.logprobs.double()
    return kept.masked_fill(~targets.valid, -torch.inf).numpy()


def slots_with_targets(packed: PackedRow, targets: SparseTargets) -> tuple[NDArray[np.int64], SparseTargets]:
    """The slots of a row that carry a target, and their targets, of the targets of all its labelled slots."""
    carries = (targets.count > 0).numpy()
    labelled = np.flatnonzero(packed.labels(len(packed.tokens)) != IGNORE)
    return labelled[carries], targets[torch.from_numpy(carries)]


def pieces_of(cache: Cache) -> Iterator[list[Piece]]:
    """The pieces of each row that have a target, row after row."""
    for packed, targets in cache.read_rows(range(len(cache))):
        slots, kept = slots_with_targets(packed, targets)
        values, ids, count = entry_values(kept), kept.ids.numpy().astype(np.int64), kept.count.numpy()
        label = None if kept.label_logprob is None else kept.label_logprob.double().numpy()
        ends = np.cumsum(packed.piece_lengths)
        found = []
        for start, end in zip(ends - packed.piece_lengths, ends, strict=True):
            here = (slots >= start) & (slots < end)
            if here.any():
                found.append(
                    Piece(
                        tokens=packed.tokens[start:end].astype(np.int64), slots=slots[here] - start, ids=ids[here],
                        values=values[here], count=count[here], label_logprob=None if label is None else label[here],
                    )
                )  # fmt: skip
        yield found


def filled(piece: Piece, width: int, vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """`[n - 1, width]` ids and values of every slot but the last, each with `width` different ids.

    An entry that is not there has an id that the slot does not have, and the value `ABSENT`.
    """
    slots = len(piece.tokens) - 1
    ids, values = np.zeros((slots, width), np.int64), np.full((slots, width), ABSENT)
    count = np.zeros(slots, np.int64)
    ids[piece.slots], values[piece.slots], count[piece.slots] = piece.ids, piece.values, piece.count
    unused = np.arange(width) >= count[:, None]
    values[unused] = ABSENT
    for slot in np.flatnonzero(unused.any(-1)):
        own = ids[slot, : count[slot]]
        others = np.setdiff1d(np.arange(min(vocab_size, 2 * width)), own)[: width - count[slot]]
        ids[slot, count[slot] :] = others
    return ids, values


def sampled_lost(manifest: Manifest) -> list[str]:
    """What is lost of sampled targets by a format of log-probabilities."""
    if not manifest.rule.sampled:
        return []
    return [
        f"that the weights of {manifest.rule.kind} are estimates: the log of a weight stands where a log-probability "
        "is expected, and adds up to the whole mass"
    ]
