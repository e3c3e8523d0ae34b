"""The dump: shard by shard, from documents to a commit.

Order of a run: look at everything that can be wrong (folders, corpus, options, a cache of
another configuration), load and probe the teacher, and only then write. Each shard is a
function of its documents alone; a run that stops leaves whole shards behind and goes on with
those that are not committed.
Cost above the teacher's forward pass: the selection, and one copy of the entries off the device.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache.errors import CacheError
from kdcache.selection import Selection
from kdcache.store import arrow_store, commit
from kdcache.store.arrow_store import ArrowShardWriter
from kdcache.store.commit import Commit, read_commits
from kdcache.store.durable import sha256_file, storage_errors, sweep, write_new
from kdcache.store.manifest import NAME, Manifest
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.forward import Teacher
from kdcache.teacher.inputs import Inputs, open_inputs
from kdcache.teacher.pilot import id_order
from kdcache.teacher.worker import Worker, find_worker

_TOKENIZER = "tokenizer"

Progress = Callable[[int, int, int], None]
"""Called with documents done, documents to do, and positions done so far."""


def dump(config: DumpConfig, on_progress: Progress | None = None) -> dict[str, Any]:
    """Run the teacher over this worker's share of the shards that are not committed yet.

    Returns:
        The summary that `kdcache dump-teacher --json` prints.

    Raises:
        KdcacheError: see the exception tree; nothing already written is harmed.
    """
    started = time.perf_counter()
    worker = find_worker(config.worker, os.environ)
    out = Path(config.out)
    inputs = open_inputs(config)
    inputs.require_positions()
    standing = _require_free_or_same(out, inputs.manifest)
    done = read_commits(out, standing) if standing else {}
    mine = [s for s in range(inputs.manifest.shards) if worker.owns(s) and s not in done]
    tally = _Tally(on_progress, sum(_range_size(inputs.manifest, s) for s in mine))
    if mine or not standing:
        teacher = Teacher(config, inputs.folder, inputs.manifest)
        order = () if standing else id_order(teacher, inputs)
        with storage_errors(out):
            manifest = _create(out, dataclasses.replace(inputs.manifest, id_order=order), inputs.tokenizer)
        for shard in mine:
            tally.finish(_make_shard(out, shard, inputs, manifest, teacher, tally), _range_size(manifest, shard))
    return _summary(out, worker, tally, time.perf_counter() - started)


@dataclass
class _Tally:
    """What this worker has done so far."""

    on_progress: Progress | None
    documents: int
    documents_done: int = 0
    shards: int = 0
    positions: int = 0

    def show(self, documents: float, positions: int) -> None:
        """Report progress inside a shard."""
        if self.on_progress:
            self.on_progress(self.documents_done + int(documents), self.documents, self.positions + positions)

    def finish(self, positions: int | None, documents: int) -> None:
        """Count a shard; `positions` is None if another worker made it meanwhile."""
        self.documents_done += documents
        self.shards += positions is not None
        self.positions += positions or 0
        self.show(0, 0)


def _require_free_or_same(out: Path, manifest: Manifest) -> Manifest | None:
    """The manifest that stands in the folder, if it is of this configuration; None in a free folder."""
    if out.exists() and not out.is_dir():
        raise CacheError(f"--out {out} is a file, not a folder")
    names = {p.name for p in out.iterdir() if not p.name.startswith(".")} if out.exists() else set()
    if NAME in names:
        standing = Manifest.read(out)
        standing.require_same(manifest, out)
        return standing
    strangers = sorted(names - {_TOKENIZER})  # which is written before the manifest
    if strangers:
        raise CacheError(f"--out {out} holds no cache but other files, such as {strangers[0]}; choose another folder")
    return None


def _create(out: Path, manifest: Manifest, tokenizer: Any) -> Manifest:
    """Write the tokenizer and then the manifest, or take those that another worker has written."""
    folder = out / _TOKENIZER
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        files = {p.name: p.read_bytes() for p in sorted(Path(scratch).rglob("*")) if p.is_file()}
    if not (out / NAME).exists():
        for name, data in files.items():
            if not write_new(folder / name, data) and (folder / name).read_bytes() != data:
                raise CacheError(
                    f"{folder} holds the {name} of another tokenizer; delete the folder, or choose another --out"
                )
        strays = sorted(p.name for p in folder.iterdir() if not p.name.startswith(".") and p.name not in files)
        if strays and not (out / NAME).exists():
            raise CacheError(f"{folder} holds a stray file, {strays[0]}; delete the folder, or choose another --out")
    sums = {p.name: sha256_file(p) for p in sorted(folder.iterdir()) if not p.name.startswith(".")}
    standing = dataclasses.replace(manifest, tokenizer_files=sums).create(out)
    for place in (out, folder, out / arrow_store.FOLDER, out / commit.FOLDER):
        sweep(place)
    return standing


def _make_shard(
    out: Path, shard: int, inputs: Inputs, manifest: Manifest, teacher: Teacher, tally: _Tally
) -> int | None:
    """Make and commit one shard. Positions written, or None if another worker was first."""
    made = inputs.shard_rows(shard)
    rule, codec = Selection(**manifest.selection), manifest.codec
    with ArrowShardWriter(out, shard, codec, manifest.seq_len) as writer:
        for first in range(0, len(made.rows), teacher.batch_rows):
            batch = made.rows[first : first + teacher.batch_rows]
            targets, counts = teacher.run(batch, manifest, rule)
            ends = np.cumsum([0, *counts])
            for row, begin, end in zip(batch, ends[:-1], ends[1:], strict=True):
                writer.write(row, targets[int(begin) : int(end)])
            tally.show(made.documents * (first + len(batch)) / len(made.rows), writer.positions)
        if Commit.read(out, shard, manifest.sha256) is not None:
            return None
        data, ours = writer.publish()
        record = Commit(
            shard=shard,
            manifest_sha256=manifest.sha256,
            objects=[data],
            rows=writer.rows,
            positions=writer.positions,
            entries=writer.entries,
            documents=made.documents,
            dropped=made.dropped,
            tokens_sha256=writer.tokens_sha256,
            compute=teacher.compute if ours else {"unknown": "its writer stopped before the commit"},
        )
        return writer.positions if record.write(out) else None


def _range_size(manifest: Manifest, shard: int) -> int:
    start = shard * manifest.docs_per_shard
    return min(manifest.docs_per_shard, manifest.documents - start)


def _summary(out: Path, worker: Worker, tally: _Tally, seconds: float) -> dict[str, Any]:
    manifest = Manifest.read(out)
    commits = read_commits(out, manifest)
    names = ("rows", "positions", "entries", "documents", "dropped")
    total = {name: sum(getattr(c, name) for c in commits.values()) for name in names}
    size = (out / NAME).stat().st_size
    for shard, record in commits.items():
        size += commit.commit_path(out, shard).stat().st_size + sum(data["bytes"] for data in record.objects)
    return {
        "cache": str(out),
        "complete": len(commits) == manifest.shards,
        "shards": {"planned": manifest.shards, "committed": len(commits), "by_this_worker": tally.shards},
        "worker": f"{worker.index}/{worker.count}",
        **total,
        "bytes": size,
        "bytes_per_position": size / max(1, total["positions"]),
        "seconds": seconds,
        "positions_per_second": tally.positions / seconds,
    }
