"""The dump's arithmetic beside a bare forward pass of the same teacher, on the same batches in one run.

    python -m benchmarks.dump [--teacher DIR] [--corpus FILE] [--rows 8] [--seq-len 512] [--batch-rows 4] [--repeats 7]
                              [--tile-logits N ...] [--no-tile-head]
    python -m benchmarks.dump --shape 1b --device cuda --rows 32 --seq-len 1024 --batch-rows 8

Bare is `model(...).logits` with isolation, and nothing done with them. Beside it, each as a ratio to the bare pass
of the same round: the logits alone, as the dump makes them; `Teacher.run_all` with each selection; and the same with
the shard encoded and written beside it, as `dump-teacher` does. A round runs all of them once, the order turned by one
each time. Three ratios: of the least times, the least of the rounds, and the median of the rounds. Reading and packing
the corpus are not in it.
Teacher and text default to those of KDCACHE_ASSETS; `--shape` makes a random teacher of a known shape instead.
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

import numpy as np
import torch

from benchmarks.teachers import SHAPES, make_teacher
from kdcache import Selection
from kdcache.codec.id_ranks import FrequencyOrder
from kdcache.isolation import packed_forward
from kdcache.rows import IGNORE, PackedRow, position_ids
from kdcache.store.commit import added, histogram
from kdcache.store.manifest import Manifest
from kdcache.store.open_storage import open_storage
from kdcache.store.publish import new_shard, publish_shard
from kdcache.teacher.background_writer import Beside
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.engines import transformers
from kdcache.teacher.engines.transformers import Targets, Teacher
from kdcache.teacher.inputs import Inputs, open_inputs

Batches = list[list[PackedRow]]


SELECTIONS = {"topk 64": Selection(k=64), "ipps 12": Selection(kind="ipps", k=12)}


def with_order(teacher: Teacher, inputs: Inputs, batches: Batches, rule: Selection) -> Manifest:
    """The manifest of a cache of that selection, its ids ordered by these very batches."""
    known = rule.known(inputs.manifest.temperatures)
    manifest = dataclasses.replace(inputs.manifest, selection=rule.to_fields(), known=known)
    order = FrequencyOrder(manifest.vocab_size)
    for batch in batches:
        order.add(teacher.run(batch, manifest, rule).targets)
    return dataclasses.replace(manifest, id_order=order.ids())


def dump(teacher: Teacher, manifest: Manifest, batches: Batches) -> None:
    entropies: list[list[int]] = []

    def write(batch: list[PackedRow], found: Targets) -> None:
        for row, part in zip(batch, found.targets.split(found.labels), strict=True):
            writer.write(row, part)
        entropies.append(histogram(found.entropy))

    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(folder)
        with new_shard(storage, manifest, 0) as writer, Beside() as beside:
            for batch, found in zip(batches, teacher.run_all(batches, manifest, manifest.rule), strict=True):
                beside.run(partial(write, batch, found))
            beside.finish()
            publish_shard(storage, manifest, writer, documents=1, dropped=0, entropies=added(entropies), compute={})


def some_batches(inputs: Inputs, rows: int, batch_rows: int) -> Batches:
    found: list[PackedRow] = []
    for shard in range(inputs.manifest.shards):
        found += inputs.shard_rows(shard).rows
        if len(found) >= rows:
            break
    return [found[i : min(i + batch_rows, rows)] for i in range(0, min(rows, len(found)), batch_rows)]


def tensors(batch: list[PackedRow], teacher: Teacher, seq_len: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens = torch.from_numpy(np.stack([row.padded_tokens(seq_len) for row in batch])).to(teacher.device)
    places = torch.from_numpy(position_ids(np.stack([row.segments(seq_len) for row in batch]))).to(teacher.device)
    slots = torch.from_numpy(np.stack([row.labels(seq_len) for row in batch]) != IGNORE).nonzero()
    return tokens, places, slots


def works(teacher: Teacher, inputs: Inputs, batches: Batches, sizes: list[int]) -> dict[str, Callable[[], None]]:
    """What is timed: the bare pass, and for each size of a tile the logits alone and a run of each selection."""
    made = [tensors(batch, teacher, inputs.manifest.seq_len) for batch in batches]

    @torch.inference_mode()
    def bare() -> None:
        for tokens, places, _ in made:
            packed_forward(teacher.model, tokens, places)

    @torch.inference_mode()
    def logits_alone() -> None:
        for tokens, places, slots in made:
            for _ in transformers.logit_tiles(teacher.model, teacher.head, tokens, places, slots):
                pass

    def run(rule: Selection) -> None:
        for _ in teacher.run_all(batches, inputs.manifest, rule):
            pass

    manifests = {name: with_order(teacher, inputs, batches, rule) for name, rule in SELECTIONS.items()}

    def tiled(size: int, work: Callable[[], None]) -> Callable[[], None]:
        def sized() -> None:
            transformers.TILE_LOGITS[teacher.device.type] = size
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
    teacher = Teacher(config, inputs.folder, inputs.manifest)
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
        transformers.GPU_TILES = sys.maxsize
    sizes = options.tile_logits or [transformers.TILE_LOGITS[teacher.device.type]]
    seconds = measure(works(teacher, inputs, batches, sizes), options.repeats, teacher.device)
    print(f"{'least seconds, and how often the bare pass':48} seconds  positions/s   minima    least   median")
    for name, values in seconds.items():
        ratios = [value / bare for value, bare in zip(values, seconds["bare"], strict=True)]
        print(
            f"{name:48} {min(values):7.3f}  {slots / min(values):11,.0f}  {min(values) / min(seconds['bare']):7.2f}  "
            f"{min(ratios):7.2f}  {statistics.median(ratios):7.2f}"
        )


if __name__ == "__main__":
    main()
