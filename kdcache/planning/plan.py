"""The plan of a dump: rows, bytes, hours, money and memory for a whole corpus, and when the cache pays.

Whatever grows with the corpus is counted by the survey that a dump begins with (shards, documents, characters) or comes
from a sample of the corpus (`sample.py`); what a row takes is measured on a few batches of it (`trial.py`). Nothing is
written but into a temporary folder.
Cost: the survey; the start of a dump, with its pilot; two forward passes over the batches and one over the pilot's
rows; with a student, one more forward pass and a training step for each batch, in a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdcache.cache_writer import tokenizer_files
from kdcache.errors import ModelError
from kdcache.planning.memory import NoRoomError, in_own_process, peak, room
from kdcache.planning.sample import Sample, take_sample
from kdcache.planning.selections import Other, measure_others, name_of
from kdcache.planning.trial import MEASURED, WARM, Speed, Trial, synchronise
from kdcache.rows import PackedRow
from kdcache.teacher.config import PlanOptions
from kdcache.teacher.engines.base import TargetRequest, find_engine, require_answerable
from kdcache.teacher.engines.tiles import tile_slices
from kdcache.teacher.inputs import Inputs, open_inputs
from kdcache.teacher.open_teacher import open_teacher
from kdcache.teacher.opened_teacher import OpenedTeacher
from kdcache.teacher.pilot import run_pilot

if TYPE_CHECKING:
    from kdcache.planning.student_step import StudentStep

_HOUR = 3600.0
_STAGES = ("survey", "teacher", "documents", "pilot", "batches", "other selections", "student")

Progress = Callable[[int, int, str], None]
"""Called with stages done, stages in all, and the one that begins."""


def plan(options: PlanOptions, on_progress: Progress | None = None) -> dict[str, Any]:
    """Measure a few batches here, and say what the dump of the whole corpus takes.

    Args:
        options: those of the dump, and what its cost is set against.
        on_progress: see `Progress`.

    Returns:
        What `kdcache plan --json` prints; docs/commands/plan.md names its parts.

    Raises:
        KdcacheError: what the dump would be refused for, and a student that cannot learn from such a cache.
    """
    clock = _Clock(on_progress)
    clock.begin("survey")
    if options.student:
        from kdcache.student.model import require_students  # which loads what a dump's start loads, too

        require_students([options.student])
    inputs = open_inputs(options)
    request = TargetRequest.of(inputs.manifest)
    require_answerable(find_engine(options.engine), request, inputs.manifest.position_filter)
    clock.begin("teacher")
    with tempfile.TemporaryDirectory(prefix="kdcache-plan-") as scratch:
        spec, filters = options.teacher_spec, inputs.manifest.position_filter
        with _room_for(options), open_teacher(spec, inputs.manifest.teacher_row_spec, request, filters) as teacher:
            inputs = inputs.with_known(teacher.engine.knows.known(inputs.manifest.rule, inputs.manifest.temperatures))
            clock.begin("documents")
            sample = take_sample(inputs, options.batch_rows)
            batches = sample.batches(options.batches, options.batch_rows)
            teacher.targets(batches[0][:1], request)  # compiles loops, once a machine, on nobody's clock
            clock.begin("pilot")
            inputs = dataclasses.replace(inputs, manifest=run_pilot(teacher, inputs))
            inputs.manifest.require_sound()
            clock.begin("batches")
            trial = Trial(Path(scratch) / "chosen", inputs.manifest, tokenizer_files(inputs.tokenizer))
            speed = trial.run(teacher, sample, batches, inputs.tokenizer.eos_token_id)
            memory: dict[str, Any] = {"dump": _dump_memory(options, teacher, batches), "training": None}
            clock.begin("other selections")
            like = [trial.commit(WARM), trial.commit(MEASURED)]
            others = measure_others(options, teacher, inputs, sample, batches, like, Path(scratch) / "others")
            teacher_row = _teacher_seconds(teacher, batches, trial) if options.student else 0.0
            device = teacher.device
        del teacher  # and its weights with it: training is given the whole GPU
        found = _whole(options, inputs, sample, trial, others)
        found["sampled"]["batches"] = len(batches)
        found["seconds"] = _seconds(clock, inputs, sample, speed)
        found["machines"] = _machines(options, found["seconds"], len(inputs.plan))
        found["memory"] = memory
        found["training"], found["problems"] = None, _problems(options, found, device)
        if options.student:
            clock.begin("student")
            _try_training(options, found, trial.folder, teacher_row, device)
        clock.end()
    return found


class _Clock:
    """How long each stage took."""

    def __init__(self, on_progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._on_progress, self._stage, self._started = on_progress, "", 0.0

    def begin(self, stage: str) -> None:
        """End the stage before, and begin one."""
        self.end()
        self._stage, self._started = stage, time.perf_counter()
        if self._on_progress:
            self._on_progress(_STAGES.index(stage), len(_STAGES), stage)

    def end(self) -> None:
        """End the stage."""
        if self._stage:
            self.seconds[self._stage] = time.perf_counter() - self._started


def _whole(
    options: PlanOptions, inputs: Inputs, sample: Sample, trial: Trial, others: Sequence[Other]
) -> dict[str, Any]:
    """Rows, positions and bytes of the whole corpus."""
    sizes, described, plan = trial.sizes(), sample.described, inputs.plan
    labels = sample.labels / sample.share
    positions = round(labels * sizes.positions / max(1, sizes.labels))

    def line(name: str, chosen: bool, taken: int | None, problem: str | None = None) -> dict[str, Any]:
        each = None if taken is None else taken / max(1, positions)
        return {"name": name, "chosen": chosen, "bytes": taken, "bytes_per_position": each, "problem": problem}

    rule = inputs.manifest.rule
    selections = [line(name_of(rule), True, sizes.of(sample, len(plan)))]
    for other in others:
        taken = None if other.sizes is None else other.sizes.of(sample, len(plan))
        selections.append(line(name_of(other.rule), False, taken, other.problem))
    return {
        "teacher": options.teacher,
        "corpus": options.corpus,
        "engine": options.engine,
        "documents": plan.documents,
        "shards": len(plan),
        "characters": int(plan.characters.sum()),
        "rows": round(sample.rows / sample.share),
        "tokens": round(sample.tokens / sample.share),
        "labels": round(labels),
        "positions": positions,
        "seq_len": options.seq_len,
        "sampled": {
            "documents": described.documents,
            "characters": sample.characters,
            "share": sample.share,
            "rows": sample.rows,
            "dropped": described.dropped,
            "bad": len(described.bad_records),
            "cut": described.cut,
            "truncated": described.truncated,
        },
        "precision": str(inputs.manifest.precision),
        "temperatures": list(inputs.manifest.temperatures),
        "extras": list(inputs.manifest.extras),
        "selections": selections,
        "bytes": selections[0]["bytes"],
        "bytes_per_position": selections[0]["bytes_per_position"],
    }


def _seconds(clock: _Clock, inputs: Inputs, sample: Sample, speed: Speed) -> dict[str, float]:
    """What one machine like this one takes for the whole dump, by what it does."""
    found = {
        "start": clock.seconds["survey"] + clock.seconds["teacher"],
        "pilot": clock.seconds["pilot"],
        "documents": sample.seconds / sample.share,
        "teacher": speed.a_slot * sample.slots / sample.share,
        "shards": speed.a_shard * len(inputs.plan),
    }
    return {**found, "total": sum(found.values())}


def _machines(options: PlanOptions, seconds: dict[str, float], shards: int) -> list[dict[str, Any]]:
    """Hours and price for one machine, and for as many as are asked for."""
    fixed = seconds["start"] + seconds["pilot"]  # every worker opens the corpus and its teacher
    found = []
    for machines in dict.fromkeys((1, options.workers)):
        share = math.ceil(shards / machines) / shards  # of the one that has most shards
        wall = fixed + (seconds["total"] - fixed) * share
        hours = machines * wall / _HOUR
        price = None if options.price_per_hour is None else hours * options.price_per_hour
        found.append({"machines": machines, "seconds": wall, "teacher_hours": hours, "price": price})
    return found


@contextlib.contextmanager
def _room_for(options: PlanOptions) -> Iterator[None]:
    """Turn a GPU that is too small for the teacher into one sentence."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise ModelError(
            f"the teacher {options.teacher} with {options.batch_rows} rows per forward pass takes more memory than the "
            "GPU has; lower batch_rows, or spread it with device_map"
        ) from None


