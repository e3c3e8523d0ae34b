"""Learning rate and soft weight over a run: as documented, and the same after a resume."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcache import open_cache
from kdcache.errors import ConfigError
from kdcache.student.config import TrainConfig
from kdcache.student.schedule import Schedule
from kdcache.student.train import train


def options(cache: Path, student: Path, out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {"steps": 20, "batch_rows": 2, "lr": 1e-3, "heldout": 0.1, "device": "cpu", "warmup": 0.2}
    return TrainConfig(**{**usual, "cache": str(cache), "student": str(student), "out": str(out), **changes})


def shape(name: str, step: int) -> float:
    """Of 20 steps, 4 of them warmup and 4 of them descent."""
    rise = min(1.0, step / 4)
    return {
        "constant": rise,
        "cosine": rise if step < 4 else (1 + math.cos(math.pi * (step - 4) / 16)) / 2,
        "wsd": rise if step < 16 else (1 + math.cos(math.pi * (step - 16) / 4)) / 2,
    }[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
def test_the_learning_rate(name: str, cache: Path, student_config: Path, tmp_path: Path) -> None:
    train(options(cache, student_config, tmp_path / "s", schedule=name))
    lines = [json.loads(line) for line in (tmp_path / "s/metrics.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}
    assert list(rates) == list(range(1, 21))
    assert rates == pytest.approx({step: 1e-3 * shape(name, step - 1) for step in rates}, abs=1e-12)


def test_the_soft_weight(cache: Path, student_config: Path, tmp_path: Path) -> None:
    manifest = open_cache(cache).manifest

    def weights(name: str, steps: int = 20, **changes: Any) -> list[float]:
        config = options(cache, student_config, tmp_path, soft_schedule=name, soft_weight=0.8, **changes)
        schedule = Schedule.of(config, manifest, steps)
        return [schedule.at(step).soft_weight / 0.8 for step in range(steps + 1)]

    assert weights("constant") == [1] * 21
    rise, fall = [0, 0.25, 0.5, 0.75], [1, 0.75, 0.5, 0.25, 0]
    assert weights("wsd") == pytest.approx([*rise, *[1] * 12, *fall])
    assert weights("wsd", warmup=0.0) == pytest.approx([*[1] * 16, *fall])
    assert weights("linear") == pytest.approx([1 - step / 20 for step in range(21)])
    assert weights("cosine") == pytest.approx([math.cos(math.pi * step / 40) ** 2 for step in range(21)])
    for name in ("wsd", "linear", "cosine"):
        for steps in (1, 2, 3):
            assert all(0 <= weight <= 1 for weight in weights(name, steps, warmup=1.0))
    with pytest.raises(ConfigError, match="soft_schedule down is not one of constant, wsd, cosine, linear"):
        weights("down")


@pytest.mark.slow
def test_a_moving_soft_weight_trains_on_both_terms(cache: Path, student_config: Path, tmp_path: Path) -> None:
    """At step 0 of `wsd` the labels alone are learned, whatever --soft-weight says."""
    losses = []
    for changes in ({"soft_schedule": "wsd", "soft_weight": 1.0}, {"soft_weight": 0.0}, {"soft_weight": 1.0}):
        out = tmp_path / f"s{len(losses)}"
        train(options(cache, student_config, out, steps=1, warmup=1.0, **changes))
        losses.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[0])["loss"])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wsd", pytest.param("linear", marks=pytest.mark.long)])
def test_a_resumed_run_has_the_same_weights(name: str, cache: Path, student_config: Path, tmp_path: Path) -> None:
    def config(out: Path, **changes: Any) -> TrainConfig:
        steps = {"steps": 10, "save_every": 5, "temperature": "2:1", "schedule": "wsd", "soft_schedule": name}
        return options(cache, student_config, out, **steps, **changes)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train(config(whole))
    shutil.copytree(whole, stopped, ignore=shutil.ignore_patterns("summary.json", "checkpoint-10"))
    (stopped / "model.safetensors").unlink()
    train(config(stopped, resume=True))
    one, two = (load_file(folder / "model.safetensors") for folder in (whole, stopped))
    assert all(torch.equal(one[key], two[key]) for key in one)
    told = [[json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (whole, stopped)]
    for line in (*told[0], *told[1]):
        line.pop("data_wait_share", None)  # a time
    assert told[0] == told[1]
