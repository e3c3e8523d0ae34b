"""Faithfulness: whether a cache holds what its teacher gives, on rows drawn at random.

The teacher reads the stored tokens of a row and its targets are made again, twice: once to compare with the
stored ones, once as the control, which shows how much two runs of the same rows differ on this machine.

    total_variation  sum |w - w'| / 2 over all ids, at each position: 0 for the same target, 1 for disjoint ones.
                     A token shifted by one or the targets of another row give values near 1.
    entropy, label_logprob  absolute difference, nats; absent where the cache does not know them
    choice           1 where one of the two gives a labelled slot a target and the other does not; the
                     other figures are over those that carry one

Storage in few bits and other hardware move the stored targets a little; `agrees` allows the mean total variation and
the mean choice of the control plus 0.05.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.cache import Cache, open_cache
from kdcache.errors import ConfigError
from kdcache.targets import SparseTargets
from kdcache.teacher.engines.base import TargetRequest, TeacherSpec, require_answerable
from kdcache.teacher.open_teacher import open_teacher_of
from kdcache.teacher.opened_teacher import OpenedTeacher

_ALLOWED = 0.05
_TILE_LOGITS = 1 << 22


def check_faithfulness(
    path: str | os.PathLike[str],
    teacher: str,
    rows: int = 32,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    engine: str = "transformers",
    engine_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run the teacher again over some rows of a cache.

    Args:
        path: folder or URL of the cache.
        teacher: folder, .gguf file or hub name of the model that made it.
        rows: how many, drawn without replacement.
        seed: of the draw.
        device, dtype, engine: as for a dump.
        engine_options: `engine_python`, `engine_set` and `tokenizer`, see `TeacherSpec`.
        on_progress: called with (rows done, rows to do).

    Returns:
        `rows`, `positions`, `agrees`, and `stored` and `control`: mean and worst of each difference.

    Raises:
        ModelError: the teacher is not the one whose fingerprint the manifest names.
        KdcacheError: see the exception tree.
    """
    if rows < 1:
        raise ConfigError(f"rows is {rows}, but must be at least 1")
    cache = open_cache(path, partial=True)
    spec = TeacherSpec(model=teacher, engine=engine, device=device, dtype=dtype, **(engine_options or {}))
    with open_teacher_of(spec, cache.manifest, path) as opened:
        return _compare(cache, opened, rows, seed, on_progress)


def _compare(
    cache: Cache, teacher: OpenedTeacher, rows: int, seed: int, on_progress: Callable[[int, int], None] | None
) -> dict[str, Any]:
    require_answerable(teacher.engine, TargetRequest.of(cache.manifest), cache.manifest.position_filter)
    wanted_rows = sorted(np.random.default_rng(seed).permutation(len(cache))[:rows].tolist())
    found: dict[str, list[dict[str, Tensor]]] = {"stored": [], "control": []}
    for done, index in enumerate(wanted_rows):
        if on_progress:
            on_progress(done, len(wanted_rows))
        stored, fresh, again = _three_targets(cache, teacher, index)
        has_target, rule = stored.count > 0, cache.manifest.position_filter
        wanted, mine_again = (rule.mask(each) for each in (fresh, again))
        for name, one, mine in (("stored", stored, has_target), ("control", again, mine_again)):
            part = differences(one[has_target], fresh[has_target], cache.manifest.vocab_size)
            if mine is not None and wanted is not None:
                part["choice"] = (mine != wanted).float()
            found[name].append(part)
    figures = {name: _summary(parts) for name, parts in found.items()}
    positions = sum(len(part["total_variation"]) for part in found["stored"])
    agrees = all(
        figures["stored"][name]["mean"] <= control["mean"] + _ALLOWED
        for name, control in figures["control"].items()
        if name in ("total_variation", "choice")
    )
    return {"rows": len(wanted_rows), "positions": positions, "agrees": agrees, **figures}


def _three_targets(
    cache: Cache, teacher: OpenedTeacher, index: int
) -> tuple[SparseTargets, SparseTargets, SparseTargets]:
    """The stored targets of a row's labelled slots, and two fresh ones of all of them, whatever the position filter."""
    (shard, row), request = cache.locate(index), dataclasses.replace(TargetRequest.of(cache.manifest), extras=())
    packed, stored = cache.read_packed(index)
    fresh, again = (teacher.targets([packed], request, shard=shard, first_row=row).targets for _ in range(2))
    return stored, fresh, again


def differences(one: SparseTargets, two: SparseTargets, vocab_size: int) -> dict[str, Tensor]:
    """How much two targets of the same positions differ, `[N]` each."""
    step, parts = max(1, _TILE_LOGITS // vocab_size), []
    for start in range(0, len(one.count), step):
        dense = [
            torch.zeros(len(part.count), vocab_size).scatter_add_(-1, part.ids.long(), part.weights)
            for part in (one[start : start + step], two[start : start + step])
        ]
        parts.append((dense[0] - dense[1]).abs().sum(-1) / 2)
    found = {"total_variation": torch.cat(parts) if parts else torch.zeros(0)}
    for name in ("entropy", "label_logprob"):
        mine, other = getattr(one, name), getattr(two, name)
        if mine is not None and other is not None:
            found[name] = (mine - other).abs()
    return found


def _summary(parts: list[dict[str, Tensor]]) -> dict[str, dict[str, float]]:
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {name: {"mean": float(x.mean()), "worst": float(x.max())} for name, x in joined.items() if len(x)}
