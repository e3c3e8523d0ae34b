"""The demo, from the corpus to the plot, in a small part of its usual time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from kdcache.demo.manuals import manuals
from tests.processes import python

STEP = 16
SHORT = f"""
from kdcache.demo import story
found = story.manuals
story.manuals = lambda: found()[::{STEP}]
from kdcache_cli.main import run
run()
"""


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return manuals()


@pytest.mark.slow
def test_the_manuals_are_many_and_each_is_there_once(texts: list[str]) -> None:
    assert sum(map(len, texts)) > 1_000_000
    assert len(set(texts)) == len(texts)


@pytest.mark.slow
def test_the_demo_tells_the_whole_story(texts: list[str], tmp_path: Path) -> None:
    """With every sixteenth of the manuals, which are the same in the demo's process as in this one, in one order."""
    done = python("-c", SHORT, "demo", "--out", tmp_path / "d", "--budget", "0.1", "--seed", "3", "--json")
    assert done.returncode == 0, done.stderr
    few = texts[::STEP]
    order = np.random.default_rng(3).permutation(len(few))[: round(0.25 * len(few))]
    lines = (tmp_path / "d/student-corpus.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == [few[i] for i in order]
    summary = json.loads(done.stdout)
    assert {"teacher_nll", "distilled_nll", "label_only_nll", "kl", "bytes_per_position"} <= set(summary)
    assert summary["teacher_nll"] < summary["students"]["before"]["nll"]
    for name in ("distilled", "labels"):
        assert summary["students"][name]["nll"] < summary["students"]["before"]["nll"]
    assert [s["name"] for s in summary["stages"]] == [
        "corpus", "tokenizer", "teacher", "dump", "inspect", "distilled", "labels"
    ]  # fmt: skip
    assert summary["stages"][-1]["steps"] == summary["stages"][-2]["steps"] == summary["steps"]
    assert Path(summary["plot"]).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "d/summary.json").read_text()) == summary