def _dump_memory(
    options: PlanOptions, teacher: OpenedTeacher, batches: Sequence[Sequence[PackedRow]]
) -> dict[str, Any]:
    """The most memory so far, and that of the logits which are there at once."""
    vocab = teacher.engine.padded_vocab_size or teacher.rows.vocab_size
    positions = max(sum(len(row.tokens) for row in batch) for batch in batches)
    tiles = tile_slices(positions, vocab, teacher.device) if options.tile_head else [slice(0, positions)]
    return {**peak(teacher.device), "logits_bytes": 4 * vocab * max(s.stop - s.start for s in tiles)}


def _teacher_seconds(teacher: OpenedTeacher, batches: Sequence[Sequence[PackedRow]], trial: Trial) -> float:
    """Seconds that the teacher takes for the targets of a row, when nothing is written; it is warm."""
    request = TargetRequest.of(trial.writer.manifest)
    synchronise(teacher.device)
    started = time.perf_counter()
    for batch in batches:
        teacher.targets(batch, request)
    synchronise(teacher.device)
    return (time.perf_counter() - started) / sum(map(len, batches))


def _try_training(
    options: PlanOptions, found: dict[str, Any], cache: Path, teacher_row: float, device: torch.device
) -> None:
    """Add to a plan what training from a trial's cache takes, or that it does not fit."""
    from kdcache.planning.student_step import measure_student  # which loads much that a dump does without

    if device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        step = in_own_process(measure_student, options, cache, cache.parent / "student")
    except NoRoomError:
        found["problems"].append(
            f"training the student {options.student} with {options.batch_rows} rows per forward pass does not fit into "
            f"the {room(device):,} bytes of memory here, or was stopped by the system"
        )
        return
    found["memory"]["training"] = step.memory
    found["training"] = _training(options, found, step, teacher_row)
    found["problems"] += _too_large("training", step.memory, device)


