"""From how many passes on a cache pays: what `kdcache plan` says against runs of both ways.

    python -m benchmarks.break_even [--assets DIR] [--teacher NAME] [--corpus NAME] [--documents 400] [--core N]
                                    [--select topk] [--k 64] [--json FILE]

Cached: one dump, then passes of training from the cache. Live: passes of the same trainer with the same student, rows
and loss, whose targets the teacher makes when a step needs them; the rows lie tokenised in memory. Both ways are really
run, a process each, over all rows of the corpus, or 12 steps if that is more. The cache pays from (seconds of the dump)
/ (seconds of a live pass - seconds of a cached pass) passes on.

Everything runs on one core with one thread, and the clock is the processor's: on a core that nobody else uses it is the
wall's, and other programs do not count. Peak memory is that of the real processes of dump and training.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.record import write

SEQ_LEN = {"stories260K": 256, "lab32k": 128}
CORPORA = ("tinystories.txt", "wikitext2-valid.txt")
STUDENTS = {
    "stories260K": {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4},
    "lab32k": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
}
"""Layers of each teacher's student; both have a fraction of their teacher's."""

BATCH_ROWS, LEAST_STEPS = 8, 12
SITE = "import time; time.perf_counter = time.process_time\n"
"""What makes every clock of a process, and of the processes that it starts, the processor's."""


def student_of(teacher: Path, out: Path) -> Path:
    """The configuration of the teacher's student."""
    theirs = json.loads((teacher / "config.json").read_text())
    shape = {**STUDENTS[teacher.name], "vocab_size": theirs["vocab_size"], "max_position_embeddings": 512}
    shape["num_key_value_heads"] = shape["num_attention_heads"]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True, **shape}
    out.write_text(json.dumps(config))
    return out


def run(command: list[str], core: int, scratch: Path) -> tuple[dict[str, Any], int]:
    """What a command prints, and its peak memory in bytes."""
    (scratch / "site").mkdir(exist_ok=True)
    (scratch / "site/sitecustomize.py").write_text(SITE)
    paths = [str(scratch / "site"), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), str(Path.cwd())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    with (scratch / "out.json").open("w+b") as output:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), sys.executable, "-m", *command], stdout=output, env=environment
        )
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{command[1]} ended with {status}")
        output.seek(0)
        return json.load(output), used.ru_maxrss * 1024


