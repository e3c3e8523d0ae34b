"""A training step from a cache compared with the same student's plain cross-entropy step: same Trainer, same rows.

    python -m benchmarks.step [--teacher DIR] [--corpus FILE] [--limit-docs 150] [--rounds 5] [--steps 5]
                              [--shape 200m] [--device cuda] [--json FILE]

The baseline is the student's own loss as transformers makes it, from logits in memory; Trainer, optimiser, rows, their
order and the reading of the cache are the same. The student has the teacher's shape and random initial weights. A step
is timed from the end of the one before it, so waiting for rows counts. Each round runs all of them, and the order
rotates by one each round; the first step of each is not counted. Ratios are of the medians and of the least.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainerCallback

from benchmarks.record import write
from benchmarks.teachers import SHAPES, make_teacher
from kdcache import open_cache
from kdcache.student.config import TrainConfig
from kdcache.student.mixture import Mixture
from kdcache.student.schedule import Schedule
from kdcache.student.trainer import DistillationTrainer, arguments
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.dump import dump

CACHES: dict[str, dict[str, Any]] = {"ipps 12": {"select": "ipps", "k": 12}, "topk 64": {"k": 64}}
PLAIN = "cross-entropy, ipps 12"
WAYS = {
    PLAIN: ("ipps 12", 0.0),
    "ipps 12": ("ipps 12", 1.0),
    "topk 64": ("topk 64", 1.0),
    "topk 64 and labels": ("topk 64", 0.9),
}


class PlainTrainer(DistillationTrainer):
    """The same Trainer with the student's own loss."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = model(
            input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False,
            labels=inputs["labels"], shift_labels=inputs["shift_labels"], num_items_in_batch=num_items_in_batch[0],
        ).loss  # fmt: skip
        return (loss, {}) if return_outputs else loss


class Clock(TrainerCallback):  # type: ignore[misc]
    """Records when each step ends."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def seconds(way: str, folder: Path, model: Any, config: TrainConfig, steps: int) -> list[float]:
    """Seconds of each step except the first."""
    name, soft_weight = WAYS[way]
    cache = open_cache(folder / name)
    config = dataclasses.replace(config, cache=str(folder / name), soft_weight=soft_weight)
    args = arguments(config, steps + 1, torch.device(config.device), remote=False)
    args.save_strategy = "no"
    clock, rows = Clock(), range(len(cache))
    make = PlainTrainer if way == PLAIN else DistillationTrainer
    schedule = Schedule.of(config, cache.manifest, steps + 1)
    mixture = Mixture([len(rows)], config.seed, [1.0])
    make(copy.deepcopy(model), [cache], [rows], mixture, config, schedule, args, [clock]).train()
    return [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]


def main() -> None:
    assets = Path(os.environ.get("KDCACHE_ASSETS", "."))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(assets / "models/lab32k"))
    parser.add_argument("--corpus", default=str(assets / "text/wikitext2-valid.txt"))
    parser.add_argument("--limit-docs", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-rows", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, help="a random teacher of a known shape, instead of --teacher")
    parser.add_argument("--json", help="a file for the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if options.shape:
            options.teacher = made
            make_teacher(Path(made), options.shape, Path(options.corpus))
        report(options)


def report(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.teacher), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, changes in CACHES.items():
            made = dump(
                DumpConfig(
                    teacher=options.teacher,
                    corpus=options.corpus,
                    out=str(folder / name),
                    device=options.device,
                    limit_docs=options.limit_docs,
                    **changes,
                )
            )
        config = TrainConfig(
            cache=str(folder), student="", out=str(folder / "out"), batch_rows=options.batch_rows,
            device=options.device,
        )  # fmt: skip
        print(
            f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
            f"{options.device}, {options.shape or Path(options.teacher).name}'s shape, {made['rows']} rows, "
            f"{options.batch_rows} of 512 slots a step"
        )
        found: dict[str, list[float]] = {way: [] for way in WAYS}
        names = list(WAYS)
        for turn in range(options.rounds):
            first = turn % len(names)
            for way in names[first:] + names[:first]:
                found[way] += seconds(way, folder, model, config, options.steps)
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "teacher", "corpus")}
    write(options.json, options.device, settings, {"seconds": found})
    print(f"{'':24} median   ratio    least   ratio")
    plain = found[PLAIN]
    for way, each in found.items():
        print(
            f"{way:24} {statistics.median(each):6.3f}  {statistics.median(each) / statistics.median(plain):6.2f}   "
            f"{min(each):6.3f}  {min(each) / min(plain):6.2f}"
        )


if __name__ == "__main__":
    main()