def _training(options: PlanOptions, found: dict[str, Any], step: StudentStep, teacher_row: float) -> dict[str, Any]:
    """The cache against the teacher inside the training loop, which reads no cache."""
    rows, dump, passes = found["rows"], found["seconds"]["total"], options.students * options.epochs
    student, reading, teacher = rows * step.row_seconds, rows * step.reading_seconds, rows * teacher_row
    cached, live = dump + passes * student, passes * (student - reading + teacher)
    return {
        "student": options.student,
        "students": options.students,
        "epochs": options.epochs,
        "passes": passes,
        "student_seconds_per_pass": student,
        "reading_seconds_per_pass": reading,
        "teacher_seconds_per_pass": teacher,
        "cached_seconds": cached,
        "live_seconds": live,
        "break_even_passes": dump / (teacher - reading) if teacher > reading else None,
        "pays": cached < live,
    }


def _too_large(what: str, memory: dict[str, Any], device: torch.device) -> list[str]:
    """A sentence if this needs more than nine tenths of what there is."""
    most, there = memory["peak_bytes"], room(device)
    if most <= 0.9 * there:
        return []
    return [f"{what} takes {most:,} bytes ({memory['kind']}), more than nine tenths of the {there:,} here"]


def _problems(options: PlanOptions, found: dict[str, Any], device: torch.device) -> list[str]:
    """What of a dump will not fit, in sentences."""
    problems = []
    if options.out and "://" not in options.out:
        folder = Path(options.out).expanduser().absolute()
        free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
        if found["bytes"] > free:
            problems.append(
                f"the cache takes {found['bytes']:,} bytes, but the disk of {options.out} has {free:,} free"
            )
    if options.workers > found["shards"]:
        problems.append(
            f"{options.workers} workers share {found['shards']} {'shard' if found['shards'] == 1 else 'shards'}, so "
            f"{options.workers - found['shards']} of them have nothing to do; make shards smaller with chars_per_shard"
        )
    return problems + _too_large("the dump", found["memory"]["dump"], device)
