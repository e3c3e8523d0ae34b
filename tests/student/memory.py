"""Peak memory of a training run of a large vocabulary, for test_memory.py; a process of its own.

Writes memory.json, bytes: the peak above what was there before, and the weights of the student.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.head import peak_above
from kdcache.student.config import TrainConfig
from kdcache.student.train import train


def config(cache: Path, student: Path, out: Path, **changes: Any) -> TrainConfig:
    options: dict[str, Any] = {
        "steps": 1, "batch_rows": 8, "heldout": 0.5, "soft_weight": 0.5, "temperature": 2, "eval_every": 1,
        "device": "cpu", "dtype": "float32",
    }  # fmt: skip
    return TrainConfig(cache=str(cache), student=str(student), out=str(out), **{**options, **changes})


def main(small: Path, large: Path, student: Path, out: Path) -> None:
    train(config(small, out / "small.json", out / "small"))  # what libraries keep from their first use is not the run's
    peak = peak_above(lambda: train(config(large, student, out / "large")))
    weights = (out / "large/model.safetensors").stat().st_size
    (out / "memory.json").write_text(json.dumps({"peak": peak, "weights": weights}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
