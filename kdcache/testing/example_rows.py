"""Examples: small manifests, rows of every sort, and whole caches of them, to test stores with."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.corpus.plan import CorpusFile, Plan
from kdcache.errors import ConfigError
from kdcache.extras import ExtraSpec
from kdcache.known import Known
from kdcache.prefixes import NO_PREFIX, Prefix, Prefixes
from kdcache.rows import IGNORE, PackedRow
from kdcache.selection import Selection, select
from kdcache.store.commit import histogram
from kdcache.store.manifest import Manifest
from kdcache.store.publish import new_shard, publish_manifest, publish_shard
from kdcache.store.row_format import Record
from kdcache.store.storage import Storage
from kdcache.targets import SparseTargets

Example = tuple[PackedRow, SparseTargets]

_SETTINGS: dict[str, dict[str, Any]] = {
    "topk": {"k": 3},
    "topp": {"k": 4, "top_p": 0.8},
    "sample": {"draws": 5},
    "ipps": {"k": 3},
    "full": {},
}

SELECTIONS: dict[str, dict[str, Any]] = {kind: {"kind": kind, **_SETTINGS[kind]} for kind in _SETTINGS}
"""One small selection of each kind."""

EXTRAS: dict[str, dict[str, Any]] = {
    "hidden:-1": ExtraSpec(width=40, precision="int8").to_fields(),
    "surprise": ExtraSpec(width=1, precision="float16", per="position").to_fields(),
    "wide_0.5": ExtraSpec(width=2, precision="bfloat16").to_fields(),
    "exact": ExtraSpec(width=3, per="position").to_fields(),
}
"""One extra of each precision, of tokens and of positions."""

SHARDS = 2
"""Of an example cache."""

TEACHER_CONTEXT = {"seq_len": 24, "system": None}
"""Of a teacher that reads more than its student."""

DOCUMENTS = 20
"""Of each shard of an example cache."""


def example_manifest(store: str, **changes: Any) -> Manifest:
    """A small manifest: 2 shards of 20 documents, rows of 12 slots, 50 ids."""
    zero = "0" * 64
    fields: dict[str, Any] = {
        "teacher_sha256": zero, "tokenizer_sha256": zero, "tokenizer_files": {}, "corpus_sha256": zero, "filters": {},
        "documents": DOCUMENTS * SHARDS, "shards": SHARDS, "plan": {}, "date": "2026-01-31", "on_bad_record": "stop",
        "eos": "auto", "pack": "best-fit", "overlong": "auto",
        "vocab_size": 50, "seq_len": 12, "isolate": True, "positions": "all", "seed": 0,
        "selection": SELECTIONS["topk"], "temperatures": (1.0, 2.0), "precision": "float32",
        "error_bound": {}, "id_order": (),
        "store": store, "origin": {},
    }  # fmt: skip
    fields |= changes
    fields.setdefault("known", _known(fields["selection"], fields["temperatures"]))
    return Manifest(**fields)


def _known(selection: dict[str, Any], temperatures: tuple[float, ...]) -> Known:
    try:
        return Selection.from_fields(selection).known(temperatures)
    except ConfigError:  # a manifest that is to be refused
        return Known(partitions=temperatures)


def example_plan(manifest: Manifest) -> Plan:
    """The plan of an example cache: as many documents a shard as go into it, in one file."""
    first = np.arange(manifest.shards) * DOCUMENTS
    return Plan(
        first=first, last=np.append(first[1:] - 1, manifest.documents - 1), characters=np.full(manifest.shards, 100),
        sha256=np.arange(32 * manifest.shards, dtype=np.uint8).reshape(-1, 32),
        file=np.zeros(manifest.shards, np.int32), offset=100 * np.arange(manifest.shards),
        files=(CorpusFile(name="example.txt", size=100 * manifest.shards),),
        reading={"form": "text", "columns": ["text"], "split": "train", "split_text": "line"},
        rule={"docs_per_shard": DOCUMENTS},
    )  # fmt: skip


def example_rows(manifest: Manifest, count: int, seed: int = 0, values: int | None = None) -> list[Example]:
    """Rows of every sort: whole and short, of one piece and of many, masked, and with nothing to predict.

    Args:
        manifest: of the cache that they are for.
        count: how many.
        seed: of the tokens and pieces.
        values: of the targets; like `seed` if not given.
    """
    random, logits = np.random.default_rng(seed), torch.Generator().manual_seed(seed if values is None else values)
    rule, found = manifest.rule, []
    for i in range(count):
        n = (manifest.seq_len, 1, manifest.seq_len - 3)[i % 3]
        cuts = np.sort(random.choice(np.arange(1, n), min(n - 1, (0, 1, n - 1)[i // 3 % 3]), replace=False))
        lengths = np.diff([0, *cuts, n]).astype(np.int32)
        row = PackedRow(
            tokens=random.integers(0, manifest.vocab_size, n, np.int32),
            piece_lengths=lengths,
            piece_documents=random.integers(0, manifest.documents, len(lengths)),
            supervised=random.random(n) < 0.6 if i % 2 else None,
        )
        if manifest.teacher_context:
            row = dataclasses.replace(row, prefixes=_prefixes(random, manifest, lengths))
        labels = row.labels(manifest.seq_len)
        labels = labels[labels != IGNORE]
        scores = 4 * torch.randn(len(labels), manifest.vocab_size, generator=logits)
        targets = select(scores, rule, labels=torch.from_numpy(labels), temperatures=manifest.temperatures)
        found.append((row, manifest.position_filter.apply(targets)))
    return found


def _prefixes(random: np.random.Generator, manifest: Manifest, lengths: NDArray[np.int32]) -> Prefixes:
    """Some of two prefixes before the pieces of a row, and none before others."""
    known = [random.integers(0, manifest.vocab_size, size, np.int32) for size in (1, 4)]
    which = random.integers(0, 3, len(lengths))
    return Prefixes.of(
        NO_PREFIX if i == 2 else Prefix(tokens=known[i], replaced=int(length > 1))
        for i, length in zip(which, lengths, strict=True)
    )


def example_extras(manifest: Manifest, row: PackedRow, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Vectors of every extra of a manifest, for one row."""
    random, found = np.random.default_rng(seed), {}
    for name, spec in manifest.extra_specs.items():
        vectors = len(row.tokens) if spec.per == "token" else int((row.labels(manifest.seq_len) != IGNORE).sum())
        found[name] = random.standard_normal((vectors, spec.width)).astype(np.float32)
    return found


