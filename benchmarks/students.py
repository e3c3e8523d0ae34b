"""Students: held-out figures after training on unbiased draws, on everything, and on labels alone, in the same steps.

    python -m benchmarks.students --teacher DIR --corpus FILE --work DIR [--seeds 3] [--steps 150] [--csv FILE]

One teacher, one corpus, two caches over the same rows: `ipps` with 12 entries, and `full`. Each student has the same
size and the same rows in the same order; a seed decides that order and the initial weights. All are measured on the
held-out rows of the `full` cache, so that their KL is the dense one. Results that exist already are not computed again.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from kdcache.report.evaluate import evaluate
from kdcache.student.config import TrainConfig
from kdcache.student.train import train
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.dump import dump

STUDENT = {
    "model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
HELDOUT = 0.1
CACHES: dict[str, dict[str, Any]] = {"ipps": {"select": "ipps", "k": 12}, "full": {"select": "full"}}
WAYS = {"ipps 12": ("ipps", 1.0), "full": ("full", 1.0), "labels alone": ("ipps", 0.0)}
FIGURES = ("nll", "delta_nll", "kl", "top1_agreement")


def run(way: str, seed: int, work: Path, steps: int) -> dict[str, float]:
    """The held-out figures of one student."""
    cache, soft_weight = WAYS[way]
    out = work / f"{way.replace(' ', '-')}-{seed}"
    found = out.with_suffix(".json")
    if found.exists():
        return dict(json.loads(found.read_text()))
    config = TrainConfig(
        cache=str(work / cache), student=str(work / "student.json"), out=str(out), soft_weight=soft_weight, steps=steps,
        batch_rows=4, lr=2e-3, heldout=HELDOUT, seed=seed, device="cpu", resume=out.exists(),
    )  # fmt: skip
    summary = train(config)
    figures = evaluate(str(out), str(work / "full"), heldout=HELDOUT, device="cpu")
    figures = {name: figures[name] for name in FIGURES} | {"seconds": summary["training_seconds"]}
    found.write_text(json.dumps(figures))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--limit-docs", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    for name, changes in CACHES.items():
        config = DumpConfig(
            teacher=options.teacher, corpus=options.corpus, out=str(work / name), seq_len=256, device="cpu",
            limit_docs=options.limit_docs, **changes,
        )  # fmt: skip
        made = dump(config)
        print(f"{name:6} {made['positions']:,} positions, {made['bytes_per_position']:,.1f} bytes each", flush=True)
    vocab = json.loads((Path(options.teacher) / "config.json").read_text())["vocab_size"]
    (work / "student.json").write_text(json.dumps({**STUDENT, "vocab_size": vocab}))
    lines = []
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {torch.__version__}, {options.steps} steps, "
        f"means and standard deviations over {options.seeds} seeds, held-out rows"
    )
    for way in WAYS:
        runs = [run(way, seed, work, options.steps) for seed in range(options.seeds)]
        for name in (*FIGURES, "seconds"):
            values = [figures[name] for figures in runs]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            lines.append([way, name, f"{statistics.mean(values):.5g}", f"{spread:.2g}"])
            print(f"{way:14} {name:16} {statistics.mean(values):9.4f} ± {spread:.4f}", flush=True)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([["student", "figure", "mean", "standard_deviation"], *lines])


if __name__ == "__main__":
    main()
