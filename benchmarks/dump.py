"""The time of a dump compared with a bare forward pass of the same teacher, on the same batches in one run.

    python -m benchmarks.dump [--teacher DIR] [--corpus FILE] [--rows 8] [--seq-len 512] [--batch-rows 4] [--repeats 7]
                              [--tile-logits N ...] [--no-tile-head] [--json FILE]
    python -m benchmarks.dump --shape 1b --device cuda --rows 32 --seq-len 1024 --batch-rows 8

The bare pass is `model(...).logits` with isolation; the logits are not used. Measured as a ratio to the bare pass of
the same round: the logits alone, as the dump makes them; `OpenedTeacher.targets_of` with each selection; and the same
with the shard encoded and written at the same time, as `dump-teacher` does. A round runs all of them once, and the
order rotates by one each round. Three ratios: of the least times, the least of the rounds, and the median of the
rounds. Reading and packing the corpus are not included. Teacher and text default to those of KDCACHE_ASSETS; `--shape`
makes a random teacher of a known shape instead.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarks.record import write
from benchmarks.teachers import SHAPES, make_teacher
from kdcache import Selection
from kdcache.cache_writer import CacheWriter
from kdcache.codec.id_ranks import FrequencyOrder
from kdcache.isolation import packed_forward
from kdcache.rows import IGNORE, PackedRow
from kdcache.store.manifest import Manifest
from kdcache.store.open_storage import open_storage
from kdcache.teacher.background_writer import BackgroundWriter
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.engines import tiles
from kdcache.teacher.engines.base import TargetRequest
from kdcache.teacher.engines.batch import Batch
from kdcache.teacher.engines.transformers import TransformersEngine
from kdcache.teacher.inputs import Inputs, open_inputs
from kdcache.teacher.open_teacher import open_teacher
from kdcache.teacher.opened_teacher import BatchTargets, OpenedTeacher

Batches = list[list[PackedRow]]


SELECTIONS = {"topk 64": Selection(k=64), "ipps 12": Selection(kind="ipps", k=12)}


def with_order(teacher: OpenedTeacher, inputs: Inputs, batches: Batches, rule: Selection) -> Manifest:
    """The manifest of a cache of that selection, with an id order from these batches."""
    known = rule.known(inputs.manifest.temperatures)
    manifest = dataclasses.replace(inputs.manifest, selection=rule.to_fields(), known=known)
    order = FrequencyOrder(manifest.vocab_size)
    for batch in batches:
        order.add(teacher.targets(batch, TargetRequest.of(manifest)).targets)
    return dataclasses.replace(manifest, id_order=order.ids())


def dump(teacher: OpenedTeacher, manifest: Manifest, batches: Batches) -> None:
    def encode(batch: list[PackedRow], found: BatchTargets) -> None:
        for row, part in zip(batch, found.targets.split(found.counts), strict=True):
            shard.write_row(row, part)

    with tempfile.TemporaryDirectory() as folder:
        writer = CacheWriter(open_storage(folder), manifest)
        with writer.shard(0) as shard, BackgroundWriter() as background:
            for batch, found in zip(batches, teacher.targets_of(batches, TargetRequest.of(manifest)), strict=True):
                background.submit(partial(encode, batch, found))
            background.finish()


def some_batches(inputs: Inputs, rows: int, batch_rows: int) -> Batches:
    found: list[PackedRow] = []
    for shard in range(inputs.manifest.shards):
        found += inputs.shard_rows(shard).rows
        if len(found) >= rows:
            break
    return [found[i : min(i + batch_rows, rows)] for i in range(0, min(rows, len(found)), batch_rows)]


def works(teacher: OpenedTeacher, inputs: Inputs, batches: Batches, sizes: list[int]) -> dict[str, Callable[[], None]]:
    """What is timed: the bare pass, and for each size of a tile the logits alone and a run of each selection."""
    engine = teacher.engine
    assert isinstance(engine, TransformersEngine)
    device, spec = teacher.device, teacher.rows
    made = [(Batch(rows, spec).tokens.to(device), Batch(rows, spec).position_ids.to(device)) for rows in batches]

    @torch.inference_mode()
    def bare() -> None:
        for tokens, places in made:
            packed_forward(engine.model, tokens, places)

    @torch.inference_mode()
    def logits_alone() -> None:
        for batch in batches:
            for _ in teacher.logits(batch):
                pass

    def run(rule: Selection) -> None:
        request = TargetRequest(selection=rule, temperatures=inputs.manifest.temperatures)
        for _ in teacher.targets_of(batches, request):
            pass

    manifests = {name: with_order(teacher, inputs, batches, rule) for name, rule in SELECTIONS.items()}

    def tiled(size: int, work: Callable[[], None]) -> Callable[[], None]:
        def sized() -> None:
            tiles.TILE_LOGITS[teacher.device.type] = size
            work()

        return sized

    found: dict[str, Callable[[], None]] = {"bare": bare}
    for size in sizes:
        found[f"logits alone, tiles of {size:,}"] = tiled(size, logits_alone)
        for name, rule in SELECTIONS.items():
            found[f"{name}, tiles of {size:,}"] = tiled(size, partial(run, rule))
            found[f"{name}, tiles of {size:,}, written"] = tiled(size, partial(dump, teacher, manifests[name], batches))
    return found


def timed(work: Callable[[], None], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def measure(work: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    for each in work.values():
        each()  # warm
    names, seconds = list(work), {name: [] for name in work}
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(timed(work[name], device))
    return seconds


def main() -> None:
    assets = Path(os.environ.get("KDCACHE_ASSETS", "."))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(assets / "models/lab32k"))
    parser.add_argument("--shape", choices=SHAPES, help="instead of --teacher")
    parser.add_argument("--corpus", default=str(assets / "text/wikitext2-valid.txt"))
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--batch-rows", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tile-logits", type=int, nargs="+", help="sizes of a tile to try, in logits")
    parser.add_argument("--no-tile-head", dest="tile_head", action="store_false")
    parser.add_argument("--json", help="a file for the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.shape:
            options.teacher = folder
            make_teacher(Path(folder), options.shape, Path(options.corpus))
        report(options)


def report(options: argparse.Namespace) -> None:
    config = DumpConfig(
        teacher=options.teacher, corpus=options.corpus, out="unused", seq_len=options.seq_len, device=options.device,
        dtype=options.dtype, batch_rows=options.batch_rows, tile_head=options.tile_head,
    )  # fmt: skip
    inputs = open_inputs(config)
    teacher = open_teacher(config.teacher_spec, inputs.manifest.row_spec)
    batches = some_batches(inputs, options.rows, options.batch_rows)
    slots = sum((row.labels(options.seq_len) != IGNORE).sum() for batch in batches for row in batch)
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, "
        f"{teacher.compute['device']}, {teacher.compute['dtype']}, {torch.get_num_threads()} threads"
    )
    print(
        f"{options.shape or Path(options.teacher).name}, {sum(map(len, batches))} rows of {options.seq_len}, "
        f"{slots} positions, batches of {options.batch_rows}, head {'in tiles' if options.tile_head else 'whole'}"
    )
    if options.tile_logits:
        tiles.GPU_TILES = sys.maxsize
    sizes = options.tile_logits or [tiles.TILE_LOGITS[teacher.device.type]]
    seconds = measure(works(teacher, inputs, batches, sizes), options.repeats, teacher.device)
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "teacher", "corpus")}
    write(options.json, str(teacher.device), {**settings, "positions": int(slots)}, {"seconds": seconds})
    print(f"{'least seconds, and how often the bare pass':48} seconds  positions/s   minima    least   median")
    for name, values in seconds.items():
        ratios = [value / bare for value, bare in zip(values, seconds["bare"], strict=True)]
        print(
            f"{name:48} {min(values):7.3f}  {slots / min(values):11,.0f}  {min(values) / min(seconds['bare']):7.2f}  "
            f"{min(ratios):7.2f}  {statistics.median(ratios):7.2f}"
        )


if __name__ == "__main__":
    main()
