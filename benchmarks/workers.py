"""Two workers with a core each against one with a core: positions per second of the same dump.

    python -m benchmarks.workers [--assets DIR] [--teacher NAME] [--corpus NAME] [--rounds 3] [--limit-docs N]
                                 [--json FILE]

Each round makes the same cache twice, by one worker on one core and by two at the same time on two cores; rounds take
turns in which comes first and on which core the one runs. Both caches have been created before (`--create-only`); the
same command, given again, shows what a start costs without the teacher, which a long dump does not notice.

    wall      from the launch of all workers to the end of the last
    seconds   what the slowest worker says of itself, which leaves out imports
    cpu       processor seconds of all workers: 2 * those of one / those of two is the speed-up on cores that nobody
              else uses, wherever the two wait for each other
    shards    the same, these starts taken off
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
CLOCKS = ("wall", "seconds", "cpu", "shards")


def run(commands: list[list[str]], cores: list[int]) -> dict[str, float]:
    """Run dumps at the same time, each on a core; their positions, and the clocks."""
    started = time.perf_counter()
    processes = []
    with tempfile.TemporaryDirectory() as folder:
        for i, (asked, core) in enumerate(zip(commands, cores, strict=True)):
            output = (Path(folder) / str(i)).open("w+b")
            command = ["taskset", "-c", str(core), sys.executable, "-m", "kdcache_cli", "dump-teacher", *asked]
            processes.append((subprocess.Popen(command, stdout=output), output))
        found: dict[str, float] = {"cpu": 0.0, "seconds": 0.0, "positions": 0}
        for process, output in processes:
            _, status, used = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"a worker ended with {status}")
            output.seek(0)
            said: dict[str, Any] = json.load(output)
            output.close()
            found["cpu"] += used.ru_utime + used.ru_stime
            found["seconds"] = max(found["seconds"], said["seconds"])
            found["positions"] += round(said["seconds"] * said["positions_per_second"])
    return {**found, "wall": time.perf_counter() - started}


def make(asked: list[str], out: Path, cores: list[int]) -> dict[str, float]:
    """Create a cache, then make all of its shards by a worker on each core; only the latter is measured."""
    asked = [*asked, "--out", str(out), "--json"]
    create = [[*asked, "--create-only"]]
    run(create, cores[:1])
    start = run(create, cores[:1])["cpu"]
    found = run([[*asked, "--worker", f"{i}/{len(cores)}"] for i in range(len(cores))], cores)
    return {**found, "start": start, "shards": found["cpu"] - len(cores) * start}


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
    print(f"{'round':>5} {'positions':>9} " + " ".join(f"{clock:>8}" for clock in CLOCKS) + "   speed-up of two")
    for turn in range(options.rounds):
        ways = {"one": [first if turn % 2 == 0 else second], "two": [first, second]}
        with tempfile.TemporaryDirectory() as scratch:
            order = list(ways) if turn % 2 == 0 else list(reversed(ways))
            found = {name: make(asked, Path(scratch) / name, ways[name]) for name in order}
        one, two = found["one"], found["two"]
        if one["positions"] != two["positions"]:
            raise SystemExit("one and two workers did not make the same cache")
        ups = {name: one[name] / two[name] * (2 if name in ("cpu", "shards") else 1) for name in CLOCKS}
        rounds.append({**found, "speed_up": ups})
        print(f"{turn:5} {one['positions']:9,.0f} " + " ".join(f"{ups[name]:8.3f}" for name in CLOCKS), flush=True)
    middle = {name: statistics.median(each["speed_up"][name] for each in rounds) for name in CLOCKS}
    print(f"{'median':>15} " + " ".join(f"{middle[name]:8.3f}" for name in CLOCKS))
    write(options.json, "cpu", {k: v for k, v in vars(options).items() if k not in ("json", "assets")}, rounds)


if __name__ == "__main__":
    main()
