"""A dump by 1 to 1,000 workers: what the protocol costs, what failures and stragglers cost, how many shards to make.

    python -m benchmarks.scale count [--assets DIR]   requests of the real code against an S3 server on this machine
    python -m benchmarks.scale check [--assets DIR]   real runs of 1 to 4 workers, one killed, against the simulation
    python -m benchmarks.scale folders                what a local file system does with many commits
    python -m benchmarks.scale tables                 the simulation, in the tables of docs/cluster.md

`check` makes real caches by real processes with an engine that sleeps (`sleeping_engine`), so that a busy machine does
not decide how long a shard takes; one worker is killed in the middle of a shard and started again. How long workers
take to start is measured in each run, and how long a shard takes in the run of one worker; all else is the
simulation's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cluster_model import Cluster, Outcome, Protocol, simulate
from benchmarks.record import write

COUNTED = Path(__file__).parent / "results/requests.json"
HOUR, DAY = 3600.0, 86_400.0

WRITES, READS = 5.0e-6, 0.4e-6
"""US dollars for a PUT or a LIST, and for a GET or a HEAD: S3's list price in its cheapest regions; DELETE is free."""
PRICES = {"PUT": WRITES, "LIST": WRITES, "LOOK": WRITES, "GET": READS, "HEAD": READS, "DELETE": 0.0}

TASK = 4
"""Documents of a shard in `check`, a row each and a batch all together."""


def load_protocol() -> Protocol:
    """The requests that `count` has counted."""
    return Protocol(**json.loads(COUNTED.read_text())["results"])


def count_(options: argparse.Namespace) -> None:
    from benchmarks.count_requests import count, protocol

    assets = Path(options.assets)
    counted = count(assets / "models/stories260K", assets / "text/tinystories.txt")
    found = protocol(counted, {"PUT": 1.0})
    for step, requests in dataclasses.asdict(found).items():
        print(f"{step:10} " + ", ".join(f"{kind} {number:g}" for kind, number in sorted(requests.items())))
    write(str(COUNTED), "cpu", {"shards": list(counted)}, dataclasses.asdict(found))


def cost(outcome: Outcome) -> float:
    """US dollars for the requests of a dump."""
    return sum(PRICES[kind] * number for kind, number in outcome.requests.items())


class Launched:
    """Real workers of one cache, and when each of its shards was committed."""

    def __init__(self, options: argparse.Namespace, scratch: Path, workers: int, shards: int) -> None:
        assets = Path(options.assets)
        self.cache, self.workers = scratch / "cache", workers
        self.command = [
            sys.executable, "-m", "kdcache_cli", "dump-teacher", "--plugin", "benchmarks.sleeping_engine",
            "--engine", "sleeping", "--teacher", str(assets / "models/stories260K"),
            "--corpus", str(assets / "text/tinystories.txt"), "--out", str(self.cache), "--precision", "float16",
            "--k", "8", "--seq-len", "64", "--pack", "none", "--overlong", "truncate", "--batch-rows", str(TASK),
            "--docs-per-shard", str(TASK), "--limit-docs", str(TASK * shards), "--device", "cpu", "--json", "--quiet",
        ]  # fmt: skip
        self.environment = {**os.environ, "SLEEP_SECONDS": str(options.seconds)}
        self.began = time.time()
        self.processes = [self.launch(worker) for worker in range(workers)]

    def launch(self, worker: int) -> subprocess.Popen[bytes]:
        named = [*self.command, "--worker", f"{worker}/{self.workers}"]
        return subprocess.Popen(named, stdout=subprocess.DEVNULL, env=self.environment)

    def commits(self) -> dict[int, float]:
        """Seconds from the launch to each commit, by shard."""
        return {int(p.stem): p.stat().st_mtime - self.began for p in self.cache.glob("commits/*.json")}

    def wait(self) -> None:
        for process in self.processes:
            if process.wait():
                raise SystemExit(f"a worker ended with {process.returncode}")


def real(options: argparse.Namespace, workers: int, shards: int, killed: int | None = None) -> dict[str, Any]:
    """Make a cache; when each commit came, and when a worker was killed and started again."""
    with tempfile.TemporaryDirectory() as folder:
        run = Launched(options, Path(folder), workers, shards)
        found: dict[str, Any] = {}
        if killed is not None:
            while sum(shard % workers == killed for shard in run.commits()) < 2:
                time.sleep(0.05)
            time.sleep(options.seconds / 2)  # in the middle of its third shard
            run.processes[killed].send_signal(signal.SIGKILL)
            run.processes[killed].wait()
            found["killed"] = time.time() - run.began
            run.processes[killed] = run.launch(killed)
        run.wait()
        return {**found, "commits": dict(sorted(run.commits().items()))}