def passes(options: argparse.Namespace) -> dict[str, float]:
    """Train, live or from a cache; seconds of a pass by those of the steps after the first."""
    from transformers import TrainerCallback

    from kdcache.cache import open_cache
    from kdcache.pretrained import find_device
    from kdcache.rows import PackedRow
    from kdcache.student.config import TrainConfig
    from kdcache.student.mixture import Mixture
    from kdcache.student.model import load_student
    from kdcache.student.schedule import Schedule
    from kdcache.student.trainer import DistillationTrainer, arguments
    from kdcache.targets import SparseTargets
    from kdcache.teacher.engines.base import TargetRequest, TeacherSpec
    from kdcache.teacher.open_teacher import open_teacher

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    class LiveRows:
        """Rows in memory, their targets from the teacher when they are asked for."""

        def __init__(self, manifest: Any, rows: list[PackedRow], teacher: Any) -> None:
            self.manifest, self.rows, self.teacher = manifest, rows, teacher
            self.request = TargetRequest.of(manifest)

        def read_packed(self, index: int) -> tuple[PackedRow, SparseTargets]:
            return next(self.read_rows([index]))

        def read_rows(self, indices: Iterable[int]) -> Iterator[tuple[PackedRow, SparseTargets]]:
            rows = [self.rows[i] for i in indices]
            found = self.teacher.targets(rows, self.request)
            yield from zip(rows, found.targets.split(found.counts), strict=True)

    cache, device = open_cache(options.cache), find_device("cpu")
    config = TrainConfig(cache=options.cache, student=options.student, out=options.out, device="cpu",
                         batch_rows=BATCH_ROWS)  # fmt: skip
    rows = range(len(cache))
    steps = max(LEAST_STEPS, len(cache) // BATCH_ROWS)
    model = load_student(config.student, cache, device, config.seed)
    args = dataclasses.replace(arguments(config, steps, device, remote=False), save_strategy="no")
    mixture, schedule = Mixture([len(rows)], config.seed, [1.0]), Schedule.of(config, cache.manifest, steps)
    reader: Any = cache
    if options.live:
        spec = TeacherSpec(model=options.teacher, engine="transformers", device="cpu", batch_rows=BATCH_ROWS)
        request = TargetRequest.of(cache.manifest)
        teacher = open_teacher(spec, cache.manifest.row_spec, request, cache.manifest.position_filter)
        reader = LiveRows(cache.manifest, [row for row, _ in cache.read_rows(rows)], teacher)
    trainer = DistillationTrainer(model, [reader], [rows], mixture, config, schedule, args, [Clock()])
    trainer.train()
    a_row = (ends[-1] - ends[0]) / (steps - 1) / BATCH_ROWS
    return {"seconds": a_row * len(rows), "rows": len(rows), "steps": steps}


def measure(options: argparse.Namespace, teacher: Path, corpus: Path) -> dict[str, Any]:
    """Plan, dump, train both ways, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        student = student_of(teacher, scratch / "config.json")
        asked = [
            "--teacher", str(teacher), "--corpus", str(corpus), "--seq-len", str(SEQ_LEN[teacher.name]),
            "--select", options.select, "--k", str(options.k), "--device", "cpu", "--batch-rows", str(BATCH_ROWS),
            "--limit-docs", str(options.documents), "--json",
        ]  # fmt: skip
        cli, ours = "kdcache_cli", ["benchmarks.break_even", "--pass"]
        cache, core = str(scratch / "cache"), options.core
        plan, _ = run([cli, "plan", *asked, "--student", str(student)], core, scratch)
        made, dump_memory = run([cli, "dump-teacher", *asked, "--out", cache], core, scratch)
        whole, training_memory = run(
            [cli, "train-student", "--cache", cache, "--student", str(student), "--out", str(scratch / "student"),
             "--device", "cpu", "--epochs", "1", "--json"], core, scratch,
        )  # fmt: skip
        one = ["--cache", cache, "--teacher", str(teacher), "--student", str(student), "--out", str(scratch / "pass")]
        cached, _ = run([*ours, *one], core, scratch)
        live, _ = run([*ours, *one, "--live"], core, scratch)
    at = made["seconds"] / (live["seconds"] - cached["seconds"])
    planned = plan["training"]
    return {
        "teacher": teacher.name,
        "corpus": corpus.name,
        "positions": made["positions"],
        "dump_seconds": made["seconds"],
        "cached_pass_seconds": cached["seconds"],
        "live_pass_seconds": live["seconds"],
        "train_student_seconds": whole["training_seconds"],
        "break_even_passes": at,
        "planned": planned,
        "planned_seconds": plan["seconds"],
        "ratios": {
            "bytes": plan["bytes"] / made["bytes"],
            "seconds": plan["seconds"]["total"] / made["seconds"],
            "cached pass": planned["student_seconds_per_pass"] / cached["seconds"],
            "live pass": (planned["live_seconds"] / planned["passes"]) / live["seconds"],
            "break-even": planned["break_even_passes"] / at,
            "dump memory": plan["memory"]["dump"]["peak_bytes"] / dump_memory,
            "training memory": plan["memory"]["training"]["peak_bytes"] / training_memory,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", default=os.environ.get("KDCACHE_ASSETS", "."))
    parser.add_argument("--teacher", help="only this one")
    parser.add_argument("--corpus", choices=CORPORA, help="only this one")
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--select", default="topk")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--json", help="a file for the results")
    for name in ("--pass", "--live"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    for name in ("--cache", "--student", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if getattr(options, "pass"):
        print(json.dumps({**passes(options), "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
        return
    assets, results = Path(options.assets), []
    date = time.strftime("%Y-%m-%d")
    print(f"{date}, one core, {options.select} {options.k}, {options.documents} documents; plan / run")
    for name in [options.teacher] if options.teacher else SEQ_LEN:
        for corpus in [options.corpus] if options.corpus else CORPORA:
            found = measure(options, assets / "models" / name, assets / "text" / corpus)
            results.append(found)
            words = ", ".join(f"{what} {ratio:.2f}" for what, ratio in found["ratios"].items())
            print(f"{name} {corpus}: {found['positions']:,} positions, dump {found['dump_seconds']:.1f} s, pass cached "
                  f"{found['cached_pass_seconds']:.1f} s, live {found['live_pass_seconds']:.1f} s, break-even "
                  f"{found['break_even_passes']:.2f}; {words}", flush=True)  # fmt: skip
    settings = {name: getattr(options, name) for name in ("documents", "select", "k")}
    write(options.json, "cpu", settings, results)


if __name__ == "__main__":
    main()
