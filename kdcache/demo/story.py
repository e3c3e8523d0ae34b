"""The story: a teacher, its cache, and the same small student trained twice from one start.

The documents are split once. The teacher learns from the larger part; the cache, the students
and the held-out rows come from the rest, which the teacher has never seen. The two students
differ in one number: `soft_weight` is 1 for the distilled one and 0 for labels alone.
What happened is printed, whatever it is.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.corpus.packing import pack
from kdcache.corpus.tokenise import Tokeniser
from kdcache.demo.manuals import manuals
from kdcache.demo.model import llama_config, train_teacher, train_tokenizer, write_config
from kdcache.errors import ConfigError
from kdcache.report.inspect import inspect_position, inspect_summary
from kdcache.report.plots import plot_curves
from kdcache.store.atomic_files import storage_errors
from kdcache.student.config import TrainConfig
from kdcache.student.train import BEFORE, METRICS, train
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.dump import dump
from kdcache.worker import available_cores

SEQ_LEN = 256
_STUDENT_SHARE = 0.25  # of the documents
_SHARES = {"teacher": 0.68, "students": 0.2}  # of the time; the rest is the dump and the small things
_STUDENT_STEPS = 400


@dataclass
class _Clock:
    """Times each stage by name."""

    stages: list[dict[str, Any]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        entry: dict[str, Any] = {"name": name}
        started = time.perf_counter()
        yield entry
        entry["seconds"] = time.perf_counter() - started
        self.stages.append(entry)


def play(out: str, seconds: float, seed: int, on_progress: Callable[..., None]) -> dict[str, Any]:
    """Play the demo into a new folder.

    Args:
        out: where everything goes.
        seconds: time for all stages together.
        seed: of the split, the weights and the order of rows.
        on_progress: called with (done, total, what is happening).

    Returns:
        The summary that `kdcache demo --json` prints and `summary.json` holds.

    Raises:
        ConfigError: the folder is not empty, or the time is not positive.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{out} is not empty; choose a new folder or delete it")
    if not seconds > 0:
        raise ConfigError(f"budget is {seconds / 60:g} minutes, but must be positive")
    if seed < 0:
        raise ConfigError(f"seed is {seed}, but must not be negative")
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(available_cores())
    clock = _Clock()

    def note(what: str) -> Callable[..., None]:
        return lambda done, total, *_: on_progress(done, total, what)

    with clock.stage("corpus"):
        texts = manuals()
        order = np.random.default_rng(seed).permutation(len(texts))
        cut = round(_STUDENT_SHARE * len(texts))
        student_texts, teacher_texts = ([texts[i] for i in part] for part in (order[:cut], order[cut:]))
        corpus = folder / "student-corpus.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in student_texts), encoding="utf-8")
    teacher = folder / "teacher"
    with clock.stage("tokenizer"):
        tokenizer = train_tokenizer(texts, teacher)
        tokeniser = Tokeniser(tokenizer, len(tokenizer))
        rows = pack(tokeniser.texts(list(enumerate(teacher_texts))), SEQ_LEN).rows
    with clock.stage("teacher") as entry:
        entry["steps"] = train_teacher(
            rows, llama_config(192, 4, SEQ_LEN), teacher, seconds=_SHARES["teacher"] * seconds, most_steps=3000,
            seed=seed, seq_len=SEQ_LEN, on_progress=note("training the teacher"),
        )  # fmt: skip
    with clock.stage("dump"):
        dumped = dump(
            DumpConfig(teacher=str(teacher), corpus=str(corpus), out=str(folder / "cache"), seq_len=SEQ_LEN, k=32,
                       precision="float16", temperatures="1"),
            note("dumping the teacher"),
        )  # fmt: skip
    with clock.stage("inspect"):
        cache = str(folder / "cache")
        shown = {"summary": inspect_summary(cache), "position": inspect_position(cache, 0, 24)}
    student = folder / "student.json"
    write_config(llama_config(96, 2, SEQ_LEN), student)
    share = _SHARES["students"] * seconds / 2
    steps = _affordable_steps(cache, student, folder / "calibration", share, seed)
    runs = {}
    for name, soft_weight in (("distilled", 1.0), ("labels", 0.0)):
        with clock.stage(name) as entry:
            config = _student(cache, student, folder / name, soft_weight, steps, seed)
            runs[name] = train(config, note(f"training the student ({name})"))
            entry["steps"] = steps
    curves = {label: _curve(folder / name) for name, label in (("distilled", "distilled"), ("labels", "labels alone"))}
    after = {name: run["heldout"]["after"] for name, run in runs.items()}
    teacher_nll = after["distilled"]["teacher_nll"]
    plot = folder / "heldout.png"
    plot_curves(
        plot, curves, level=("teacher", teacher_nll), ylabel="held-out negative log-likelihood (nats)",
        title=f"The same student, {steps} steps from the same start",
    )  # fmt: skip
    summary = {
        "out": out,
        "teacher_nll": teacher_nll,
        "distilled_nll": after["distilled"]["nll"],
        "label_only_nll": after["labels"]["nll"],
        "kl": {"distilled": after["distilled"]["kl"], "label_only": after["labels"]["kl"]},
        "kl_kind": after["distilled"]["kl_kind"],
        "bytes_per_position": dumped["bytes_per_position"],
        "positions": dumped["positions"],
        "students": {"before": runs["distilled"]["heldout"]["before"], **after},
        "steps": steps,
        "seconds": sum(stage["seconds"] for stage in clock.stages),
        "stages": clock.stages,
        "inspect": shown,
        "plot": str(plot),
        "verdict": _verdict(after),
    }
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _student(cache: str, student: Path, out: Path, soft_weight: float, steps: int, seed: int) -> TrainConfig:
    return TrainConfig(
        cache=(cache,), student=str(student), out=str(out), soft_weight=soft_weight, steps=steps, lr=3e-3, heldout=0.08,
        eval_every=max(1, steps // 10), save_every=steps, keep=1, seed=seed, device="cpu",
    )  # fmt: skip


def _affordable_steps(cache: str, student: Path, scratch: Path, seconds: float, seed: int) -> int:
    """Steps that fit the time of one student, by timing a few; the same number serves both."""
    trial = 20
    timing = train(dataclasses.replace(_student(cache, student, scratch, 1.0, trial, seed), eval_every=0))
    return max(trial, min(_STUDENT_STEPS, int(0.8 * seconds / (timing["training_seconds"] / trial))))


def _curve(run: Path) -> list[tuple[int, float]]:
    points = [(0, float(json.loads((run / BEFORE).read_text())["nll"]))]
    lines = [json.loads(line) for line in (run / METRICS).read_text().splitlines()]
    return points + [(line["step"], line["heldout"]["nll"]) for line in lines if "heldout" in line]


def _verdict(after: dict[str, dict[str, Any]]) -> str:
    gain = after["labels"]["nll"] - after["distilled"]["nll"]
    how = f"{abs(gain):.4f} nats a token {'better' if gain > 0 else 'worse'} than"
    return f"after the same steps the distilled student is {how} the one trained on labels alone"
