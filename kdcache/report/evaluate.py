"""Evaluate: figures of one student over a cache, or of several side by side; with a live teacher, the dense ones too.

One pass over the rows serves all: a row is read once, the teacher runs once, each student once.

Students see the same positions, so their figures are paired, and the difference of two is known better than either.
`nll_difference` is the student's nll less the first student's, and its standard error comes from the spread over rows,
because positions of one row depend on each other: with d_r the summed difference and n_r the positions of row r,

    se^2 = R / (R - 1) sum_r (d_r - n_r mean)^2 / (sum_r n_r)^2

`write_evaluation` writes an evaluation as one JSON object that names what was measured: `command`, `options`,
`cache_sha256`, `teacher_sha256`, `versions` and `figures`.

Shapes: M labelled positions of a batch, R rows, V vocabulary.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from kdcache.alignment import AlignedRows, Alignment, read_student_tokenizer
from kdcache.cache import Cache, open_cache
from kdcache.errors import ConfigError
from kdcache.losses import LogitSource, StoredLogits
from kdcache.pretrained import find_device
from kdcache.report.live_teacher import DenseFigures, TeacherCalibration
from kdcache.rows import spread_rows
from kdcache.store.atomic_files import require_new, write_new
from kdcache.store.manifest import Manifest
from kdcache.store.open_storage import open_storage
from kdcache.student.aligned import student_folder
from kdcache.student.data import Rows, batches, labelled, split_heldout
from kdcache.student.evaluation import StudentFigures, head_or_none
from kdcache.student.fused_head import with_logits
from kdcache.student.model import load_student, longest_context, require_students
from kdcache.student.model_card import versions
from kdcache.student.multi_teacher import RowReader
from kdcache.teacher.engines.base import TeacherSpec
from kdcache.teacher.open_teacher import open_teacher_of
from kdcache.teacher.opened_teacher import OpenedTeacher


def write_evaluation(path: str, options: dict[str, Any], figures: dict[str, Any]) -> None:
    """Write an evaluation into a new file.

    Args:
        path: of the file; folders on the way are made.
        options: of the command, `cache` and `device` among them.
        figures: what `--json` prints.

    Raises:
        ConfigError: the file has come into being since.
        CacheError: it cannot be written.
    """
    manifest = Manifest.read(open_storage(options["cache"]))
    record = {
        "command": "evaluate",
        "options": {**options, "device": str(find_device(options["device"]))},
        "cache_sha256": manifest.sha256,
        "teacher_sha256": manifest.teacher_sha256,
        "versions": versions(),
        "figures": figures,
    }
    if not write_new(Path(path), (json.dumps(record, indent=2) + "\n").encode()):
        require_new(path)


Progress = Callable[[int, int], None]
"""Called with (rows done, rows to do)."""


def evaluate(student: str, cache: str, teacher: str | None = None, **options: Any) -> dict[str, Any]:
    """Measure a student on rows of a cache.

    Args:
        student: checkpoint folder or hub name.
        cache: folder or URL of the cache.
        teacher: the cache's teacher, run live for the dense figures.
        options: the others of `compare`.

    Returns:
        The figures of `kdcache.student.evaluation`, `calibration` with its `bins`, and with a teacher those of
        `kdcache.report.live_teacher` and `teacher_calibration`. `logits` says how the student's were made: in `tiles`,
        or `whole` for a model that `fuse_head` refuses.

    Raises:
        KdcacheError: see the exception tree.
    """
    figures: dict[str, Any] = compare([student], cache, teacher, **options)["students"][student]
    return {name: value for name, value in figures.items() if not name.startswith("nll_difference")}


def compare(
    students: Sequence[str],
    cache: str,
    teacher: str | None = None,
    heldout: float | None = None,
    rows: int | None = None,
    batch_rows: int = 8,
    device: str = "auto",
    local_copy: str | None = None,
    local_limit: str = "20GB",
    engine: str = "transformers",
    engine_options: Mapping[str, Any] | None = None,
    align: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure several students on the same rows of a cache; all of them are in memory at once.

    Args:
        students: checkpoint folders or hub names, each once.
        cache: folder or URL of the cache.
        teacher: the cache's teacher, run live for the dense figures.
        heldout: measure only the rows that training holds out at this share.
        rows: measure only so many rows, evenly spread.
        batch_rows: rows a forward pass.
        device: where to run.
        local_copy, local_limit: as for `open_cache`.
        engine: what runs the teacher.
        engine_options: its `engine_python`, `engine_set` and `tokenizer`, see `TeacherSpec`.
        align: each student has a tokenizer of its own, see `kdcache.alignment`.
        on_progress: called with (rows done, rows to do).

    Returns:
        `students`: by name, what `evaluate` returns, and `nll_difference` to the first with
        `nll_difference_standard_error`; both None for the first itself, and where students have other tokens.

    Raises:
        KdcacheError: see the exception tree.
    """
    require_students(students)
    if rows is not None and rows < 1:
        raise ConfigError(f"rows is {rows}, but must be at least 1")
    if batch_rows < 1:
        raise ConfigError(f"batch_rows is {batch_rows}, but must be at least 1")
    if heldout is not None and not 0 < heldout < 1:
        raise ConfigError(f"heldout is {heldout}, but must lie between 0 and 1")
    if align and teacher is not None:
        raise ConfigError("align and teacher exclude each other: the students have other tokens than the teacher")
    opened, where = open_cache(cache, local_copy=local_copy, local_limit=local_limit), find_device(device)
    wanted = _rows_to_measure(len(opened), heldout, rows)
    if not len(wanted):
        raise ConfigError(f"the cache {cache} has no rows to measure on")
    with ExitStack() as stack:
        live = None
        if teacher is not None:
            spec = TeacherSpec(
                model=teacher, engine=engine, device=device, batch_rows=batch_rows, **(engine_options or {})
            )
            live = _Live(stack.enter_context(open_teacher_of(spec, opened.manifest, opened.storage)))
        measured = [_Measured(name, opened, where, teacher is not None, align) for name in students]
        _walk(measured, live, opened, wanted, where, batch_rows, on_progress)
    return {
        "students": {
            one.name: {**one.figures(), **({} if live is None else live.means()), **one.less(measured[0])}
            for one in measured
        }
    }


