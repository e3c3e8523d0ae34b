"""The demo, from the corpus to the plot, in a small part of its usual time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kdcache.demo.manuals import manuals
from tests.processes import kdcache


def test_the_manuals_are_there_and_are_the_same_each_time() -> None:
    texts = manuals()
    assert sum(map(len, texts)) > 1_000_000
    assert len(set(texts)) == len(texts)
    assert texts == manuals()


@pytest.mark.slow
def test_the_demo_tells_the_whole_story(tmp_path: Path) -> None:
    done = kdcache("demo", "--out", tmp_path / "d", "--budget", "0.1", "--json")
    assert done.returncode == 0, done.stderr
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
