"""A run on 1 rank, gone on with on 2 and on 1 again, killed in between, reads the rows of one that was left alone."""

from __future__ import annotations

import json
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

from kdcache import open_cache
from kdcache.student import trainer
from tests.processes import Ranks, wait_until

STEPS, SAVE = 42, 3


def start(ranks: int, out: Path, arguments: list[str], **changes: object) -> Ranks:
    """A run of 4 rows a step."""
    rows, accumulate = {1: (2, 2), 2: (1, 2), 4: (1, 1)}[ranks]
    more = [f"--{name}={value}" for name, value in {"batch-rows": rows, "accumulate": accumulate, **changes}.items()]
    return Ranks(ranks, "-m", "kdcache_cli", "train-student", *arguments, "--out", out, *more)


def kill_past(process: Ranks, out: Path, step: int) -> None:
    """Kill all of a run by -9 once it has a checkpoint of a step."""
    saved = lambda: any(int(p.name.rpartition("-")[2]) >= step for p in trainer.complete(out))  # noqa: E731
    wait_until(saved, process, f"has no checkpoint of step {step}")
    process.kill()
    process.communicate()


def steps_of(out: Path) -> dict[int, list[tuple[int, int]]]:
    """The rows of each step, over all ranks, sorted."""
    steps: dict[int, list[tuple[int, int]]] = {}
    for path in out.glob("rows-*.jsonl"):
        for line in path.read_text().splitlines():
            told = json.loads(line)
            steps.setdefault(told["step"], []).extend((cache, row) for cache, row in told["rows"])
    return {step: sorted(rows) for step, rows in sorted(steps.items())}


def finish(process: Ranks) -> dict[str, Any]:
    out, words = process.communicate()
    assert process.returncode == 0, words
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.slow
def test_one_rank_then_two_then_one(cache: Path, student_config: Path, tmp_path: Path) -> None:
    arguments = [
        "--cache", str(cache), "--student", str(student_config), f"--steps={STEPS}", "--lr=1e-3", "--heldout=0.1",
        "--device=cpu", f"--save-every={SAVE}", "--keep=2", "--record-rows", "--where=entropy<100", "--json",
    ]  # fmt: skip
    whole = finish(start(1, tmp_path / "whole", arguments))
    out = tmp_path / "s"
    kill_past(start(1, out, arguments), out, 6)
    kill_past(start(2, out, [*arguments, "--resume"]), out, 15)
    kill_past(start(1, out, [*arguments, "--resume"]), out, 24)
    refused = start(2, out, [*arguments, "--resume"], accumulate=1)
    words = refused.communicate()[1]
    assert refused.returncode != 0
    assert (
        f"error: --batch-rows 1 x accumulate 1 x 2 rank(s) is 2 rows a step, but the run in {out} takes 4 "
        "(2 x 2 x 1); choose numbers whose product is that\n"
    ) in words
    changed = finish(start(2, out, [*arguments, "--resume"]))

    assert steps_of(out) == steps_of(tmp_path / "whole")
    assert list(steps_of(out)) == list(range(1, STEPS + 1)) and all(len(r) == 4 for r in steps_of(out).values())
    assert len(list(out.glob("rows-*.jsonl"))) == 2  # both ranks took part
    assert changed["rows"] == whole["rows"]
    for name in ("nll", "kl"):
        assert changed["heldout"]["after"][name] == pytest.approx(whole["heldout"]["after"][name], abs=1e-4)
        assert abs(whole["heldout"]["after"][name] - whole["heldout"]["before"][name]) > 0.02  # it learnt something


@pytest.mark.slow
def test_two_ranks_of_an_unfinished_cache_agree_on_its_shards(
    cache: Path, student_config: Path, tmp_path: Path
) -> None:
    """And on which rows `--where` keeps, of which each rank reads half."""
    growing = shutil.copytree(cache, tmp_path / "c")
    (growing / "commits/00002.json").unlink()
    (growing / "seal.arrow").unlink()
    opened = open_cache(growing, partial=True)
    middle = statistics.median(row.targets[row.labels != -100].entropy.mean().item() for row in opened)
    arguments = [
        "--cache", str(growing), "--student", str(student_config), "--steps=4", "--heldout=0.1", "--device=cpu",
        f"--where=entropy<{middle}", "--partial", "--record-rows", "--json",
    ]  # fmt: skip
    two = finish(start(2, tmp_path / "two", arguments))
    one = finish(start(1, tmp_path / "one", arguments))
    assert one["rows"] == two["rows"] and one["rows"]["train"] < 0.7 * len(opened)
    assert steps_of(tmp_path / "one") == steps_of(tmp_path / "two")
    record = json.loads((tmp_path / "two/train-student.json").read_text())
    assert record["caches"][0]["shards"] == [0, 1, 3] and record["ranks"] == 2
