"""One training run, from caches to a checkpoint that needs nothing else to be loaded.

What a run leaves in its folder:

    train-student.json   the resolved configuration, and fingerprints of the caches and of the rows; written first
    tensorboard/, wandb/ logs of `log_to`
    heldout-before.json  the student's figures before the first step
    rows.npz             the training rows, with `where`
    rows-RANK.jsonl      with `record_rows`: which rows each step took
    metrics.jsonl        loss, learning rate and the student's figures; held-out ones when measured; a line each
    checkpoint-N/        whole checkpoints to resume from
    adapter/             what `lora` trained, by itself; the model has it merged
    model.safetensors, config.json, tokenizer files   the student, a plain Hugging Face model
    README.md, curves.png   a model card, and the curves of the run where matplotlib is installed
    summary.json         what `--json` prints, written last
    .start/              with `init_from`, until the run ends: the student that was cut out of the teacher
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from kdcache import stopping
from kdcache.errors import ConfigError, ModelError
from kdcache.losses import Objective
from kdcache.pretrained import find_device
from kdcache.store.atomic_files import storage_errors
from kdcache.student import caches, data_workers, distributed, model_card, resume
from kdcache.student.aligned import align_sources, require_aligned
from kdcache.student.config import TrainConfig
from kdcache.student.curves import BEFORE, METRICS, SUMMARY
from kdcache.student.evaluation import measure_each
from kdcache.student.from_teacher.config import CutOptions
from kdcache.student.from_teacher.make import RECORD, start_from
from kdcache.student.mixture import Mixture
from kdcache.student.model import load_student, longest_context, save_student, with_adapters
from kdcache.student.preflight import logging_under, require_environment
from kdcache.student.rollouts import require_writer
from kdcache.student.schedule import Schedule
from kdcache.student.split import Split, keep, split
from kdcache.student.trainer import DistillationTrainer, arguments, complete
from kdcache.student.training_advice import advise

START = ".start"

_LOGGED = (
    "loss", "grad_norm", "learning_rate", "nll", "kl", "top1_agreement", "kept_mass", "log_partition",
    "aligned_bytes", "data_wait_share",
)  # fmt: skip

Progress = Callable[[int, int, dict[str, float]], None]
"""Called with steps done, steps to do, and the latest figures."""


def train(
    config: TrainConfig,
    on_progress: Progress | None = None,
    on_reading: Callable[[int, int], None] | None = None,
    on_advice: Callable[[Sequence[str]], None] | None = None,
) -> dict[str, Any]:
    """Train a student from a cache, or from several.

    Args:
        config: what to do.
        on_progress: called after each step.
        on_reading: called while `where` reads the caches, with rows read and rows to read.
        on_advice: called before the first step with what usually goes wrong with such a run (`kdcache.advice`).

    Returns:
        The summary that `kdcache train-student --json` prints.

    Raises:
        KdcacheError: see the exception tree.
        Stopped: a signal came; if the training had begun, there is a checkpoint of the step that was finished.
    """
    require_environment(config, find_device(config.device))
    with resume.hold_folder(Path(config.out)) if _leads() else contextlib.nullcontext():
        return _train(config, on_progress, on_reading, on_advice)


def _train(
    config: TrainConfig,
    on_progress: Progress | None,
    on_reading: Callable[[int, int], None] | None,
    on_advice: Callable[[Sequence[str]], None] | None,
) -> dict[str, Any]:
    started, out = time.perf_counter(), Path(config.out)
    opened = _open_caches(config)
    if config.resume and (out / SUMMARY).exists():
        finished: dict[str, Any] = json.loads((out / SUMMARY).read_text())
        return finished
    device = find_device(config.device)
    if config.init_from is not None:
        _cut_student(config, opened, device)
    model = _make_student(config, opened, device)
    distributed.join(device)
    opened = caches.agree(opened)
    if config.align:
        opened = tuple(dataclasses.replace(source, longest=longest_context(model)) for source in opened)
        require_aligned(opened, config)
    rows = split(opened, config, on_reading)
    _write_description(config, opened, rows)
    run = _Run(config, opened, rows, model, device)
    cut_from = None if config.init_from is None else json.loads((out / START / RECORD).read_text())
    advice = run.advice(None if cut_from is None else cut_from["parameters"]["teacher"])
    if on_advice and advice and _leads():
        on_advice(advice)
    before = _before(out, lambda: run.measure(model))
    trainer, training_seconds, waited = run.train(on_progress)
    after = run.measure(trainer.model)
    if not math.isfinite(after["nll"]):
        raise ModelError(
            f"the training diverged: the held-out nll is {after['nll']}; lower lr, then start in another folder"
        )
    positions = int(trainer.accelerator.reduce(torch.tensor(trainer.positions, device=run.args.device)).item())
    seconds = time.perf_counter() - started
    summary = {
        "out": str(out),
        "steps": run.steps,
        "positions": positions,
        "rows": {
            "train": rows.record()["count"],
            "train_sha256": rows.record()["sha256"],
            "heldout": sum(map(len, rows.heldout)),
        },
        "heldout": {"before": before, "after": after},
        "seconds": seconds,
        "training_seconds": training_seconds,
        "data_wait_share": trainer.longest(waited),
        "positions_per_second": positions / seconds,
        "curves": None,
        "advice": advice,
        **({} if cut_from is None else {"start": cut_from}),
    }
    save_student(trainer.accelerator.unwrap_model(trainer.model), opened[0].cache, out)
    if _leads():
        _write_summary(config, opened, summary)
    if torch.distributed.is_initialized():  # a rank that exits with its group open aborts now and then
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.state.destroy_process_group()
    return summary


def _leads() -> bool:
    """Whether this rank writes what is written once."""
    return distributed.rank() == 0


def _open_caches(config: TrainConfig) -> tuple[caches.CacheSource, ...]:
    """The caches of a run; whatever cannot be done with them or with its folder is refused here, before any work."""
    out = Path(config.out)
    resumed = resume.saved_description(out) if config.resume else None
    opened = caches.open_sources(config, (resumed or {}).get("caches", ()))
    if config.align:
        opened = align_sources(opened, config)
    if config.soft_weight > 0:
        caches.require_targets(opened)
    for source in opened:
        _ = source.cache.tokenizer_path
        _schedule(config, source, config.steps or 1)
    if _leads():  # the other ranks start no step without it
        if Objective(loss=config.loss, tail=config.tail).takes_rollouts:
            if config.student is None:
                raise ConfigError(f"loss {config.loss} learns from rollouts of the student, but it is cut out just now")
            for source in opened:
                require_writer(source.cache.manifest, config.student, config.loss)
        resume.require_free_or_same(out, config.resume, resume.describe(config, opened))
    return opened


def _cut_student(config: TrainConfig, opened: Sequence[caches.CacheSource], device: torch.device) -> None:
    """Cut the student out of the teacher into a folder of the run, unless the run that is resumed has done so."""
    out = Path(config.out)
    if resume.saved_description(out) is None:  # a run that was killed so early may have had other options
        shutil.rmtree(out / START, ignore_errors=True)
    if not (out / START).exists():
        rows = split(opened, dataclasses.replace(config, where=None)).train[0]
        cut = CutOptions(**{field.name: getattr(config, field.name) for field in dataclasses.fields(CutOptions)})
        start_from(config.start, cut, opened[0].cache, rows, out / START, device, config.batch_rows)


def _make_student(config: TrainConfig, opened: Sequence[caches.CacheSource], device: torch.device) -> Any:
    start = config.start if config.init_from is None else str(Path(config.out) / START)
    first, *more = (source.cache for source in opened)
    model = load_student(start, first, device, config.seed, mixed=more, alignment=opened[0].alignment)
    if config.gradient_checkpointing and not model.supports_gradient_checkpointing:
        raise ModelError(f"the student {type(model).__name__} cannot be trained with gradient_checkpointing")
    return with_adapters(model, config.lora, config.seed) if config.lora else model


def _write_description(config: TrainConfig, opened: Sequence[caches.CacheSource], rows: Split) -> None:
    """Make the folder of a run and write what the run is; a folder that says something else is refused."""
    if not _leads():
        return
    out = Path(config.out)
    resume.require_same_rows(out, rows)
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        resume.write(out / resume.CONFIG, {**resume.describe(config, opened), "training_rows": rows.record()})
        if config.where is not None:
            keep(rows, out)


def _write_summary(config: TrainConfig, opened: Sequence[caches.CacheSource], summary: dict[str, Any]) -> None:
    """Write the model card, the curves and, last of all, the summary."""
    out = Path(config.out)
    manifests = {teacher.name: teacher.cache.manifest for source in opened for teacher in source.teachers}
    summary["curves"] = model_card.write_record(
        out, out / METRICS, config, manifests, resume.rows_per_step(config), summary
    )
    resume.write(out / SUMMARY, summary)
    shutil.rmtree(out / START, ignore_errors=True)


class _Run:
    """A run whose folder, rows and student are ready."""

    def __init__(
        self,
        config: TrainConfig,
        opened: Sequence[caches.CacheSource],
        rows: Split,
        model: Any,
        device: torch.device,
    ) -> None:
        self.config, self.opened, self.rows, self.model = config, opened, rows, model
        self.steps = _steps(config, sum(map(len, rows.train)))
        self.args = arguments(config, self.steps, device, any(source.remote for source in opened))
        _ = self.args.device  # which counts the GPUs
        self.args._n_gpu = min(self.args.n_gpu, 1)  # several in one process would mean DataParallel

    def advice(self, teacher_parameters: int | None) -> list[str]:
        """What usually goes wrong with such a run."""
        rows = self.steps * resume.rows_per_step(self.config)
        return advise(self.config, self.opened, self.model, rows, teacher_parameters)

    def measure(self, student: Any) -> dict[str, Any]:
        """Figures of the held-out rows; every rank must call it."""
        named = {source.name: source.rows for source in self.opened}
        return measure_each(student, named, self.rows.heldout, self.args.device, self.config.batch_rows)

    def train(self, on_progress: Progress | None) -> tuple[DistillationTrainer, float, float]:
        """Take all steps, from the newest complete checkpoint if the run is resumed.

        Returns:
            The trainer, the seconds that the steps took, and the share of them in which this rank waited for rows.
        """
        config, out = self.config, Path(self.config.out)
        resumable = complete(out) if config.resume else []
        first_step = int(resumable[-1].name.rpartition("-")[2]) if resumable else 0
        vote = distributed.Vote(self.args.device)
        watcher = _Watcher(out if _leads() else None, first_step, config.eval_every, vote, on_progress)
        mixture = Mixture([len(rows) for rows in self.rows.train], config.seed, caches.weights(self.opened))
        readers = [source.rows for source in self.opened]
        schedule = _schedule(config, self.opened[0], self.steps)
        with data_workers.translate_worker_errors(), logging_under(out), stopping.deferred():
            trainer = DistillationTrainer(
                self.model, readers, self.rows.train, mixture, config, schedule, self.args, [watcher], first_step
            )
            watcher.measure = lambda: self._measure_and_log(trainer)
            training = time.perf_counter()
            trainer.train(resume_from_checkpoint=str(resumable[-1]) if resumable else None)
            distributed.stop_together()
            seconds = time.perf_counter() - training
            waited = trainer.waiting.share()
        return trainer, seconds, waited

    def _measure_and_log(self, trainer: DistillationTrainer) -> dict[str, Any]:
        figures = self.measure(trainer.model)
        asked = trainer.control.should_log  # a log between takes the place of the step's own
        trainer.log({f"eval_{name}": value for name, value in figures.items() if isinstance(value, float)})
        trainer.control.should_log = asked
        return figures


def _schedule(config: TrainConfig, source: caches.CacheSource, steps: int) -> Schedule:
    partners = {each.name: each.cache.manifest for each in source.partners}
    return Schedule.of(config, source.cache.manifest, steps, partners)


def _steps(config: TrainConfig, rows: int) -> int:
    if config.steps is not None:
        return config.steps
    return max(1, math.ceil((config.epochs or 1.0) * rows / resume.rows_per_step(config)))


def _before(out: Path, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Held-out figures before the first step, measured once a run, by all ranks together."""
    path = out / BEFORE
    known: dict[str, Any] | None = json.loads(path.read_text()) if _leads() and path.exists() else None
    known = distributed.agree(known)  # a rank on another machine may not see the folder
    if known is not None:
        return known
    figures = run()
    if _leads():
        resume.write(path, figures)
    return figures


