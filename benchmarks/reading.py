"""Rows per second, in order and shuffled, from both stores: random access should not be slower.

    python -m benchmarks.reading [--rows 800] [--k 64] [--precision 6] [--repeats 5]

One process, one thread, files in the page cache. The cache is made here of synthetic targets, 8 shards of rows of 512
slots, the same rows in both stores; the two orders alternate, and the ratio is that of their medians.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.codec import synthetic
from kdcache import Selection, open_cache
from kdcache.cache import Cache
from kdcache.rows import PackedRow
from kdcache.store.local import LocalStorage
from kdcache.store.manifest import Manifest
from kdcache.store.publish import new_shard, publish_manifest, publish_shard
from kdcache.targets import SparseTargets

SHARDS = 8
SLOTS = 512
NOBODY = "0" * 64


def make(folder: Path, store: str, targets: list[SparseTargets], rows: int, vocab: int, precision: str) -> Cache:
    ids = torch.cat([t.ids.flatten() for t in targets])
    order = torch.bincount(ids, minlength=vocab).argsort(descending=True).tolist()
    rule = Selection(k=targets[0].ids.shape[-1])
    manifest = Manifest(
        teacher_sha256=NOBODY, tokenizer_sha256=NOBODY, tokenizer_files={}, corpus_sha256=NOBODY,
        filters={}, documents=SHARDS,
        shards=SHARDS, plan={}, date="2026-11-28", on_bad_record="stop",
        eos="auto", pack="best-fit", overlong="auto",
        vocab_size=vocab, seq_len=SLOTS, isolate=True, known=rule.known(targets[0].temperatures),
        positions="all", seed=0,
        selection=rule.to_fields(), temperatures=targets[0].temperatures,
        precision=precision, error_bound={},
        id_order=tuple(order) if precision.isdecimal() else (), store=store, origin={},
    )  # fmt: skip
    storage, random = LocalStorage(folder), np.random.default_rng(0)
    publish_manifest(storage, manifest, {})
    for shard in range(SHARDS):
        with new_shard(storage, manifest, shard) as writer:
            for row in range(rows // SHARDS):
                tokens = random.integers(0, vocab, SLOTS, np.int32)
                packed = PackedRow(
                    tokens=tokens, piece_lengths=np.array([SLOTS], np.int32), piece_documents=np.array([shard])
                )
                writer.write(packed, targets[row % len(targets)])
            entropies = [writer.tally.labels]  # any numbers will do: they are not read here
            publish_shard(storage, manifest, writer, documents=1, entropies=entropies, compute={})
    return open_cache(folder)


def rate(cache: Cache, order: list[int]) -> float:
    started = time.perf_counter()
    for index in order:
        cache.read_packed(index)
    return len(order) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--precision", default="6")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    targets, vocab = synthetic(16, Selection(k=options.k), positions=SLOTS - 1)
    print(f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, torch {torch.__version__}, one thread")
    for store in ("arrow", "zarr"):
        with tempfile.TemporaryDirectory() as folder:
            cache = make(Path(folder), store, targets, options.rows, vocab, options.precision)
            shuffled = np.random.default_rng(1).permutation(len(cache)).tolist()
            rate(cache, shuffled)
            rates = [(rate(cache, list(range(len(cache)))), rate(cache, shuffled)) for _ in range(options.repeats)]
            in_order, random = (statistics.median(column) for column in zip(*rates, strict=True))
            print(
                f"{store}: {in_order:,.0f} rows/s in order, {random:,.0f} shuffled, ratio {random / in_order:.2f}"
                f" ({random * (SLOTS - 1) / 1e6:.2f}M positions/s)"
            )


if __name__ == "__main__":
    main()