def check(options: argparse.Namespace) -> None:
    nothing: dict[str, float] = {}
    free = Protocol(**dict.fromkeys(("create", "join", "shard", "finish", "finish_own", "seal", "seal_each"), nothing))
    shards, results = options.shards, []
    a_shard = 0.0
    print(
        f"{shards} shards of {options.seconds:g} s and what writing takes; seconds from the launch to the last commit"
    )
    print(f"{'workers':>12} {'start':>6} {'a shard':>8} {'real':>7} {'simulated':>9} {'ratio':>6}")
    for workers, killed in ((1, None), (2, None), (4, None), (4, 1)):
        made = real(options, workers, shards, killed)
        commits = made["commits"]
        if workers == 1:
            a_shard = (commits[shards - 1] - commits[0]) / (shards - 1)
        starts = [commits[worker] - a_shard for worker in range(workers)]
        kills, requeue = (), 0.0
        if killed is not None:
            again = sorted(t for s, t in commits.items() if s % workers == killed)[2] - a_shard
            kills, requeue = ((killed, made["killed"]),), again - made["killed"] - statistics.mean(starts)
        model = Cluster(
            workers=workers, shards=shards, shard_seconds=a_shard, protocol=free, start=statistics.mean(starts),
            kills=kills, requeue=requeue,
        )  # fmt: skip
        took, said = max(commits.values()), simulate(model)
        name = f"{workers}" + (", 1 killed" if kills else "")
        results.append({"workers": name, "real": took, "simulated": said.makespan, "starts": starts, **made})
        print(f"{name:>12} {statistics.mean(starts):6.1f} {a_shard:8.2f} {took:7.1f} {said.makespan:9.1f} "
              f"{said.makespan / took:6.3f}", flush=True)  # fmt: skip
    write(options.json, "cpu", {"shards": shards, "seconds": options.seconds}, results)


def folders(options: argparse.Namespace) -> None:  # noqa: ARG001
    from kdcache.store.open_storage import open_storage

    print(f"{'commits':>9} {'seconds to list':>15}")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "commits").mkdir()
        made = 0
        for number in (1_000, 10_000, 100_000):
            while made < number:
                (Path(folder) / f"commits/{made:05d}.json").touch()
                made += 1
            started = time.process_time()
            found = len(open_storage(folder).names("commits"))
            print(f"{found:9,} {time.process_time() - started:15.2f}", flush=True)


def tables(options: argparse.Namespace) -> None:
    protocol = load_protocol()
    ordinary = {
        "protocol": protocol, "spread": 0.2, "start": 300.0, "create": 600.0, "slow_nodes": 0.02, "slowness": 1.5,
        "mtbf": 30 * DAY, "requeue": 600.0, "grace": 30.0, "latency": 0.05, "limit": 3500.0, "beat": 15.0, "twins": 0.1,
    }  # fmt: skip
    results: dict[str, list[dict[str, Any]]] = {}

    def line(table: str, names: dict[str, Any], **changes: Any) -> None:
        found = [simulate(Cluster(**{**ordinary, **changes, "seed": seed})) for seed in range(options.seeds)]
        cluster = Cluster(**{**ordinary, **changes})
        hours = statistics.mean(f.makespan for f in found) / HOUR
        values = {
            **names,
            "hours": round(hours, 2),
            "efficiency": round(statistics.mean(f.efficiency for f in found), 3),
            "lost worker hours": round(statistics.mean(f.lost_seconds for f in found) / HOUR, 1),
            "made twice": round(statistics.mean(f.twice for f in found), 1),
            "starts": round(statistics.mean(f.starts for f in found)),
            "requests": round(statistics.mean(sum(f.requests.values()) for f in found)),
            "dollars": round(statistics.mean(cost(f) for f in found), 2),
            "busiest second": round(statistics.mean(f.busiest for f in found)),
            "minutes a shard": round(cluster.shard_seconds / 60, 1),
        }
        if table not in results:
            print(f"\n{table}\n" + " | ".join(values))
        results.setdefault(table, []).append(values)
        print(" | ".join(value if isinstance(value, str) else f"{value:,}" for value in values.values()), flush=True)

    work = 24 * HOUR  # of each worker
    for workers in (1, 10, 100, 1000):
        for each in (1, 4, 16, 64):
            line("one day of work for each worker", {"workers": workers, "shards each": each},
                 workers=workers, shards=workers * each, shard_seconds=work / each)  # fmt: skip
    slow, shared = {"slow_nodes": 0.1, "slowness": 3.0}, {"shared": True}
    at = {"workers": 1000, "shards": 16_000, "shard_seconds": work / 16}
    for name, changes in {
        "nothing goes wrong": {"mtbf": math.inf, "slow_nodes": 0.0, "spread": 0.0},
        "ordinary": {},
        "ordinary, shared": shared,
        "a node fails in 3 days": {"mtbf": 3 * DAY},
        "every failed node goes on with its shard": {"mtbf": 3 * DAY, "twins": 1.0},
        "preempted every 6 hours": {"preempted": 6 * HOUR},
        "preempted every hour": {"preempted": HOUR},
        "preempted every hour, shards of 22 minutes": {
            "preempted": HOUR, "shards": 64_000, "shard_seconds": work / 64,
        },
        "10 % of the nodes are 3 times slower": slow,
        "10 % of the nodes are 3 times slower, shared": {**slow, **shared},
        "a store that answers 100 requests a second": {"limit": 100.0},
        "a store that answers after 1 s": {"latency": 1.0},
    }.items():  # fmt: skip
        line("1,000 workers with a day of work each, 16 shards each", {"case": name}, **{**at, **changes})
    for shards in (16_000, 64_000, 256_000):
        line("1,000 workers with 90 days of work each, shared", {"shards": shards},
             workers=1000, shards=shards, shard_seconds=90 * DAY * 1000 / shards, shared=True)  # fmt: skip
    write(options.json, "cpu", {"seeds": options.seeds}, results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("count", "check", "folders", "tables"))
    parser.add_argument("--assets", default=os.environ.get("KDCACHE_ASSETS", "."))
    parser.add_argument("--shards", type=int, default=24, help="of `check`")
    parser.add_argument("--seconds", type=float, default=3.0, help="of a shard of `check`")
    parser.add_argument("--seeds", type=int, default=3, help="of `tables`")
    parser.add_argument("--json", help="a file for the results")
    options = parser.parse_args()
    {"count": count_, "check": check, "folders": folders, "tables": tables}[options.what](options)


if __name__ == "__main__":
    main()
