"""A training step of a student from a cache, as `train-student` takes it."""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from kdcache.cache import open_cache
from kdcache.planning.trial import MEASURED, synchronise
from kdcache.pretrained import find_device
from kdcache.student.config import TrainConfig
from kdcache.student.mixture import Mixture
from kdcache.student.model import load_student
from kdcache.student.schedule import Schedule
from kdcache.student.trainer import DistillationTrainer, arguments
from kdcache.teacher.config import PlanOptions


def student_seconds(options: PlanOptions, cache: Path, out: Path) -> float:
    """Seconds of training for a row, from the rows of a trial's measured shard; the first step is not counted.

    Args:
        options: which student, batch and device.
        cache: folder of the trial.
        out: a folder for the trainer, in which it writes no checkpoint.

    Raises:
        ModelError: the student cannot learn from such a cache.
    """
    device, measured = find_device(options.device), open_cache(cache).only([MEASURED])
    rule, rows = measured.manifest.rule, range(len(measured))
    config = TrainConfig(
        cache=(str(cache),), student=str(options.student), out=str(out), device=options.device,
        batch_rows=min(options.batch_rows, len(rows)),
        temperature=f"{rule.target_temperature:g}" if rule.sampled else "1",
    )  # fmt: skip
    model = load_student(config.student, measured, device, config.seed)
    steps = options.batches + 1
    args = dataclasses.replace(arguments(config, steps, device, remote=False), save_strategy="no")
    clock, mixture = _Clock(device), Mixture([len(rows)], config.seed, [1.0])
    schedule = Schedule.of(config, measured.manifest, steps)
    DistillationTrainer(model, [measured], [rows], mixture, config, schedule, args, [clock]).train()
    steps_taken = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    return statistics.mean(steps_taken) / config.batch_rows


class _Clock(TrainerCallback):  # type: ignore[misc]
    """Records when each step ends."""

    def __init__(self, device: Any) -> None:
        self.device = device
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        synchronise(self.device)
        self.ends.append(time.perf_counter())