def of_shards(manifest: Manifest, shards: int) -> Manifest:
    """The same manifest of so many shards."""
    return dataclasses.replace(manifest, documents=shards * DOCUMENTS, shards=shards)


def same_rows(one: Example, two: Example) -> bool:
    """Whether two rows and their targets are equal bit for bit; a NaN equals a NaN."""
    values = [zip(vars(a).values(), vars(b).values(), strict=True) for a, b in zip(one, two, strict=True)]
    return all(_same(a, b) for pairs in values for a, b in pairs)


def same_records(one: Record, two: Record) -> bool:
    """Whether two records hold the same streams."""
    return (
        one.positions == two.positions
        and list(one.streams) == list(two.streams)
        and all(a.tobytes() == two.streams[name].tobytes() for name, a in one.streams.items())
    )


def write_cache(storage: Storage, manifest: Manifest, rows: list[Example]) -> Manifest:
    """A complete cache that has these rows in each of its shards; the manifest as written."""
    created = publish_manifest(storage, manifest, {"tokenizer.json": b"{}"}, example_plan(manifest))
    for shard in range(manifest.shards):
        assert write_shard(storage, created, rows, shard)
    return created


def write_shard(storage: Storage, manifest: Manifest, rows: list[Example], shard: int = 0) -> bool:
    """Write and commit one shard; False if there is a commit already."""
    with new_shard(storage, manifest, shard) as writer:
        for row, targets in rows:
            writer.write(row, targets, extras=example_extras(manifest, row))
        return publish_shard(
            storage, manifest, writer, documents=DOCUMENTS, entropies=histogram_of(rows), compute={"a": 1},
            dropped_by={"too short": 2, "no answer": 1}, bad=1, cut=4, truncated=1, eos_labels=0,
            bad_records=[{"document": DOCUMENTS * shard + 7, "reason": "no answer: the last turn is the user's"}],
        )  # fmt: skip


def histogram_of(rows: list[Example]) -> list[int]:
    """What a commit says of the entropies of these rows; a position without a target counts as one of none."""
    return histogram(torch.cat([torch.zeros(0), *(targets.require("entropy", "a commit") for _, targets in rows)]))


def overwrite(storage: Storage, name: str, data: bytes) -> None:
    """Put other bytes under a name."""
    storage.delete(name)
    assert storage.create(name, data)


def everything(storage: Storage) -> dict[str, bytes]:
    """All objects of a cache, by name."""
    return {name: b"".join(storage.chunks(name)) for name in storage.names()}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(torch.nan_to_num(a, 7.5), torch.nan_to_num(b, 7.5))
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b, equal_nan=a.dtype.kind == "f"))
    if isinstance(a, Prefixes) and isinstance(b, Prefixes):
        return _same(vars(a), vars(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    return bool(a == b)
