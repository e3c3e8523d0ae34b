"""The pilot: what must be known before the first shard, from the first rows of the corpus only.

Run by whoever creates the cache and kept in its manifest; everyone else reads it there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from kdcache.codec.id_ranks import FrequencyOrder
from kdcache.errors import ConfigError
from kdcache.rows import PackedRow
from kdcache.selection import Selection, select
from kdcache.store.manifest import Manifest
from kdcache.teacher.engines.base import TargetRequest
from kdcache.teacher.inputs import Inputs
from kdcache.teacher.opened_teacher import OpenedTeacher

_POSITIONS = 1 << 14
_CHEAPEST = Selection(k=1)


def run_pilot(teacher: OpenedTeacher, inputs: Inputs) -> Manifest:
    """The manifest, with the settings and the order of ids that it asks for.

    Cost: for each of the two, a forward pass over about 16 thousand positions; nothing where neither is wanted.
    """
    manifest = inputs.manifest
    if manifest.rule.needs_pilot:
        manifest = dataclasses.replace(manifest, selection=_fitted(teacher, inputs).to_fields())
        manifest = dataclasses.replace(manifest, error_bound=manifest.codec.error_bound)
    if manifest.codec.orders_ids:
        manifest = dataclasses.replace(manifest, id_order=_id_order(teacher, inputs, manifest))
    return manifest


def _rows(inputs: Inputs) -> Iterator[PackedRow]:
    return (row for shard in range(inputs.manifest.shards) for row in inputs.shard_rows(shard).rows)


def _fitted(teacher: OpenedTeacher, inputs: Inputs) -> Selection:
    """The selection with the settings that its kind finds from positions that carry a target."""
    rule, positions = inputs.manifest.rule, inputs.manifest.position_filter
    read = kept = 0

    def tiles() -> Iterator[torch.Tensor]:
        nonlocal read, kept
        for row in _rows(inputs):
            for logits in teacher.logits([row]):
                read += len(logits)
                carries = None
                if positions.above is not None:
                    carries = positions.mask(select(logits, _CHEAPEST))
                part = logits if carries is None else logits[carries]
                kept += len(part)
                yield part
            if read >= _POSITIONS:
                break
        if read and not kept:
            raise ConfigError(
                f"positions {positions.rule} leaves none of the first {read} positions to find "
                f"{', '.join(rule.pilot_settings)} by; lower X"
            )

    return rule.fit(tiles())


def _id_order(teacher: OpenedTeacher, inputs: Inputs, manifest: Manifest) -> tuple[int, ...]:
    """Ids that the teacher proposes, most often first."""
    order = FrequencyOrder(manifest.vocab_size)
    request = dataclasses.replace(TargetRequest.of(manifest), extras=())
    for row in _rows(inputs):
        if not order.add(manifest.position_filter.apply(teacher.targets([row], request).targets)):
            break
    return order.ids()
