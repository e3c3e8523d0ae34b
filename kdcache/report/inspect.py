"""Inspect: a summary, a row, or a position of a cache, as plain values.

A summary reads no rows: it comes from the commits, which a sealed cache has in one object. Text is decoded with the
cache's own tokenizer. Nothing but the cache is opened.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from kdcache.cache import Cache, Row, open_cache, unpack
from kdcache.errors import CacheError, TargetError
from kdcache.lazy_torch import torch
from kdcache.rows import IGNORE, PackedRow
from kdcache.store.commit import quantiles
from kdcache.store.commits import Commits
from kdcache.store.manifest import Manifest
from kdcache.store.target_sums import TargetSums
from kdcache.targets import SparseTargets

_CONTEXT_TOKENS = 32
_WINDOW = 8  # tokens that decide how the next one reads


Progress = Callable[[int, int], None]
"""Called with rows read and rows to read."""


def inspect_summary(
    path: str, shard: int | None = None, *, exact: bool = False, on_progress: Progress | None = None
) -> dict[str, Any]:
    """What a cache, or one shard of it, holds. A cache that is still being dumped may be looked at.

    Means are over the positions that carry a target, `entropy_quantiles` over all labelled ones. A mean is None where
    the cache does not know it. The figures come from the sums in the commits, which are of the targets before they were
    rounded; with `exact` every row is read, and they are of the targets as students get them. The two differ by no more
    than the codec rounds a scalar.

    Args:
        path: folder or URL of the cache.
        shard: summarise this shard alone.
        exact: read every row.
        on_progress: called now and then while rows are read.

    Raises:
        CacheError: no cache there, or no such shard.
        CorruptCacheError: a commit is damaged, or (with `exact`) a row.
    """
    cache = open_cache(path, partial=True)
    return {**describe_cache(cache, shard, exact=exact, on_progress=on_progress), "cache": path}


def describe_cache(
    cache: Cache, shard: int | None = None, *, exact: bool = False, on_progress: Progress | None = None
) -> dict[str, Any]:
    """The same of an open cache."""
    manifest, path = cache.manifest, str(cache.storage)
    if shard is not None and shard not in cache.commits:
        raise CacheError(f"{path} has no committed shard {shard}; it has {len(cache.commits)} of {manifest.shards}")
    chosen = cache if shard is None else cache.only([shard])
    commits = chosen.commits
    total = {name: commits.total(name) for name in ("rows", "tokens", "pieces", "labels", "positions", "entries")}
    at_one = manifest.temperatures.index(1.0)
    if exact:
        sums = _read_sums(chosen, on_progress)
        tail_mass = sums["tail_mass"] and sums["tail_mass"][at_one]
    else:
        sums = {name: commits.sum(name) for name in ("entropy", "label_logprob")}
        tail_mass = commits.sum("tail_mass", at_one)
    positions = max(1, total["positions"])
    tail, entropy, label = (
        None if value is None else value / positions for value in (tail_mass, sums["entropy"], sums["label_logprob"])
    )
    histogram = commits.histogram()
    return {
        "cache": path,
        "shard": shard,
        "complete": not cache.missing(),
        "shards": {"planned": manifest.shards, "committed": len(cache.commits)},
        **total,
        **commits.of_documents(),
        "entries_per_position": _range_of_entries(commits),
        "bytes": commits.bytes,
        "bytes_per_position": commits.bytes / positions,
        "mean_kept_mass": None if tail is None else 1 - tail,
        "mean_tail": tail,
        "mean_entropy": entropy,
        "teacher_nll": None if label is None else 0.0 - label,
        "entropy_quantiles": None if histogram is None else quantiles(histogram),
        "exact": exact,
        "teacher": manifest.origin.get("teacher"),
        "corpus": manifest.origin.get("corpus"),
        "generated": manifest.origin.get("generated"),
        "selection": manifest.selection,
        "known": manifest.known.to_fields(),
        "position_choice": manifest.positions,
        "temperatures": list(manifest.temperatures),
        "precision": manifest.precision,
        "extras": _extras(manifest, total["tokens"], total["labels"]),
        "teacher_context": manifest.teacher_context or None,
        "seq_len": manifest.seq_len,
        "vocab_size": manifest.vocab_size,
    }


def _extras(manifest: Manifest, tokens: int, labels: int) -> list[dict[str, Any]]:
    """Each extra: its name, what it holds, and the bytes of its vectors before compression."""
    found = []
    for name, spec in manifest.extra_specs.items():
        vector = sum(math.prod(shape) * dtype.itemsize for dtype, shape in spec.shapes(1).values())
        found.append({"name": name, **spec.to_fields(), "bytes": vector * (tokens if spec.per == "token" else labels)})
    return found


def _read_sums(cache: Cache, on_progress: Progress | None) -> dict[str, Any]:
    """The sums over the targets of all rows, each row read."""
    sums = TargetSums()
    for number, (_, targets) in enumerate(cache.read_rows(range(len(cache))), 1):
        sums.add(targets)
        if on_progress:
            on_progress(number, len(cache))
    return sums.fields()


def _range_of_entries(commits: Commits) -> dict[str, int]:
    """The least and the most entries of a target."""
    has = commits.column("positions") > 0
    least, most = commits.column("least_entries")[has], commits.column("most_entries")[has]
    return {"least": int(least.min()) if has.any() else 0, "most": int(most.max(initial=0))}


def inspect_row(path: str, row: int, shard: int | None = None) -> dict[str, Any]:
    """A row as text: each token with the probability that the teacher gave it, where there is a target.

    `teacher_read` says of each piece before which the teacher read more, what that was: `piece`, `tokens` and `text`,
    and how many of the piece's first tokens it `replaced`.
    """
    return {**describe_row(*_find(path, row, shard)), "cache": path}


def describe_row(cache: Cache, index: int) -> dict[str, Any]:
    """The same of a row of an open cache."""
    shard, row, value, packed = _read(cache, index)
    tokenizer = cache.load_tokenizer()
    ids = value.tokens[value.segments >= 0].tolist()
    starts = [
        int((value.segments < piece).logical_and(value.segments >= 0).sum()) for piece in range(len(value.documents))
    ]
    tokens = []
    for slot in range(len(ids)):
        has_target = slot > 0 and int(value.targets.count[slot - 1]) > 0
        logprob = _number(value.targets.label_logprob, slot - 1) if has_target else None
        segment = int(value.segments[slot])
        tokens.append({
            "position": slot, "id": ids[slot], "text": added_text(tokenizer, ids[starts[segment] : slot], ids[slot]),
            "piece": segment, "document": int(value.documents[segment]), "logprob": logprob,
        })  # fmt: skip
    read = [teacher_read(tokenizer, packed, piece) for piece in range(len(value.documents))]
    return {
        "cache": str(cache.storage),
        "shard": shard,
        "row": row,
        "pieces": len(value.documents),
        "teacher_read": [{"piece": piece, **one} for piece, one in enumerate(read) if one is not None],
        "tokens": tokens,
    }


def teacher_read(tokenizer: Any, packed: PackedRow, piece: int) -> dict[str, Any] | None:
    """What the teacher alone read before a piece, and how many of the piece's tokens it read that in place of.

    None where it read nothing more.
    """
    prefix = packed.prefix(piece)
    if not prefix.content:
        return None
    return {"tokens": len(prefix.tokens), "text": tokenizer.decode(prefix.tokens), "replaced": prefix.replaced}


def inspect_position(
    path: str, row: int, position: int, shard: int | None = None, top: int = 10, temperature: float = 1.0
) -> dict[str, Any]:
    """One position: its context, the true next token, and the entries of its target.

    `probability` and `tail` are at `temperature`; `logprob` and `weight` are as stored, `logprob` at T = 1. Of a
    sampled target only the weight is always known: an entry that was drawn has no `logprob` and no `probability`,
    and there is no `tail`. What else the cache does not know is None. Where the position carries
    no target, `no_target` says why. `teacher_read` is what the teacher alone read before the piece, as in
    `inspect_row`, or None.

    Raises:
        CacheError: no such row or position.
        TargetError: a temperature that the cache cannot give exactly.
    """
    found = describe_position(*_find(path, row, shard), position, top, temperature)
    return {**found, "cache": path}


def describe_position(
    cache: Cache, index: int, position: int, top: int = 10, temperature: float = 1.0
) -> dict[str, Any]:
    """The same of a position of an open cache."""
    shard, row, value, packed = _read(cache, index)
    tokenizer = cache.load_tokenizer()
    used = int((value.segments >= 0).sum())
    if not 0 <= position < used:
        raise CacheError(f"row {row} of shard {shard} has positions 0 to {used - 1}, not {position}")
    segment = int(value.segments[position])
    inside = value.tokens[: position + 1][value.segments[: position + 1] == segment].tolist()
    label_id = int(value.labels[position])

    def named(token: int) -> dict[str, Any]:
        return {"id": token, "text": added_text(tokenizer, inside, token)}

    found: dict[str, Any] = {
        "cache": str(cache.storage),
        "shard": shard,
        "row": row,
        "position": position,
        "document": int(value.documents[segment]),
        "context": tokenizer.decode(inside[-_CONTEXT_TOKENS:]),
        "teacher_read": teacher_read(tokenizer, packed, segment),
        "token": {"id": inside[-1], "text": added_text(tokenizer, inside[:-1], inside[-1])},
        "label": None,
        "temperature": temperature,
        "entropy": None,
        "tail": None,
        "kept": 0,
        "entries": [],
        "no_target": None,
    }
    if label_id == IGNORE:
        return {**found, "no_target": "the next token is not in this piece, or is masked"}
    label = {**named(label_id), "logprob": None}
    if not value.targets.count[position]:
        above = cache.manifest.position_filter.above or 0.0
        why = f"the teacher's entropy here is not above {above:g} nats (positions {cache.manifest.positions})"
        return {**found, "label": label, "no_target": why}
    targets = value.targets[position : position + 1]
    logprobs, log_tail = _at(targets, temperature)
    count = int(targets.count[0])
    order = targets.weights[0, :count].argsort(descending=True, stable=True)[:top].tolist()
    found.update(
        label={**label, "logprob": _number(targets.label_logprob, 0)},
        entropy=_number(targets.entropy, 0),
        tail=None if log_tail is None else float(log_tail[0].exp()),
        kept=count,
        entries=[
            {
                **named(int(targets.ids[0, i])),
                "logprob": _known(targets.logprobs[0, i]), "probability": _known(logprobs[0, i].exp()),
                "weight": float(targets.weights[0, i]),
            }
            for i in order
        ],
    )  # fmt: skip
    return found


def _at(targets: SparseTargets, temperature: float) -> tuple[torch.Tensor, torch.Tensor | None]:
    """log p_T of the entries, NaN where a sampled target has a weight alone; and of the tail, if it has one."""
    if not targets.sampled:
        return targets.at_temperature(temperature)
    if temperature not in targets.temperatures:
        raise TargetError(f"temperature {temperature:g} is not among those that the cache stores")
    partition = targets.log_partition[..., targets.temperatures.index(temperature), None]
    return targets.logprobs / temperature - partition, None


def _number(values: torch.Tensor | None, place: int) -> float | None:
    return None if values is None else float(values[place])


def _known(value: torch.Tensor) -> float | None:
    return None if torch.isnan(value) else float(value)


def added_text(tokenizer: Any, before: list[int], token: int) -> str:
    """What a token adds to the text before it, its leading space included."""
    window = before[-_WINDOW:]
    start, both = tokenizer.decode(window), tokenizer.decode([*window, token])
    return str(both[len(start) :] if both.startswith(start) else tokenizer.decode([token]))


def beside(path: str, row: int, position: int | None, shard: int | None, step: int) -> tuple[int, int | None]:
    """The row beside a row, or the position with a target beside a position, in the same row or one further on.

    Args:
        path: folder or URL of the cache.
        row: counted in the shard or in the whole cache.
        position: of the row; None for rows.
        shard: rows of this shard alone; None for all.
        step: 1 for what follows, -1 for what precedes.

    Returns:
        row, and position or None.

    Raises:
        CacheError: no such row, or nothing more on that side.
    """
    cache, index = _find(path, row, shard)
    first, rows = (0, len(cache)) if shard is None else (cache.index(shard, 0), cache.commits[shard].rows)
    side, where = ("after", "last") if step > 0 else ("before", "first")
    if position is None:
        if not first <= index + step < first + rows:
            raise CacheError(f"row {row} is the {where}; there is none {side} it")
        return row + step, None
    while first <= index < first + rows:
        packed, targets = cache.read_packed(index)
        slots = np.flatnonzero(packed.labels(cache.manifest.seq_len) != IGNORE)[(targets.count > 0).numpy()]
        found = slots[slots > position] if step > 0 else slots[slots < position]
        if len(found):
            return index - first, int(found[0 if step > 0 else -1])
        index, position = index + step, -1 if step > 0 else cache.manifest.seq_len
    raise CacheError(f"there is no position with a target {side} this one")


def _find(path: str, row: int, shard: int | None) -> tuple[Cache, int]:
    """The cache, and the cache-wide number of a row that is counted in the shard or in the whole cache."""
    cache = open_cache(path, partial=True)
    index = row if shard is None else cache.index(shard, row)
    if not 0 <= index < len(cache):
        raise CacheError(f"{path} has rows 0 to {len(cache) - 1}, not {row}")
    return cache, index


def _read(cache: Cache, index: int) -> tuple[int, int, Row, PackedRow]:
    """Shard, number inside it, and values of a row."""
    packed, targets = cache.read_packed(index)
    return *cache.locate(index), unpack(packed, targets, cache.manifest.seq_len), packed
