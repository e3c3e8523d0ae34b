"""Writes the golden caches: one for each selection, store and kind of precision. Run once for a format, then never.

    python -m tests.golden.make

`expected.json` beside the caches holds what a reader must get out of each, in full.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache import Selection, open_cache, select, verify_cache
from kdcache.codec.id_ranks import FrequencyOrder
from kdcache.corpus.plan import CorpusFile, Plan
from kdcache.rows import IGNORE, PackedRow
from kdcache.store.commit import add_histograms, histogram
from kdcache.store.local import LocalStorage
from kdcache.store.manifest import Manifest
from kdcache.store.publish import finish, new_shard, publish_manifest, publish_shard

FOLDER = Path(__file__).parent
EXPECTED = FOLDER / "expected.json"
VOCAB, SLOTS = 40, 12
TEMPERATURES = (1.0, 2.0)

SELECTIONS = {
    "topk": Selection(kind="topk", k=5),
    "topk-label": Selection(kind="topk", k=5, force_label=True),
    "topp": Selection(kind="topp", k=9, top_p=0.8),
    "sample": Selection(kind="sample", draws=10),
    "sample-label": Selection(kind="sample", draws=10, force_label=True),
    "ipps": Selection(kind="ipps", k=5),
    "ipps-label": Selection(kind="ipps", k=5, force_label=True),
    "ipps-adaptive": Selection(kind="ipps", k=5, tau=0.1),
    "full": Selection(kind="full"),
    "topk-entropy": Selection(kind="topk", k=5),
    "ipps-entropy": Selection(kind="ipps", k=5),
}
POSITIONS = {"topk-entropy": "entropy>1.5", "ipps-entropy": "entropy>1.5"}
PRECISIONS = ("6", "12", "float16", "float32")


def names() -> list[str]:
    found = [f"{kind}-6-{store}" for kind in SELECTIONS for store in ("arrow", "zarr")]
    return found + [f"{kind}-{p}-arrow" for kind in ("topk", "topp", "sample", "ipps") for p in PRECISIONS[1:]]


def rows(shard: int) -> list[PackedRow]:
    random, found = np.random.default_rng(shard), []
    for row in range(3 if shard else 2):
        cut = 5 + row
        found.append(
            PackedRow(
                tokens=random.integers(0, VOCAB, SLOTS - row % 2).astype(np.int32),
                piece_lengths=np.array([cut, SLOTS - row % 2 - cut], np.int32),
                piece_documents=np.array([2 * row, 2 * row + 1], np.int64),
                supervised=random.random(SLOTS - row % 2) < 0.7 if row == 1 else None,
            )
        )
    return found


def targets(row: PackedRow, number: int, rule: Selection) -> Any:
    """Peaked and flat positions; one whose support is smaller than k."""
    labels = torch.from_numpy(row.labels(SLOTS))
    labels = labels[labels != IGNORE]
    generator = torch.Generator().manual_seed(number)
    logits = torch.randn(len(labels), VOCAB, generator=generator)
    logits *= torch.linspace(0, 9, len(labels))[:, None]
    if len(labels):
        logits[0, 3:] = -2000.0
    return select(logits, rule, labels=labels, temperatures=TEMPERATURES, seed=number)


PLAN = Plan(
    first=np.array([0, 8]), last=np.array([7, 14]), characters=np.array([800, 700]),
    sha256=np.arange(64, dtype=np.uint8).reshape(2, 32), file=np.array([0, 1], np.int32), offset=np.array([0, 3]),
    files=(CorpusFile(name="a.txt", size=820), CorpusFile(name="b/c.txt", size=800)),
    reading={"form": "text", "columns": ["text"], "split": "train", "split_text": "paragraph"},
    rule={"chars_per_shard": 750},
)  # fmt: skip


LEFT_OUT: dict[str, Any] = {
    "dropped_by": {"overlong": 1, "not UTF-8": 1}, "bad": 1, "cut": 2, "truncated": 1, "eos_labels": 3,
    "bad_records": [{"document": 14, "reason": "not UTF-8: byte 3 is no beginning of a character"}],
}  # fmt: skip
"""What became of the documents of shard 1 that are in no row, or not whole; nothing is known of those of shard 0."""


def write(name: str) -> None:
    kind, precision, store = name.rsplit("-", 2)
    rule, storage = SELECTIONS[kind], LocalStorage(FOLDER / name)
    order = FrequencyOrder(VOCAB)
    order.add(targets(rows(0)[0], 0, rule))
    manifest = Manifest(
        teacher_sha256="1" * 64, tokenizer_sha256="2" * 64, tokenizer_files={}, corpus_sha256="3" * 64,
        filters={"min_chars": 0, "drop": None, "limit_docs": None}, documents=15, shards=2, plan={}, date="2026-11-28",
        on_bad_record="stop", eos="auto", pack="best-fit", overlong="auto", vocab_size=VOCAB,
        seq_len=SLOTS, isolate=True, selection=rule.to_fields(), known=rule.known(TEMPERATURES),
        positions=POSITIONS.get(kind, "all"),
        seed=0,
        temperatures=TEMPERATURES, precision=precision, error_bound={},
        id_order=order.ids() if precision.isdecimal() else (),
        store=store, origin={"made by": "tests/golden/make.py"},
    )  # fmt: skip
    manifest = dataclasses.replace(manifest, error_bound=manifest.codec.error_bound)
    manifest = publish_manifest(storage, manifest, {"note.txt": b"a golden cache has no tokenizer\n"}, PLAN)
    for shard in range(manifest.shards):
        entropies: list[list[int]] = []
        with new_shard(storage, manifest, shard) as writer:
            for number, row in enumerate(rows(shard)):
                found = targets(row, 10 * shard + number, rule)
                entropies.append(histogram(found.entropy))
                writer.write(row, manifest.position_filter.apply(found))
            publish_shard(
                storage, manifest, writer, documents=8 - shard, entropies=add_histograms(entropies),
                compute={"dtype": "float32"}, **(LEFT_OUT if shard else {}),
            )  # fmt: skip
    assert finish(storage)["complete"]


def plain(tensor: torch.Tensor) -> Any:
    def number(x: Any) -> Any:
        return [number(y) for y in x] if isinstance(x, list) else float(f"{x:.8g}") if math.isfinite(x) else str(x)

    return number(tensor.tolist())


def read(name: str) -> dict[str, Any]:
    """Everything that a reader gets out of a golden cache."""
    cache = open_cache(FOLDER / name)
    fields = ("ids", "logprobs", "weights", "count", "log_partition", "log_tail", "entropy", "label_logprob")
    found = []
    for index in range(len(cache)):
        row, target = cache.read_packed(index)
        found.append({
            "tokens": row.tokens.tolist(), "lengths": row.piece_lengths.tolist(),
            "documents": row.piece_documents.tolist(),
            "supervised": None if row.supervised is None else row.supervised.tolist(),
            **{field: None if (value := getattr(target, field)) is None else plain(value) for field in fields},
        })  # fmt: skip
    return {
        "content_sha256": verify_cache(FOLDER / name).content_sha256,
        "documents": cache.commits.of_documents(),
        "rows": found,
    }


def main() -> None:
    expected = {}
    for name in names():
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        write(name)
        expected[name] = read(name)
    EXPECTED.write_text(json.dumps(expected, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
