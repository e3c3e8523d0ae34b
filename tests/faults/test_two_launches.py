"""Two dumps of different configurations that begin on one cache at once: one makes it, the other says what differs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kdcache import open_cache, verify_cache
from tests.processes import ReadyMade


@pytest.mark.slow
def test_one_goes_on_and_the_workers_of_the_other_are_told(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "c"
    launches = {
        k: [
            ReadyMade(
                "-m", "kdcache_cli", "dump-teacher", "--teacher", teacher, "--corpus", corpus, "--out", out,
                "--seq-len", "64", "--k", k, "--docs-per-shard", "30", "--device", "cpu", "--worker", f"{worker}/2",
            )
            for worker in range(2)
        ]
        for k in (8, 12)
    }  # fmt: skip
    said = {k: [(process.communicate()[1], process.returncode) for process in each] for k, each in launches.items()}
    made = open_cache(out).manifest.rule.k
    (other,) = {8, 12} - {made}
    assert [code for _, code in said[made]] == [0, 0], said
    for words, code in said[other]:
        assert code == 2 and words.count("\n") == 1 and re.search(f"selection .*{made}.*asked: .*{other}", words), words
    assert verify_cache(out).ok
