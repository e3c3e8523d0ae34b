"""Payload: rows and their targets as few bytes, for the page to unpack.

A payload is a JSON object: `arrays` names its arrays of whole numbers, each with its length and its bytes a number, and
`data` holds them: byte planes of all arrays in order, deflated, in base64. `page/unpack.js` is the other side.

    tokens    [n] place in the table of texts
    slots     [n] 0 without a label, 1 labelled without a target, 2 with a target
    count     [M] entries that the cache keeps;  shown  [M] those of the payload, the heaviest
    entropy   [M] nats;  surprise  [M] nats of the true next token; 0 where unknown, else 1 + 2048 x
    tail.i    [M] log of tail over kept mass at the i-th stored temperature
    hidden.i  [M] the same of the entries that are not shown over those that are
    ids       [E] place in the table of texts, by position, the heaviest first
    nats      [E] 2048 x -log p (of a sampled target, of its weight), as the rise over the entry before
    own       [E] of sampled targets: 1 where an entry holds the teacher's own probability
    kl        [M] of what is compared: nats, coded like a ratio

A ratio is 0 where there is no such mass, else 1 + the zigzag of 1024 x. What a page shows is therefore exact to
half a step: a share to one part in two thousand.

Shapes: n tokens of a row, M positions with a target, E entries shown of all of them.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.lazy_torch import torch
from kdcache.rows import PackedRow, labelled_tokens
from kdcache.targets import SparseTargets

NATS, RATIO, ENTRY = 2048, 1024, 2048
"""Steps a nat of scalars, of ratios, and of entries."""

Arrays = dict[str, NDArray[np.integer[Any]]]

_LEVEL = 9
_MOST = float(1 << 20)
"""Nats; more is written as this."""


def pack(arrays: Arrays) -> dict[str, Any]:
    """Arrays of whole numbers, none negative, as the `arrays` and `data` of a payload."""
    named, planes = [], []
    for name, values in arrays.items():
        most = int(values.max(initial=0))
        width = next(w for w in (1, 2, 3, 4) if most < 1 << 8 * w)
        planes.append(values.astype("<u4").view(np.uint8).reshape(-1, 4).T[:width].tobytes())
        named.append([name, len(values), width])
    data = zlib.compress(b"".join(planes), _LEVEL)
    return {"arrays": named, "data": base64.b64encode(data).decode()}


def row_arrays(row: PackedRow, targets: SparseTargets) -> Arrays:
    """`tokens` and `slots` of a row; tokens as ids."""
    slots = np.zeros(len(row.tokens), np.int64)
    slots[labelled_tokens(row)] = 1 + (targets.count.numpy() > 0)
    return {"tokens": row.tokens.astype(np.int64), "slots": slots}


def target_arrays(targets: SparseTargets, labels: NDArray[np.int64], top: int) -> Arrays:
    """All other arrays of targets; `ids` as ids.

    Args:
        targets: `[N]` of the labelled slots of a row; those with `count` 0 are left out.
        labels: `[N]` the true next tokens.
        top: entries to show of a position, at most.
    """
    has = targets.count > 0
    labels, targets = labels[has.numpy()], targets[has]
    count = targets.count.numpy()
    weights = torch.where(targets.valid, targets.weights.double(), -1.0)
    order = weights.argsort(dim=-1, descending=True, stable=True)
    ids = targets.ids.gather(-1, order).numpy()
    shown = np.minimum(count, top)
    inside = np.arange(ids.shape[1]) < shown[:, None]  # [M, K] the first `shown` in order
    logs = (weights.log() if targets.sampled else targets.logprobs.double()).gather(-1, order)  # [M, K]
    valid = targets.valid  # those in use come first in either order
    arrays: Arrays = {
        "count": count,
        "shown": shown,
        "entropy": _nats(targets.entropy),
        "surprise": _nats(_surprise(targets, labels)),
    }
    temperatures = (targets.sample_temperature,) if targets.sampled else targets.temperatures
    for number, temperature in enumerate(temperatures):
        softened = logs if targets.sampled else logs / temperature
        seen, rest = (
            torch.where(which, softened, -torch.inf).logsumexp(-1)
            for which in (torch.from_numpy(inside), valid & ~torch.from_numpy(inside))
        )
        arrays[f"hidden.{number}"] = ratio(rest - seen)
        if not targets.sampled:
            entries, tail = targets.at_temperature(temperature)
            kept = torch.where(valid, entries.double().gather(-1, order), -torch.inf).logsumexp(-1)
            arrays[f"tail.{number}"] = ratio(tail.double() - kept)
    nats = np.round(ENTRY * np.clip(-np.where(inside, logs.numpy(), 0.0), 0, _MOST)).astype(np.int64)
    nats = np.maximum.accumulate(nats, axis=1)  # equal but for rounding
    arrays["ids"] = ids[inside]
    arrays["nats"] = np.diff(nats, axis=1, prepend=0)[inside]
    if targets.sampled:
        arrays["own"] = (~torch.isnan(targets.logprobs.gather(-1, order))).numpy()[inside].astype(np.int64)
    return arrays


def _surprise(targets: SparseTargets, labels: NDArray[np.int64]) -> torch.Tensor:
    """`[M]` -log p of the true next token; NaN where neither the targets name it nor an entry has it."""
    found = torch.where((targets.ids == torch.from_numpy(labels)[:, None]) & targets.valid, targets.logprobs, torch.nan)
    of_entry = torch.nan_to_num(found, nan=-torch.inf).amax(-1).double()
    of_entry = torch.where(torch.isneginf(of_entry), torch.nan, of_entry)
    if targets.label_logprob is None:
        return -of_entry
    return -torch.where(torch.isnan(targets.label_logprob), of_entry, targets.label_logprob.double())


def _nats(values: torch.Tensor | None) -> NDArray[np.int64]:
    if values is None:
        return np.zeros(0, np.int64)
    numbers = values.double().numpy()
    steps = np.round(NATS * np.clip(np.nan_to_num(numbers), 0, _MOST)).astype(np.int64)
    return np.where(np.isnan(numbers), 0, 1 + steps)


def ratio(values: torch.Tensor) -> NDArray[np.int64]:
    """`[M]` numbers of either sign as a payload writes them; -inf and NaN as 0."""
    numbers = values.double().numpy()
    steps = np.round(RATIO * np.clip(np.nan_to_num(numbers), -_MOST, _MOST)).astype(np.int64)
    zigzag = np.where(steps < 0, -2 * steps - 1, 2 * steps)
    return np.where(np.isfinite(numbers), 1 + zigzag, 0)


def with_places(arrays: Arrays, places: Mapping[int, int]) -> Arrays:
    """The same with the ids of tokens as places in a table of texts."""
    return {
        name: np.array([places[int(i)] for i in values], np.int64) if name in ("tokens", "ids") else values
        for name, values in arrays.items()
    }
