"""What `kdcache plan` says against what the dump then takes: bytes and seconds, for two teachers and two corpora.

    python -m benchmarks.plan [--assets DIR] [--limit-docs N] [--rounds 1] [--select ipps --k 12] [--clock cpu]
                              [--json FILE]

Each plan and each dump is a process of its own, one after the other, so both pay for their imports and first calls. A
ratio is plan by dump. `--json` also holds the seconds of each part of a plan. On a machine that others use, too, a
program's seconds vary by half from run to run; `--clock cpu` counts the processor's seconds instead, in both commands.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.record import write

TEACHERS = {"stories260K": 256, "lab32k": 512}
"""Each with its `seq_len`."""

CORPORA = ("tinystories.txt", "wikitext2-valid.txt")


RUN = "from kdcache_cli.main import run; run()"
CLOCKS = {"wall": RUN, "cpu": f"import time; time.perf_counter = time.process_time; {RUN}"}


def run(clock: str, command: str, *options: object) -> dict[str, Any]:
    """What a command prints, its seconds by a clock."""
    done = subprocess.run(
        [sys.executable, "-c", CLOCKS[clock], command, *map(str, options), "--json"],
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assets", default=os.environ.get("KDCACHE_ASSETS", "."))
    parser.add_argument("--teacher", choices=TEACHERS, help="only this one")
    parser.add_argument("--corpus", choices=CORPORA, help="only this one")
    parser.add_argument("--limit-docs", type=int)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--select", default="topk")
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", help="a file for the results")
    options = parser.parse_args()
    assets, results = Path(options.assets), []
    print(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {options.select} {options.k}, {options.device}, "
        f"{options.clock} clock"
    )
    print(f"{'teacher':12} {'corpus':20} {'positions':>9} {'bytes':>11} {'ratio':>6} {'seconds':>8} {'ratio':>6}")
    for name in [options.teacher] if options.teacher else TEACHERS:
        for corpus in [options.corpus] if options.corpus else CORPORA:
            for _ in range(options.rounds):
                asked: list[object] = [
                    "--teacher", assets / "models" / name, "--corpus", assets / "text" / corpus,
                    "--seq-len", TEACHERS[name], "--select", options.select, "--k", options.k,
                    "--device", options.device,
                ]  # fmt: skip
                asked += ["--limit-docs", options.limit_docs] if options.limit_docs else []
                with tempfile.TemporaryDirectory() as scratch:
                    planned = run(options.clock, "plan", *asked)
                    made = run(options.clock, "dump-teacher", *asked, "--out", Path(scratch) / "cache")
                found = {
                    "teacher": name,
                    "corpus": corpus,
                    "positions": planned["positions"] / made["positions"],
                    "bytes": planned["bytes"] / made["bytes"],
                    "seconds": planned["seconds"]["total"] / made["seconds"],
                    "planned": planned["seconds"],
                    "dump_seconds": made["seconds"],
                }
                results.append(found)
                print(
                    f"{name:12} {corpus:20} {made['positions']:9,} {made['bytes']:11,} {found['bytes']:6.3f} "
                    f"{made['seconds']:8.1f} {found['seconds']:6.3f}"
                )
    settings = {key: value for key, value in vars(options).items() if key not in ("json", "assets")}
    write(options.json, options.device, settings, results)


if __name__ == "__main__":
    main()