def _rows_to_measure(count: int, heldout: float | None, rows: int | None) -> Rows:
    wanted: Rows = range(count) if heldout is None else split_heldout(count, heldout)[1]
    return wanted if rows is None else spread_rows(wanted, rows)


class _Live:
    """A teacher, and what is known of it so far."""

    def __init__(self, teacher: OpenedTeacher) -> None:
        self.teacher, self.known = teacher, TeacherCalibration()

    def tiles(self, cache: Cache, rows: Rows, device: torch.device) -> Iterator[tuple[slice, torch.Tensor]]:
        """Its logits `[n, V]` at the labelled slots of some rows, a tile of slots at a time."""
        start = 0
        for logits in self.teacher.logits([cache.read_packed(int(row))[0] for row in rows]):
            yield slice(start, start + len(logits)), logits.to(device)
            start += len(logits)

    def means(self) -> dict[str, Any]:
        calibration = self.known.calibration
        return {"teacher_ece": calibration.error, "teacher_calibration": {"bins": calibration.bins()}}


class _Measured:
    """A student, and what is known of it so far."""

    def __init__(self, name: str, cache: Cache, device: torch.device, beside_teacher: bool, align: bool) -> None:
        self.rows: RowReader = cache
        alignment = None
        if align:
            alignment = Alignment(cache, read_student_tokenizer(name, student_folder(name)))
        self.name = name
        self.model = load_student(name, cache, device, seed=0, trained=False, alignment=alignment).eval()
        if alignment is not None:
            self.rows = AlignedRows(cache, alignment, longest_context(self.model))
        self.head = head_or_none(self.model, device)
        self.known = StudentFigures.of(self.rows)
        self.dense, self.beside_teacher = DenseFigures(), beside_teacher
        self.nll_by_row: list[float] = []
        self.positions_by_row: list[int] = []

    def add(self, source: LogitSource, batch: dict[str, Any]) -> LogitSource:
        nll = self.known.add(source, batch)["nll"]
        mask = labelled(batch)
        sums = torch.zeros(len(mask), dtype=torch.float64).index_add_(0, mask.nonzero()[:, 0], nll)
        self.nll_by_row += sums.tolist()
        self.positions_by_row += mask.sum(-1).tolist()
        return source

    def figures(self) -> dict[str, Any]:
        dense = self.dense.means() if self.beside_teacher else {}
        logits = "whole" if self.head is None else "tiles"
        bins = {"bins": self.known.calibration.bins()}
        return {**self.known.means(), "calibration": bins, **dense, "logits": logits}

    def less(self, first: _Measured) -> dict[str, float | None]:
        mean = error = None
        if self is not first and self.positions_by_row == first.positions_by_row:
            mean, error = paired_difference(self.nll_by_row, first.nll_by_row, self.positions_by_row)
        return {"nll_difference": mean, "nll_difference_standard_error": error}


@torch.inference_mode()
def _walk(
    measured: Sequence[_Measured],
    live: _Live | None,
    cache: Cache,
    rows: Rows,
    device: torch.device,
    batch_rows: int,
    on_progress: Progress | None,
) -> None:
    done = 0
    for each in _batches(measured, rows, batch_rows):
        batch = each[0]
        sources = [
            with_logits(
                one.model, one.head, own, device, one.rows.row_spec.vocab_size, functools.partial(one.add, batch=own)
            )
            for one, own in zip(measured, each, strict=True)
        ]
        if live is not None:
            labels = batch["labels"][labelled(batch)].to(device)
            for part, logits in live.tiles(cache, rows[done : done + len(batch["labels"])], device):
                live.known.add(StoredLogits(logits), labels[part])
                for one, source in zip(measured, sources, strict=True):
                    one.dense.add(logits, source, part)
        done += len(batch["labels"])
        if on_progress:
            on_progress(done, len(rows))


def _batches(measured: Sequence[_Measured], rows: Rows, batch_rows: int) -> Iterator[list[dict[str, Any]]]:
    """Of each batch of rows what every student reads; what all of them read is read once."""
    first = measured[0].rows
    if all(one.rows is first for one in measured):
        for batch in batches(first, rows, batch_rows):
            yield [batch] * len(measured)
    else:
        yield from map(list, zip(*(batches(one.rows, rows, batch_rows) for one in measured), strict=True))


def paired_difference(
    sums: Sequence[float], others: Sequence[float], positions: Sequence[int]
) -> tuple[float, float | None]:
    """The mean difference of two sums by row, a position, and its standard error (None for less than two rows).

    Args:
        sums, others: `[R]` summed over the positions of each row.
        positions: `[R]` how many those are.
    """
    differences = [one - two for one, two in zip(sums, others, strict=True)]
    total = sum(positions)
    mean = math.fsum(differences) / max(1, total)
    if len(positions) < 2:
        return mean, None
    spread = math.fsum((d - n * mean) ** 2 for d, n in zip(differences, positions, strict=True))
    return mean, math.sqrt(len(positions) / (len(positions) - 1) * spread) / max(1, total)
