"""The plain PyTorch example, alone and sharded over two ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache import open_cache
from kdcache.student.evaluation import measure
from tests.examples.loading import EXAMPLES
from tests.processes import PATIENCE, Ranks

STEPS = 6


def run(*command: str) -> list[float]:
    """The losses that a command prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=environment, timeout=PATIENCE
    )
    assert done.returncode == 0, done.stderr
    return losses_in(done.stdout)


def losses_in(told: str) -> list[float]:
    lines = [json.loads(line) for line in told.splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


@pytest.fixture(scope="module")
def alone(cache: Path, student_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    out = tmp_path_factory.mktemp("alone") / "s"
    return out, run(str(EXAMPLES / "plain_pytorch.py"), str(cache), str(student_config), str(out), str(STEPS))


def figures(student: Path, cache: Path) -> dict[str, Any]:
    return measure(AutoModelForCausalLM.from_pretrained(student), open_cache(cache), range(20), torch.device("cpu"))


@pytest.mark.slow
def test_it_learns_and_leaves_a_plain_model(alone: tuple[Path, list[float]], cache: Path, student_config: Path) -> None:
    from kdcache.student import load_student

    out, losses = alone
    assert losses[-1] < losses[0]
    opened = open_cache(cache)
    fresh = load_student(str(student_config), opened, torch.device("cpu"), 0)
    assert figures(out, cache)["kl"] < measure(fresh, opened, range(20), torch.device("cpu"))["kl"]
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    own, theirs = (AutoTokenizer.from_pretrained(folder).get_vocab() for folder in (out, cache / "tokenizer"))
    assert own == theirs


@pytest.mark.slow
def test_two_ranks_of_fsdp2_are_one(
    alone: tuple[Path, list[float]], cache: Path, student_config: Path, tmp_path: Path
) -> None:
    """loading.py asserts that each parameter is a DTensor, sharded."""
    both = Ranks(2, "-m", "tests.examples.loading", cache, student_config, tmp_path / "s", STEPS)
    told, words = both.communicate()
    assert both.returncode == 0, words
    assert losses_in(told) == pytest.approx(alone[1], abs=1e-4)
    saved = []
    for folder in (alone[0], tmp_path / "s"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            saved.append({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dictionary
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert saved[0].keys() == saved[1].keys() and "lm_head.weight" not in saved[0]  # tied, and so written once
    assert all(torch.allclose(saved[0][name], saved[1][name], atol=1e-5) for name in saved[0])
    assert figures(tmp_path / "s", cache)["kl"] == pytest.approx(figures(alone[0], cache)["kl"], abs=1e-4)


def test_the_page_about_it_runs(cache: Path, student_config: Path) -> None:
    page = (EXAMPLES.parent / "docs/own-loop.md").read_text()
    code = "".join(block.partition("```")[0] for block in page.split("```python")[1:])
    names: dict[str, Any] = {}
    exec(code.replace("wiki-cache", str(cache)).replace("my-student/config.json", str(student_config)), names)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in names["model"].parameters())
    assert names["loss"].item() == pytest.approx(
        names["compute_loss"](
            names["model"], names["head"], names["batch"], names["Objective"](soft_weight=0.9), vocab_size=320,
            num_items=names["count_items"](names["batch"]),
        ).item(), rel=1e-6,
    )  # fmt: skip
