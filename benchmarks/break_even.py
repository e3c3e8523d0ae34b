"""From how many passes on a cache pays: what `kdcache plan` says against runs of both ways.

    python -m benchmarks.break_even [--assets DIR] [--teacher NAME] [--corpus NAME] [--documents 400] [--core N]
                                    [--select topk] [--k 64] [--json FILE]

Cached: one dump, then passes of training from the cache. Live: the same steps of the same student, with the same rows
and loss, whose targets the teacher makes when a step needs them; the rows lie tokenised in memory. The steps of both
ways take turns in one process, so that whatever slows a machine slows both. The cache pays from (seconds of the dump) /
(seconds of a live pass - seconds of a cached pass) passes on.

Everything runs on one core with one thread, and the clock is the processor's: on a core that nobody else uses it is the
wall's, and other programs do not count. Peak memory is that of the real processes of dump and training.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.peak import output_and_peak
from benchmarks.record import write

SEQ_LEN = {"stories260K": 256, "lab32k": 128}
CORPORA = ("tinystories.txt", "wikitext2-valid.txt")
STUDENTS = {
    "stories260K": {"hidden_size": 32, "intermediate_size": 88, "num_hidden_layers": 2, "num_attention_heads": 4},
    "lab32k": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 2, "num_attention_heads": 4},
}
"""Layers of each teacher's student; both have a fraction of their teacher's."""

BATCH_ROWS, STEPS = 8, 12
"""Rows of a step, and steps of each way at least."""
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
    output, peak = output_and_peak(["taskset", "-c", str(core), sys.executable, "-m", *command], environment)
    return json.loads(output), peak


def take_steps(options: argparse.Namespace) -> dict[str, float]:
    """Train two students, from the cache and live, in turns; seconds for a row, the first step of each left out."""
    import torch

    from kdcache.cache import open_cache
    from kdcache.losses import Figures, Objective
    from kdcache.student import Collator, compute_loss, fuse_head, load_student
    from kdcache.student.data import Item
    from kdcache.teacher.engines.base import TargetRequest, TeacherSpec
    from kdcache.teacher.open_teacher import open_teacher

    cache = open_cache(options.cache)
    manifest = cache.manifest
    request, collate = TargetRequest.of(manifest), Collator([cache])
    spec = TeacherSpec(model=options.teacher, engine="transformers", device="cpu", batch_rows=BATCH_ROWS)
    teacher = open_teacher(spec, manifest.row_spec, request, manifest.position_filter)
    rows = [row for row, _ in cache.read_rows(range(len(cache)))]
    students = []
    for _ in range(2):
        model = load_student(options.student, cache, torch.device("cpu"), 0)
        students.append((model, fuse_head(model, "cpu"), torch.optim.AdamW(model.parameters(), 1e-4)))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    seconds: dict[str, list[float]] = {name: [] for name in ("cached", "reading", "live", "teacher")}
    for step in range(max(STEPS, len(rows) // BATCH_ROWS)):
        chosen = [order[(step * BATCH_ROWS + i) % len(rows)] for i in range(BATCH_ROWS)]
        ways = (("cached", "reading", students[0]), ("live", "teacher", students[1]))
        for name, part, (model, head, optimizer) in ways if step % 2 else reversed(ways):
            started = time.perf_counter()
            if name == "cached":
                found = list(cache.read_rows(chosen))
            else:
                made = teacher.targets([rows[i] for i in chosen], request)
                found = list(zip((rows[i] for i in chosen), made.targets.split(made.counts), strict=True))
            seconds[part].append(time.perf_counter() - started)
            batch = collate([Item(*each, 0, i) for each, i in zip(found, chosen, strict=True)])
            loss = compute_loss(model, head, batch, Objective(), vocab_size=manifest.vocab_size, figures=Figures())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds[name].append(time.perf_counter() - started)
    return {name: sum(each[1:]) / (len(each) - 1) / BATCH_ROWS for name, each in seconds.items()}


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
        cli, cache, core = "kdcache_cli", str(scratch / "cache"), options.core
        plan, _ = run([cli, "plan", *asked, "--student", str(student)], core, scratch)
        made, dump_memory = run([cli, "dump-teacher", *asked, "--out", cache], core, scratch)
        whole, training_memory = run(
            [cli, "train-student", "--cache", cache, "--student", str(student), "--out", str(scratch / "student"),
             "--device", "cpu", "--epochs", "1", "--json"], core, scratch,
        )  # fmt: skip
        steps, _ = run(
            ["benchmarks.break_even", "--steps", "--cache", cache, "--teacher", str(teacher), "--student",
             str(student)], core, scratch,
        )  # fmt: skip
    a_pass = {name: made["rows"] * seconds for name, seconds in steps.items()}
    at = made["seconds"] / (a_pass["live"] - a_pass["cached"])
    planned = plan["training"]
    return {
        "teacher": teacher.name,
        "corpus": corpus.name,
        "positions": made["positions"],
        "dump_seconds": made["seconds"],
        "pass_seconds": a_pass,
        "train_student_seconds": whole["training_seconds"],
        "break_even_passes": at,
        "planned": planned,
        "planned_seconds": plan["seconds"],
        "ratios": {
            "bytes": plan["bytes"] / made["bytes"],
            "seconds": plan["seconds"]["total"] / made["seconds"],
            "cached pass": planned["student_seconds_per_pass"] / a_pass["cached"],
            "live pass": (planned["live_seconds"] / planned["passes"]) / a_pass["live"],
            "break-even": (planned["break_even_passes"] or float("inf")) / at,
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
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    for name in ("--cache", "--student"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps:
        print(json.dumps(take_steps(options)))
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
                  f"{found['pass_seconds']['cached']:.1f} s, live {found['pass_seconds']['live']:.1f} s, break-even "
                  f"{found['break_even_passes']:.2f}; {words}", flush=True)  # fmt: skip
    settings = {name: getattr(options, name) for name in ("documents", "select", "k")}
    write(options.json, "cpu", settings, results)


if __name__ == "__main__":
    main()
