"""Two workers with a core each against one with a core: positions per second of the same dump.

    python -m benchmarks.workers [--assets DIR] [--teacher NAME] [--corpus NAME] [--rounds 3] [--limit-docs N]
                                 [--json FILE]

Each round makes the same cache twice, by one worker on one core and by two at the same time on two cores; rounds take
turns in which comes first and on which core the one runs. Three clocks, since other programs may use the cores as well:

    wall    from the launch of all workers to the end of the last, imports and the creation of the cache included
    seconds what the workers say of themselves (`seconds` of the slowest), which leaves out imports
    cpu     processor seconds of all workers together: what two take more than one is what they cost each other, and
            what both do (start, pilot); 2 * cpu of one / cpu of two is the speed-up on cores that nobody else uses
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import write

SEQ_LEN = {"stories260K": 256, "lab32k": 512}


def dump(asked: list[str], out: Path, cores: list[int]) -> dict[str, float]:
    """Make a cache by a worker on each of some cores; its positions, and the clocks."""
    started = time.perf_counter()
    workers = []
    for i, core in enumerate(cores):
        command = ["taskset", "-c", str(core), sys.executable, "-m", "kdcache_cli", "dump-teacher", *asked, "--json"]
        output = (out.parent / f"{out.name}-{i}.json").open("w+b")
        workers.append((subprocess.Popen([*command, "--out", str(out), "--worker", f"{i}/{len(cores)}"],
                                         stdout=output), output))  # fmt: skip
    found: dict[str, float] = {"cpu": 0.0, "seconds": 0.0, "positions": 0}
    for process, output in workers:
        _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"a worker ended with {status}")
        output.seek(0)
        said: dict[str, Any] = json.load(output)
        output.close()
        found["cpu"] += used.ru_utime + used.ru_stime
        found["seconds"] = max(found["seconds"], said["seconds"])
        found["positions"] += said["seconds"] * said["positions_per_second"]
    return {**found, "wall": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", default=os.environ.get("KDCACHE_ASSETS", "."))
    parser.add_argument("--teacher", choices=SEQ_LEN, default="stories260K")
    parser.add_argument("--corpus", default="wikitext2-valid.txt")
    parser.add_argument("--limit-docs", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="a file for the results")
    options = parser.parse_args()
    assets, rounds = Path(options.assets), []
    first, second = sorted(os.sched_getaffinity(0))[:2]
    asked = [
        "--teacher", str(assets / "models" / options.teacher), "--corpus", str(assets / "text" / options.corpus),
        "--seq-len", str(SEQ_LEN[options.teacher]), "--chars-per-shard", "16000", "--device", "cpu",
    ]  # fmt: skip
    asked += ["--limit-docs", str(options.limit_docs)] if options.limit_docs else []
    print(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {options.teacher}, {options.corpus}")
    print(f"{'round':>5} {'positions':>9}  speed-up by wall, seconds, cpu")
    for turn in range(options.rounds):
        ways = {"one": [first if turn % 2 == 0 else second], "two": [first, second]}
        with tempfile.TemporaryDirectory() as scratch:
            found = {
                name: dump(asked, Path(scratch) / name, ways[name])
                for name in (ways if turn % 2 == 0 else reversed(ways))
            }
        one, two = found["one"], found["two"]
        if one["positions"] != two["positions"] and abs(one["positions"] - two["positions"]) > 1:
            raise SystemExit("one and two workers did not make the same cache")
        ups = {clock: one[clock] / two[clock] * (2 if clock == "cpu" else 1) for clock in ("wall", "seconds", "cpu")}
        rounds.append({**found, "speed_up": ups})
        print(f"{turn:5} {one['positions']:9,.0f}  " + "  ".join(f"{name} {up:.3f}" for name, up in ups.items()))
    for clock in ("wall", "seconds", "cpu"):
        print(f"median by {clock}: {statistics.median(r['speed_up'][clock] for r in rounds):.3f}")
    write(options.json, "cpu", {k: v for k, v in vars(options).items() if k not in ("json", "assets")}, rounds)


if __name__ == "__main__":
    main()
