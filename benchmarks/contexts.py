"""Prompt distillation: does a student without a prompt come nearer to the teacher that has read one?

    python -m benchmarks.contexts [--teacher DIR] [--text FILE] [--documents 1500] [--steps 200] [--seeds 0 1 2]

Teacher and student begin as the same model. Two caches of the same texts are dumped: in one the teacher reads a system
prompt before each text (`--teacher-system`), in the other it reads what its student does. A student is trained from
each, with the same seed and settings, and measured on the same held-out rows of the first cache, of which none is
trained on: KL(teacher with the prompt ‖ student without it), over the whole vocabulary, by running the teacher again.
"no training" is the teacher itself without the prompt; "control" is the student of the second cache.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from kdcache import open_cache
from kdcache.report.evaluate import compare
from kdcache.student.config import TrainConfig
from kdcache.student.train import train
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.dump import dump

SYSTEM = "Once upon a time, there was a big dragon named Zog. Zog was very sad because he had lost his red hat. "
HELDOUT = 0.1


def make(options: argparse.Namespace, folder: Path, system: str | None) -> str:
    """A cache of the texts."""
    out = str(folder / ("plain" if system is None else "told"))
    dump(
        DumpConfig(
            teacher=options.teacher, corpus=options.text, out=out, limit_docs=options.documents, min_chars=80,
            seq_len=256, k=64, device="cpu", teacher_system=system,
        )
    )  # fmt: skip
    return out


def main() -> None:
    assets = Path(os.environ.get("KDCACHE_ASSETS", "."))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(assets / "models/stories260K"))
    parser.add_argument("--text", default=str(assets / "text/tinystories.txt"))
    parser.add_argument("--documents", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {torch.__version__}, cpu, float32")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        told, plain = (make(options, folder, system) for system in (SYSTEM, None))
        rows, positions = len(open_cache(told)), open_cache(told).commits.total("positions")
        each = " and ".join(f"{open_cache(cache).commits.bytes / positions:.1f}" for cache in (told, plain))
        print(f"{rows} rows, {positions:,} positions, {HELDOUT:.0%} of the rows held out; {each} bytes per position")
        students = {}
        for seed in options.seeds:
            for name, cache in (("told", told), ("control", plain)):
                students[name, seed] = str(folder / f"{name}-{seed}")
                train(
                    TrainConfig(
                        cache=(cache,), student=options.teacher, out=students[name, seed], steps=options.steps,
                        batch_rows=8, lr=options.lr, heldout=HELDOUT, seed=seed, device="cpu",
                    )
                )  # fmt: skip
        names = [options.teacher, *students.values()]
        found = compare(names, told, options.teacher, heldout=HELDOUT, device="cpu")["students"]
    print(f"{'student':16}seed  KL to the teacher with the prompt  same top token")
    columns = {"no training": {"-": options.teacher}}
    for (name, seed), path in students.items():
        columns.setdefault(name, {})[str(seed)] = path
    for name, runs in columns.items():
        for seed, path in runs.items():
            figures = found[path]
            print(f"{name:16}{seed:>4}  {figures['dense_kl']:33.4f}  {figures['dense_top1_agreement']:14.3f}")
        if len(runs) > 1:
            values = [found[path]["dense_kl"] for path in runs.values()]
            print(
                f"{name:16}mean  {statistics.fmean(values):33.4f}  (standard deviation {statistics.stdev(values):.4f})"
            )


if __name__ == "__main__":
    main()
