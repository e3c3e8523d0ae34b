"""A training killed at random moments and gone on with: always, bit for bit, the weights of one that was left alone.

Twice; the long case as often as `KDCACHE_KILLS` says (10 unless told; a release runs 100). Every other kill is by
SIGTERM, the rest by -9.
Runs are forked from a process that has imported everything, so the moments fall into the work and not into imports.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import ReadyMade, wait_until

STEPS = 40
KILLS = [2, pytest.param(int(os.environ.get("KDCACHE_KILLS", "10")), marks=pytest.mark.long)]


def steps_of(out: Path) -> int:
    """Steps that a run has begun."""
    path = out / "rows-0.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("kills", KILLS)
def test_killed_at_random_steps(cache: Path, student_config: Path, tmp_path: Path, kills: int) -> None:
    common = [
        "--cache", str(cache), "--student", str(student_config), f"--steps={STEPS}", "--batch-rows=2", "--lr=5e-3",
        "--heldout=0.1", "--save-every=3", "--device=cpu", "--quiet", "--record-rows",
    ]  # fmt: skip

    def start(out: Path, *more: str) -> ReadyMade:
        """The real command, so that SIGTERM is handled as it is."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return ReadyMade("-m", "kdcache_cli", "train-student", *common, "--out", out, *more, env=environment)

    def finish(process: ReadyMade) -> None:
        _, words = process.communicate()
        assert process.returncode == 0, words

    def summary(out: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((out / "summary.json").read_text())
        return found

    def weights(out: Path) -> dict[str, torch.Tensor]:
        return dict(load_file(out / "model.safetensors"))

    finish(start(tmp_path / "whole"))
    expected, rows = weights(tmp_path / "whole"), (tmp_path / "whole/rows-0.jsonl").read_text()
    moments, steps = random.Random(0), []
    for kill in range(4 * kills):  # some have ended before they are killed
        if len(steps) == kills:
            break
        out = tmp_path / "s"
        process, at = start(out), moments.randrange(STEPS)
        wait_until(lambda at=at, out=out: steps_of(out) >= at, process, f"has not begun step {at}", every=0.002)
        time.sleep(moments.uniform(0.0, 0.05))
        os.kill(process.pid, (signal.SIGTERM, signal.SIGKILL)[kill % 2])
        if process.wait():
            steps.append(steps_of(out))
        finish(start(out, "--resume"))
        found = weights(out)
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found), steps
        assert (out / "rows-0.jsonl").read_text() == rows
        assert summary(out)["heldout"] == summary(tmp_path / "whole")["heldout"]
        shutil.rmtree(out)
    assert len(steps) == kills, steps
