"""A training step of a student from a cache, as `train-student` takes it: how long it takes, and in which memory."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from kdcache.cache import Cache, open_cache
from kdcache.planning.memory import peak
from kdcache.planning.trial import MEASURED, synchronise
from kdcache.pretrained import find_device
from kdcache.student.config import TrainConfig
from kdcache.student.mixture import Mixture
from kdcache.student.model import load_student
from kdcache.student.schedule import Schedule
from kdcache.student.trainer import DistillationTrainer, Waiting, arguments
from kdcache.teacher.config import PlanOptions


@dataclass(frozen=True, kw_only=True)
class StudentStep:
    """What training takes for a row.

    Attributes:
        row_seconds: of a step, by its rows.
        reading_seconds: the part of these in which the step waits for rows from the cache.
        memory: see `memory.peak`; of the whole process, so measure in one that does nothing else.
    """

    row_seconds: float
    reading_seconds: float
    memory: dict[str, Any]


def measure_student(options: PlanOptions, cache: Path, out: Path) -> StudentStep:
    """Train a student on the rows of a trial's measured shard; the first step is not counted.

    Args:
        options: which student, batch and device.
        cache: folder of the trial.
        out: a folder for the trainer, in which it writes no checkpoint.

    Raises:
        ModelError: the student cannot learn from such a cache.
    """
    measured = open_cache(cache).only([MEASURED])
    rule = measured.manifest.rule
    config = TrainConfig(
        cache=(str(cache),), student=str(options.student), out=str(out), device=options.device,
        batch_rows=min(options.batch_rows, len(measured)),
        temperature=f"{rule.target_temperature:g}" if rule.sampled else "1",
    )  # fmt: skip
    return measure_steps(config, measured, options.batches)


def measure_steps(config: TrainConfig, cache: Cache, batches: int) -> StudentStep:
    """Take a few steps of a training, and measure all but the first.

    Args:
        config: the training; its `out` is a folder for the trainer, in which it writes no checkpoint.
        cache: what it learns from.
        batches: how many steps are measured.

    Raises:
        ModelError: the student cannot learn from such a cache.
    """
    device, rows, steps = find_device(config.device), range(len(cache)), batches + 1
    model = load_student(config.start, cache, device, config.seed)
    args = dataclasses.replace(arguments(config, steps, device, remote=False), save_strategy="no")
    clock, mixture = _Clock(device), Mixture([len(rows)], config.seed, [1.0])
    schedule = Schedule.of(config, cache.manifest, steps)
    trainer = DistillationTrainer(model, [cache], [rows], mixture, config, schedule, args, [clock])
    clock.waiting = trainer.waiting
    trainer.train()
    return StudentStep(
        row_seconds=clock.a_step("ends") / config.batch_rows,
        reading_seconds=clock.a_step("waited") / config.batch_rows,
        memory=peak(device),
    )


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Records when each step ends, and for how long rows were waited for until then."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.waiting = Waiting()
        self.ends: list[float] = []
        self.waited: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronise(self.device)
        self.ends.append(time.perf_counter())
        self.waited.append(self.waiting.seconds)

    def a_step(self, name: str) -> float:
        """The mean of what one of the two grows by in a step, the first left out."""
        values: list[float] = getattr(self, name)
        return statistics.mean(after - before for before, after in itertools.pairwise(values))
