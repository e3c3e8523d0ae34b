"""The cost of a start: the survey of the creator of a cache, and the start of every other worker.

    python -m benchmarks.survey [--teacher DIR] [--megabytes 10 1000] [--forms text jsonl parquet] [--repeats 3]

A corpus of random words is made of documents of about 700 bytes: as text (a paragraph a document), as JSON lines, and
as Parquet. The survey is timed with one process and with one a core: megabytes of text per second of wall time, and per
CPU second of all processes together. The start of a worker is `open_inputs` of an existing cache, in a process of its
own that has imported everything, before any teacher is loaded: the least of the repeats. Files are in the page cache.
The time of one sha256 over the whole file, in one process, is the reference for the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.corpus.sources import open_corpus
from kdcache.corpus.survey import shard_rule, survey
from kdcache.store.open_storage import open_storage
from kdcache.store.publish import publish_manifest
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.inputs import open_inputs
from kdcache.worker import available_cores

WORDS = 110


def documents(count: int) -> list[str]:
    """Documents of different words, about 700 characters each."""
    random = np.random.default_rng(0)
    words = ["".join(map(chr, random.integers(97, 123, random.integers(2, 9)))) for _ in range(20_000)]
    chosen = random.integers(0, len(words), (count, WORDS))
    return [" ".join([words[i] for i in row]) for row in chosen]


def make(folder: Path, form: str, megabytes: int) -> Path:
    path = folder / f"{form}-{megabytes}.{'txt' if form == 'text' else form}"
    block = documents(10_000)
    size = sum(map(len, block))
    times = max(1, round(megabytes * 1e6 / size))
    if form == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as parquet

        table = pa.table({"text": block})
        with parquet.ParquetWriter(path, table.schema, compression="zstd") as writer:
            for n in range(times):
                numbered = pa.table({"text": [f"{n} {text}" for text in block]})
                writer.write_table(numbered, row_group_size=10_000)
        return path
    with path.open("w") as file:
        for n in range(times):
            if form == "text":
                file.writelines(f"{n} {text}\n\n" for text in block)
            else:
                file.writelines(json.dumps({"text": f"{n} {text}"}) + "\n" for text in block)
    return path


def cpu() -> float:
    """CPU seconds of this process and of those that it started and that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def timed(work: Callable[[], Any]) -> tuple[float, float, Any]:
    wall, used = time.perf_counter(), cpu()
    found = work()
    return time.perf_counter() - wall, cpu() - used, found


def config(teacher: str, corpus: Path, out: Path) -> DumpConfig:
    return DumpConfig(teacher=teacher, corpus=str(corpus), out=str(out), seq_len=256, k=8)


def start(teacher: str, corpus: str, out: str, repeats: int) -> None:
    """The start of a worker, in this process: prints the least wall and CPU seconds."""
    options, storage = config(teacher, Path(corpus), Path(out)), open_storage(out)
    open_inputs(options, storage)  # imports what it needs
    found = [timed(lambda: open_inputs(options, storage))[:2] for _ in range(repeats)]
    print(json.dumps([min(wall for wall, _ in found), min(used for _, used in found)]))


def main() -> None:
    assets = Path(os.environ.get("KDCACHE_ASSETS", "."))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(assets / "models/stories260K"))
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 1000])
    parser.add_argument("--forms", nargs="+", default=["text", "jsonl", "parquet"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--start", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        start(*options.start, options.repeats)
        return
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {available_cores()} cores, Python "
        f"{platform.python_version()}, load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':18}documents  processes     MB/s  MB/cpu-s  sha256 MB/s  start s  start cpu-s")
    with tempfile.TemporaryDirectory() as folder:
        for form in options.forms:
            for megabytes in options.megabytes:
                report(Path(folder), form, megabytes, options)


def report(folder: Path, form: str, megabytes: int, options: argparse.Namespace) -> None:
    path = make(folder, form, megabytes)
    corpus = open_corpus(str(path))
    data = hashlib.sha256()
    wall, _, _ = timed(lambda: data.update(path.read_bytes()))
    hashing = path.stat().st_size / 1e6 / wall
    out = folder / f"cache-{path.name}"
    inputs = open_inputs(config(options.teacher, path, out))
    publish_manifest(open_storage(out), inputs.manifest, {"tokenizer.json": b"{}"}, inputs.plan)
    code = ["-m", "benchmarks.survey", "--start", options.teacher, str(path), str(out), "--repeats", options.repeats]
    done = subprocess.run([sys.executable, *map(str, code)], capture_output=True, text=True, check=True)
    begun, begun_cpu = json.loads(done.stdout)
    size = int(inputs.plan.characters.sum()) / 1e6
    for processes in sorted({1, available_cores()}):
        best = min(timed(lambda n=processes: survey(corpus, shard_rule(corpus), n))[:2] for _ in range(options.repeats))
        print(
            f"{form:8} {megabytes:5} MB  {inputs.plan.documents:9,}  {processes:9}  {size / best[0]:7.0f}  "
            f"{size / best[1]:8.0f}  {hashing:11.0f}  {begun:7.3f}  {begun_cpu:11.3f}",
            flush=True,
        )
    path.unlink()


if __name__ == "__main__":
    main()
