"""Two workers killed by -9 at a random moment, then gone on with: always the cache of a run that was left alone.

Twice; the long case as often as `KDCACHE_KILLS` says (10 unless told; a release runs 100). Workers are forked from a
process that has imported everything, and the moments are told by the files that are there, so they fall into the work
on any machine.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from kdcache import verify_cache
from tests.making import TEXTS, run_dump
from tests.processes import PATIENCE, READY

KILLS = [2, pytest.param(int(os.environ.get("KDCACHE_KILLS", "10")), marks=pytest.mark.long)]


@pytest.mark.slow
@pytest.mark.parametrize("kills", KILLS)
@pytest.mark.parametrize("store", ["arrow", "zarr"])
def test_killed_workers_leave_what_the_next_run_completes(
    teacher: Path, tmp_path: Path, store: str, kills: int
) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"{n}: {text}"}) + "\n" for n in range(2) for text in TEXTS))
    common = {"teacher": teacher, "corpus": corpus, "store": store, "docs_per_shard": 8, "precision": "6"}

    def start(out: Path, worker: str) -> Any:
        process = READY.Process(target=run_dump, args=({**common, "out": out, "worker": worker},))
        process.start()
        return process

    def pair(out: Path) -> list[Any]:
        return [start(out, "0/2"), start(out, "1/2")]

    def finish(processes: list[Any]) -> None:
        for process in processes:
            process.join(PATIENCE)
            assert process.exitcode == 0

    def files(out: Path) -> int:
        """Whole files and half-written ones: how far a dump has come."""
        return sum(len(names) for _, _, names in os.walk(out))  # which minds no folder that goes away

    finish(pair(tmp_path / "whole"))
    expected, most = verify_cache(tmp_path / "whole").content_sha256, files(tmp_path / "whole")
    assert expected is not None
    moments = random.Random(store)
    interrupted = 0
    for _ in range(4 * kills):  # some have ended before they are killed
        if interrupted == kills:
            break
        out = tmp_path / "c"
        processes = pair(out)
        until = moments.uniform(0, 0.8) * most
        while files(out) < until and any(process.is_alive() for process in processes):
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.02))
        for process in processes:
            process.kill()
            process.join()
        interrupted += any(process.exitcode for process in processes)
        finish([start(out, "0/1")])
        report = verify_cache(out)
        assert report.ok, report.problems
        assert report.content_sha256 == expected
        shutil.rmtree(out)
    assert interrupted == kills