class _Watcher(TrainerCallback):  # type: ignore[misc]
    """Writes metrics.jsonl, measures the held-out rows on the way, reports progress, and stops for a signal.

    A run that stops after a step whose held-out rows are to be measured leaves that to the run that resumes it.
    Trainer's own `enable_jit_checkpoint` is no help: it knows SIGTERM alone, and each rank would stop by itself.
    """

    def __init__(
        self,
        out: Path | None,
        first_step: int,
        eval_every: int,
        stop: distributed.Vote,
        on_progress: Progress | None,
    ) -> None:
        self._path = None if out is None else out / METRICS
        self._eval_every, self._stop, self._on_progress = eval_every, stop, on_progress
        self._latest: dict[str, float] = {}
        self.measure: Callable[[], dict[str, Any]] | None = None
        for path in [] if out is None else [out / METRICS, *out.glob("rows-*.jsonl")]:
            resume.cut(path, first_step)

    def on_train_begin(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        state.save_steps = args.save_steps  # a resumed run has that of its checkpoint otherwise
        if not any(line["step"] == state.global_step and "eval_nll" in line for line in state.log_history):
            self._measure_at(state.global_step)

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        figures = {k: v for k, v in (logs or {}).items() if k.partition("/")[0] in _LOGGED}
        if figures:
            self._latest.update(figures)
            self._append({"step": state.global_step, **figures})

    def on_step_end(self, _args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._stop.any(stopping.requested()):
            control.should_log = control.should_save = control.should_training_stop = True
        else:
            self._measure_at(state.global_step)
        if self._on_progress:
            self._on_progress(state.global_step, state.max_steps, self._latest)

    def _measure_at(self, step: int) -> None:
        if self._eval_every and step and step % self._eval_every == 0 and self.measure is not None:
            figures = self.measure()
            known = {f"heldout {name}": figures[name] for name in ("nll", "kl") if figures[name] is not None}
            self._latest.update(known)
            self._append({"step": step, "heldout": figures})

    def _append(self, line: dict[str, Any]) -> None:
        if self._path is not None:
            resume.append(self._path, line)
