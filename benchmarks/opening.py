"""Seconds to open a cache of many shards, sealed and from its commits, and to summarise it.

    python -m benchmarks.opening [--shards 100000] [--positions 100] [--repeats 5]

The commits are made from one example, without the data of any shard, which opening a sealed cache does not read. Files
are in the page cache. `process` is the whole command `kdcache inspect-shard`, its imports included; for comparison, a
Python that only imports torch is timed. The ratio is that of the medians of one run.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from kdcache import open_cache
from kdcache.planning.memory import peak_resident
from kdcache.report.inspect import inspect_summary
from kdcache.store.commit import Commit, commit_name
from kdcache.store.commits import Commits, read_commits
from kdcache.store.local import LocalStorage
from kdcache.store.manifest import FORMAT, Manifest
from kdcache.store.seal import SEAL, to_bytes
from kdcache.store.sealed_json import checksum
from kdcache.testing.example_rows import example_manifest, example_rows, of_shards, write_cache


def commits(standing: Manifest, positions: int) -> Iterator[Commit]:
    """One commit per shard, each with this many positions."""
    small = example_manifest("arrow")
    with tempfile.TemporaryDirectory() as folder:
        storage = LocalStorage(folder)
        first = read_commits(storage, write_cache(storage, small, example_rows(small, 2)))[0]
    rows = -(-positions // 100)
    spread = [positions // 100] * 99
    numbers = {
        "rows": rows, "pieces": rows, "tokens": positions + rows, "labels": positions, "positions": positions,
        "entries": 64 * positions, "least_entries": 64, "most_entries": 64,
    }  # fmt: skip
    data = {**first.objects[0], "bytes": 40 * positions + 1000}
    compute = {"batch_rows": 8, "device": "cuda", "dtype": "bfloat16", "machine": "x86_64", "threads": 8, "torch": "2"}
    for shard in range(standing.shards):
        yield dataclasses.replace(
            first, shard=shard, manifest_sha256=standing.sha256, compute=compute, **numbers,
            objects=[{**data, "name": f"shards/{shard:05d}.arrow"}],
            entropy_histogram=[*spread, positions - sum(spread)],
            sums={"entropy": 1.5 * positions, "label_logprob": -2.0 * positions, "tail_mass": [0.1 * positions] * 2},
        )  # fmt: skip


def seconds(act: Callable[[], object], repeats: int) -> dict[str, float]:
    """Medians: by the clock, and of the processor in this process and those that it starts."""
    wall, busy = [], []
    for _ in range(repeats):
        began, used = time.perf_counter(), processor()
        act()
        wall.append(time.perf_counter() - began)
        busy.append(processor() - used)
    return {"wall": statistics.median(wall), "processor": statistics.median(busy)}


def processor() -> float:
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in both)


def run(*command: object) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, *map(str, command)], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--positions", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        storage = LocalStorage(folder)
        standing = of_shards(example_manifest("arrow"), options.shards).create(storage)
        (Path(folder) / "commits").mkdir()
        for commit in commits(standing, options.positions):
            fields = {"format": FORMAT, **vars(commit)}
            data = json.dumps({**fields, "checksum": checksum(fields)})  # as a writer makes it, except for line breaks
            (Path(folder) / commit_name(commit.shard)).write_text(data)
        unsealed = seconds(lambda: open_cache(folder, partial=True), 1)
        storage.create(SEAL, to_bytes(Commits.of(commits(standing, options.positions), standing.sha256)))
        found: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
            "load": os.getloadavg()[0],
            "shards": options.shards,
            "positions": options.shards * options.positions,
            "seal_bytes": storage.size(SEAL),
            "open_sealed_s": seconds(lambda: open_cache(folder), options.repeats),
            "open_unsealed_s": unsealed,
            "summary_s": seconds(lambda: inspect_summary(folder), options.repeats),
            "process_s": seconds(run("-m", "kdcache_cli", "inspect-shard", folder, "--json"), options.repeats),
            "import_torch_s": seconds(run("-c", "import torch"), options.repeats),
            "peak_mb": peak_resident() >> 20,
        }
        found["unsealed_over_sealed"] = unsealed["processor"] / found["open_sealed_s"]["processor"]
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
