"""Other selections: what a cache of the same rows would take with them, from logits made once for all of them.

Cost: one forward pass over the rows, and one over those of a pilot, beside a selection for each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdcache.codec.id_ranks import FrequencyOrder
from kdcache.errors import ConfigError
from kdcache.planning.sample import Sample
from kdcache.planning.trial import MEASURED, WARM, Sizes, Trial
from kdcache.rows import PackedRow
from kdcache.selection import Selection, select
from kdcache.selection.ipps import Ipps
from kdcache.selection.target_faults import drop_unknown
from kdcache.selection.topk import TopK
from kdcache.selection.topp import TopP
from kdcache.store.commit import Commit
from kdcache.store.manifest import Manifest
from kdcache.targets import SparseTargets
from kdcache.teacher.config import PlanOptions
from kdcache.teacher.engines.base import TargetRequest, require_answerable
from kdcache.teacher.engines.batch import Batch
from kdcache.teacher.inputs import Inputs
from kdcache.teacher.opened_teacher import OpenedTeacher

OTHERS: tuple[Selection, ...] = (TopK(k=12), TopK(k=64), TopK(k=128), Ipps(k=12), TopP(top_p=0.9))
"""What the chosen selection is set beside."""


def name_of(rule: Selection) -> str:
    """A selection in a word and a number."""
    fields = rule.to_fields()
    size = next((fields[name] for name in ("top_p", "draws", "k") if fields.get(name) is not None), None)
    return rule.kind if size is None else f"{rule.kind} {size:g}"


@dataclass
class Other:
    """A selection beside the chosen one.

    Attributes:
        rule: the selection.
        problem: why it cannot be had here, in one sentence; None where it can.
        sizes: what it takes.
    """

    rule: Selection
    problem: str | None = None
    sizes: Sizes | None = None


def measure_others(
    options: PlanOptions,
    teacher: OpenedTeacher,
    inputs: Inputs,
    sample: Sample,
    batches: Sequence[Sequence[PackedRow]],
    like: Sequence[Commit],
    folder: Path,
) -> list[Other]:
    """What the rows of some batches take with each of the other selections.

    Args:
        options: of the plan.
        teacher: that is open.
        inputs: whose manifest says everything but the selection.
        sample: whose first rows are those of a pilot.
        batches: the rows.
        like: the commits of the warm and the measured shard of the chosen selection.
        folder: for caches that are thrown away.
    """
    chosen = inputs.manifest.rule
    found = [Other(rule) for rule in OTHERS]
    found = [other for other in found if not other.rule.same_but_for_pilot(chosen)]
    manifests: list[tuple[Other, Manifest]] = []
    for other in found:
        try:
            manifests.append((other, _manifest(options, teacher, inputs, other.rule)))
        except ConfigError as error:
            other.problem = str(error)
    if not manifests:
        return found
    if not teacher.engine.knows.whole_vocabulary:  # it gives entries of the chosen selection, and no logits
        for other, _ in manifests:
            other.problem = f"the engine {teacher.engine.name} gives no logits to select from"
        return found
    orders = _orders(teacher, sample, [manifest for _, manifest in manifests])
    trials = []
    for i, ((_, manifest), order) in enumerate(zip(manifests, orders, strict=True)):
        trials.append(Trial(folder / str(i), dataclasses.replace(manifest, id_order=order)))
    requests = [TargetRequest.of(trial.writer.manifest) for trial in trials]
    rows: list[PackedRow] = []
    targets: list[list[SparseTargets]] = [[] for _ in trials]
    for batch in batches:
        parts, counts = _select_all(teacher, batch, requests, MEASURED, len(rows))
        rows += batch
        for kept, part in zip(targets, parts, strict=True):
            kept += part.split(counts)
    for (other, _), trial, each in zip(manifests, trials, targets, strict=True):
        warm = len(batches[0])
        trial.write(WARM, rows[:warm], each[:warm], like[0])
        trial.write(MEASURED, rows, each, like[1])
        other.sizes = trial.sizes()
    return found


def _manifest(options: PlanOptions, teacher: OpenedTeacher, inputs: Inputs, rule: Selection) -> Manifest:
    """What a cache of another selection would be.

    Raises:
        ConfigError: it cannot be had with these options, this teacher or this engine.
    """
    temperatures = options.stored_temperatures
    rule.width(inputs.manifest.vocab_size)
    manifest = dataclasses.replace(
        inputs.manifest,
        selection=rule.to_fields(),
        known=teacher.engine.knows.known(rule, temperatures),
        seed=0 if rule.random_shape is None else options.seed,
        precision=options.precision or rule.precision,
        id_order=(),
        extras={},
    )
    manifest = dataclasses.replace(manifest, error_bound=manifest.codec.error_bound)
    require_answerable(teacher.engine, TargetRequest.of(manifest), manifest.position_filter)
    manifest.require_sound()
    return manifest


def _orders(teacher: OpenedTeacher, sample: Sample, manifests: Sequence[Manifest]) -> list[tuple[int, ...]]:
    """The order of ids that a pilot finds for each."""
    orders = [FrequencyOrder(manifest.vocab_size) for manifest in manifests]
    wanting = [i for i, manifest in enumerate(manifests) if manifest.codec.orders_ids]
    for row in (row for part in sample.parts for row in part.rows) if wanting else ():
        found, _ = _select_all(teacher, [row], [TargetRequest.of(manifests[i]) for i in wanting], 0, 0)
        more = [
            i for i, part in zip(wanting, found, strict=True)
            if orders[i].add(manifests[i].position_filter.apply(part))
        ]  # fmt: skip
        wanting = more
        if not wanting:
            break
    return [order.ids() for order in orders]


def _select_all(
    teacher: OpenedTeacher, rows: Sequence[PackedRow], requests: Sequence[TargetRequest], shard: int, first_row: int
) -> tuple[list[SparseTargets], list[int]]:
    """The targets of some rows for several requests, and how many each row has."""
    batch = Batch(rows, teacher.rows, shard, first_row)
    parts: list[list[SparseTargets]] = [[] for _ in requests]
    start = 0
    for logits in teacher.logits(rows):
        here = slice(start, start + len(logits))
        start = here.stop
        labels, keys = batch.labels[here].to(logits.device), batch.keys[here].to(logits.device)
        for kept, request in zip(parts, requests, strict=True):
            kept.append(
                select(
                    logits, request.selection, labels=labels, temperatures=request.temperatures, seed=request.seed,
                    keys=keys,
                ).to("cpu")
            )  # fmt: skip
    return [drop_unknown(SparseTargets.cat(part), teacher.engine.knows) for part in parts], batch.counts
