"""One training run, from a cache to a checkpoint that stands on its own.

What a run leaves in its folder:

    train-student.json   the resolved configuration and the cache's fingerprint, written first
    heldout-before.json  the student's figures before the first step
    metrics.jsonl        loss, learning rate and the student's figures; held-out ones when measured; a line each
    checkpoint-N/        whole checkpoints to resume from
    model.safetensors, config.json, tokenizer files   the student, a plain Hugging Face model
    summary.json         what `--json` prints, written last
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

import kdcache
from kdcache.cache import Cache, open_cache
from kdcache.errors import ConfigError, ModelError
from kdcache.pretrained import find_device
from kdcache.store.durable import storage_errors
from kdcache.student import checkpoints, readers
from kdcache.student.config import TrainConfig
from kdcache.student.data import split_heldout
from kdcache.student.measure import measure
from kdcache.student.model import load_student
from kdcache.student.schedule import Schedule
from kdcache.student.trainer import DistillationTrainer, arguments

CONFIG, BEFORE, METRICS, SUMMARY = "train-student.json", "heldout-before.json", "metrics.jsonl", "summary.json"

_READING = ("cache", "readers", "local_copy", "local_limit")
_FREE_TO_CHANGE = (*_READING, "out", "resume", "device", "save_every", "keep", "eval_every", "kdcache", "torch")

_LOGGED = (
    "loss", "grad_norm", "learning_rate", "nll", "kl", "top1_agreement", "kept_mass", "log_partition",
)  # fmt: skip

Progress = Callable[[int, int, dict[str, float]], None]
"""Called with steps done, steps to do, and the latest figures."""


def train(config: TrainConfig, on_progress: Progress | None = None) -> dict[str, Any]:
    """Train a student from a cache.

    Returns:
        The summary that `kdcache train-student --json` prints.

    Raises:
        KdcacheError: see the exception tree.
    """
    started = time.perf_counter()
    cache = open_cache(config.cache, local_copy=config.local_copy, local_limit=config.local_limit)
    _ = cache.tokenizer_path  # it goes into the checkpoint: checked now, not after hours of training
    if config.soft_weight > 0 and not any(commit.positions for commit in cache.commits.values()):
        raise ConfigError(
            f"no position of {config.cache} carries a target (--positions {cache.manifest.positions}), so there is "
            "nothing to distil; dump with a lower X, or train on its labels alone with --soft-weight 0"
        )
    train_rows, heldout_rows = split_heldout(len(cache), config.heldout)
    steps = _steps(config, len(train_rows))
    schedule = Schedule.of(config, cache.manifest, steps)
    out, leader = Path(config.out), int(os.environ.get("RANK", "0")) == 0
    fields = _record(config, cache)
    if leader:  # the other ranks start no step without it
        _require_free_or_same(out, config.resume, fields)
    if config.resume and (out / SUMMARY).exists():
        summary: dict[str, Any] = json.loads((out / SUMMARY).read_text())
        return summary

    device = find_device(config.device)
    model = load_student(config.student, cache, device, config.seed)
    if leader:
        with storage_errors(out):
            out.mkdir(parents=True, exist_ok=True)
            _write(out / CONFIG, fields)
    args = arguments(config, steps, device, cache.place.remote)
    _ = args.device
    args._n_gpu = min(args.n_gpu, 1)  # several GPUs in one process would mean DataParallel; torchrun is the way
    before = _before(out, leader, lambda: measure(model, cache, heldout_rows, args.device, config.batch_rows))

    resumable = checkpoints.complete(out) if config.resume else []
    first_step = int(resumable[-1].name.rpartition("-")[2]) if resumable else 0
    watcher = _Watcher(out if leader else None, first_step, config.eval_every, on_progress)
    trainer = DistillationTrainer(model, cache, train_rows, config, schedule, args, [watcher])
    watcher.measure = lambda: measure(trainer.model, cache, heldout_rows, args.device, config.batch_rows)
    training = time.perf_counter()
    with readers.in_our_words():
        trainer.train(resume_from_checkpoint=str(resumable[-1]) if resumable else None)
    training_seconds = time.perf_counter() - training

    after = measure(trainer.model, cache, heldout_rows, args.device, config.batch_rows)
    if not math.isfinite(after["nll"]):
        raise ModelError(
            f"the training diverged: the held-out nll is {after['nll']}; lower --lr, then start in another --out"
        )
    positions = int(trainer.accelerator.reduce(torch.tensor(trainer.positions, device=args.device)).item())
    seconds = time.perf_counter() - started
    summary = {
        "out": str(out),
        "steps": steps,
        "positions": positions,
        "rows": {"train": len(train_rows), "heldout": len(heldout_rows)},
        "heldout": {"before": before, "after": after},
        "seconds": seconds,
        "training_seconds": training_seconds,
        "positions_per_second": positions / seconds,
    }
    if leader:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(out)
        for path in cache.tokenizer_path.iterdir():
            shutil.copyfile(path, out / path.name)
        _write(out / SUMMARY, summary)
    if torch.distributed.is_initialized():  # a rank that exits with its group open aborts now and then
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.state.destroy_process_group()
    return summary


def _record(config: TrainConfig, cache: Cache) -> dict[str, Any]:
    """What a run is: its configuration, with the student's place made absolute, and its surroundings."""
    student = Path(config.student).expanduser()
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return {
        **dataclasses.asdict(config),
        "student": str(student.resolve()) if student.exists() else config.student,
        "rows_per_step": config.batch_rows * config.accumulate * world,
        "cache_sha256": cache.manifest.sha256,
        "kdcache": kdcache.__version__,
        "torch": torch.__version__,
    }


def _require_free_or_same(out: Path, resume: bool, fields: dict[str, Any]) -> None:
    """Refuse a folder of something else, a run that is not to be resumed, and a run of another configuration."""
    standing = out / CONFIG
    if standing.exists():
        if not resume:
            raise ConfigError(
                f"--out {out} already holds a training run; pass --resume to go on with it, or another folder"
            )
        old = json.loads(standing.read_text())
        differing = [
            f"{name} (was {old.get(name)}, now {value})"
            for name, value in fields.items()
            if name not in _FREE_TO_CHANGE and old.get(name) != value
        ]
        if differing:
            raise ConfigError(f"--out {out} holds a run of another configuration; it differs in {', '.join(differing)}")
    elif out.exists() and (not out.is_dir() or any(not p.name.startswith(".") for p in out.iterdir())):
        raise ConfigError(f"--out {out} holds other files and no training run; choose another folder")


def _steps(config: TrainConfig, rows: int) -> int:
    if config.steps is not None:
        return config.steps
    world = int(os.environ.get("WORLD_SIZE", "1"))
    return max(1, math.ceil((config.epochs or 1.0) * rows / (config.batch_rows * config.accumulate * world)))


def _before(out: Path, leader: bool, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Held-out figures before the first step, measured once a run."""
    path = out / BEFORE
    if path.exists():
        standing: dict[str, Any] = json.loads(path.read_text())
        return standing
    figures = run()
    if leader:
        _write(path, figures)
    return figures


def _write(path: Path, value: dict[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


class _Watcher(TrainerCallback):  # type: ignore[misc]
    """Writes metrics.jsonl, measures the held-out rows on the way, and reports progress."""

    def __init__(self, out: Path | None, first_step: int, eval_every: int, on_progress: Progress | None) -> None:
        self._path = None if out is None else out / METRICS
        self._first_step, self._eval_every, self._on_progress = first_step, eval_every, on_progress
        self._latest: dict[str, float] = {}
        self.measure: Callable[[], dict[str, Any]] | None = None
        if self._path is not None and self._path.exists():  # lines after the checkpoint will be written again
            lines = [ln for ln in self._path.read_text().splitlines() if _step_of(ln) <= first_step]
            self._path.write_text("".join(line + "\n" for line in lines))

    def on_log(self, _args: Any, state: Any, _control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        figures = {k: v for k, v in (logs or {}).items() if k in _LOGGED}
        if figures:
            self._latest.update(figures)
            self._append({"step": state.global_step, **figures})

    def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
        if self._eval_every and state.global_step % self._eval_every == 0 and self.measure is not None:
            figures = self.measure()
            known = {f"heldout {name}": figures[name] for name in ("nll", "kl") if figures[name] is not None}
            self._latest.update(known)
            self._append({"step": state.global_step, "heldout": figures})
        if self._on_progress:
            self._on_progress(state.global_step, state.max_steps, self._latest)

    def _append(self, line: dict[str, Any]) -> None:
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a run that was killed may be half a line
        return math.inf
