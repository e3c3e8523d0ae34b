"""Import: another tool's cache into a cache of kdcache.

The source is read twice: once to see how long its rows are and how many entries they have, and once to write. A row of
the cache is a sequence of the source; what the source does not say of a target (entropy, the exact tail) stays unknown.
Shards are written through the public `CacheWriter`, so an import that was stopped goes on with those that are missing.

Cost: two passes; in memory one part of the source and one row.
"""

from __future__ import annotations

import collections
import itertools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdcache import stopping
from kdcache.cache_writer import CacheWriter, create_cache
from kdcache.errors import ConfigError, CorpusError
from kdcache.interop.foreign_row import ForeignRow, Scaled, supervised_tokens, to_targets
from kdcache.interop.formats import LOGITS, READ, ForeignCache, find_format
from kdcache.known import Known
from kdcache.pretrained import fingerprint, load_tokenizer, vocabulary_size
from kdcache.selection import Selection
from kdcache.selection.topk import TopK
from kdcache.selection.topp import TopP

_RENORMALISED = 1e-3
"""Masses that are all nearer to 1 than this come of a renormalisation over the entries."""

IMPORTED = tuple(name for name in READ if name not in ("kdcache", "maxtext", "se-kd"))
"""Formats that an import reads; the others are for audits."""


def import_cache(
    source: str,
    out: str | os.PathLike[str],
    as_: str,
    *,
    teacher: str,
    tokens: str | None = None,
    tokenizer: str | None = None,
    vocab_size: int | None = None,
    store: str = "arrow",
    precision: str | None = None,
    rows_per_shard: int = 4096,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a cache from another tool's.

    Args:
        source: its file or folder.
        out: folder or URL of the cache; created, or resumed if it is the same import.
        as_: the format of the source, one of `IMPORTED`.
        teacher: the folder of the teacher, whose fingerprint the cache then carries, or any text that names it.
        tokens: a file with the token ids, for formats that keep none.
        tokenizer: folder of the teacher's tokenizer, copied into the cache.
        vocab_size: token ids lie below it; by default the tokenizer's, or what the source says.
        store, precision: as for a dump.
        rows_per_shard: sequences of a shard.
        on_progress: called with (rows done, rows to do).

    Returns:
        What `CacheWriter.finish` counts, `seconds`, `lost` (what the source does not say), `renormalised` (whether its
        entries add up to 1), `scaled_positions` and `largest_mass` (of entries that added up to more than 1, which this
        run scaled), `skipped_rows` (sequences without any target), and `advice`: what this usually means.

    Raises:
        ConfigError: another format, one that is only audited, or a vocabulary that nobody knows.
        CorpusError: a source that cannot be read.
        KdcacheError: see the exception tree; nothing already written is harmed.
    """
    started = time.perf_counter()
    if rows_per_shard < 1:
        raise ConfigError(f"rows_per_shard is {rows_per_shard}, but must be at least 1")
    form = find_format(as_, READ)
    opened = form.open(source, tokens)
    if as_ not in IMPORTED:
        why = "logits without their normaliser" if opened.values == LOGITS else "draws in 7 bits, which are no counts"
        raise ConfigError(f"as_ is {as_}, whose caches hold {why}; they can be audited, and not imported")
    survey = _Survey.of(opened)
    vocabulary = vocab_size or _vocabulary(tokenizer, opened)
    if survey.largest_id >= vocabulary:
        raise ConfigError(f"vocab_size is {vocabulary}, but {source} has the token id {survey.largest_id}")
    shards = -(-survey.rows // rows_per_shard)
    writer = create_cache(
        out, vocab_size=vocabulary, seq_len=max(2, survey.longest), selection=survey.selection, shards=shards,
        teacher=fingerprint(Path(teacher)) if (Path(teacher) / "config.json").is_file() else teacher,
        corpus=f"{as_}:{survey.tokens_sum}:{survey.rows}", documents=survey.rows, tokenizer=tokenizer,
        known=Known(entropy=False, label_logprob=survey.labels, tails=(1.0,), tail_sum="remainder"),
        store=store, precision=precision, isolate=opened.isolated is not False,
        origin={"imported_from": as_, "source": source},
    )  # fmt: skip
    scaled = Scaled()
    _write(writer, opened, survey, scaled, on_progress)
    return {
        **writer.finish(), "seconds": time.perf_counter() - started, "lost": _lost(survey),
        "renormalised": survey.renormalised, "scaled_positions": scaled.positions, "largest_mass": scaled.most,
        "skipped_rows": survey.empty, "advice": _advice(survey, scaled),
    }  # fmt: skip


@dataclass
class _Survey:
    """What one pass over a source finds.

    Attributes:
        rows: sequences with a target; `empty` have none.
        longest: tokens of the longest.
        fewest, most: entries of a target.
        labels: whether each target has the log-probability of its label.
        largest_id: of tokens and entries.
        tokens_sum: of all token ids, with their number: a cheap sign of another source.
    """

    rows: int = 0
    empty: int = 0
    longest: int = 0
    fewest: int = 1 << 62
    most: int = 0
    labels: bool = True
    largest_id: int = 0
    tokens_sum: int = 0
    pieces: bool = True
    renormalised: bool = True

    @classmethod
    def of(cls, source: ForeignCache) -> _Survey:
        found = cls()
        for row in source.rows():
            found.add(row.with_labels())
        if not found.rows:
            raise CorpusError("the source holds no target of a token that is followed by another")
        return found

    def add(self, row: ForeignRow) -> None:
        """Count a sequence."""
        if not len(row.slots):
            self.empty += 1
            return
        self.rows += 1
        self.longest = max(self.longest, len(row.tokens))
        self.fewest, self.most = min(self.fewest, int(row.count.min())), max(self.most, int(row.count.max()))
        self.labels &= row.label_logprob is not None
        self.pieces &= row.piece_lengths is not None
        self.largest_id = max(self.largest_id, int(row.tokens.max()), int(row.ids[row.used].max()))
        self.tokens_sum += int(row.tokens.sum()) + len(row.tokens)
        self.renormalised &= bool((np.abs(row.mass - 1) < _RENORMALISED).all())

    @property
    def selection(self) -> Selection:
        """`topk` where all targets have as many entries, else `topp`."""
        if self.fewest == self.most:
            return TopK(k=self.most)
        return TopP(k=self.most, top_p=1.0, min_k=self.fewest)


def _write(
    writer: CacheWriter, source: ForeignCache, survey: _Survey, scaled: Scaled,
    on_progress: Callable[[int, int], None] | None,
) -> None:  # fmt: skip
    """Write the shards that are missing, each from its share of the sequences."""
    rows, shards, missing = _numbered(source), writer.manifest.shards, set(writer.missing())
    selection = survey.selection
    for number in range(shards):
        first, last = (each * survey.rows // shards for each in (number, number + 1))
        share = itertools.islice(rows, last - first)
        if number not in missing:
            collections.deque(share, maxlen=0)  # goes past them
            continue
        with stopping.deferred(), writer.shard(number) as shard:
            shard.planned_rows = last - first
            for index, row in share:
                shard.write(
                    row.tokens, to_targets(row, survey.most, selection.kind, scaled), piece_lengths=row.piece_lengths,
                    supervised=supervised_tokens(row),
                    documents=np.full(1 if row.piece_lengths is None else len(row.piece_lengths), index),
                )  # fmt: skip
                if on_progress:
                    on_progress(index + 1, survey.rows)
                stopping.check(stopping.GRACE)


def _numbered(source: ForeignCache) -> Iterator[tuple[int, ForeignRow]]:
    """The sequences that have targets, numbered."""
    kept = (row.with_labels() for row in source.rows())
    return enumerate(row for row in kept if len(row.slots))


def _vocabulary(tokenizer: str | None, source: ForeignCache) -> int:
    if tokenizer is not None:
        return vocabulary_size(load_tokenizer(Path(tokenizer)))
    if source.vocab_size is None:
        raise ConfigError("vocab_size is not given, and the source does not say it; name it, or the tokenizer")
    return source.vocab_size


def _lost(survey: _Survey) -> list[str]:
    """What the source does not say of its targets."""
    found = ["the teacher's entropy", "tails summed over the vocabulary: a tail is one minus the kept mass"]
    if not survey.labels:
        found.append("log p of the true next token")
    if not survey.pieces:
        found.append("where pieces begin: each sequence is one piece")
    return found


def _advice(survey: _Survey, scaled: Scaled) -> list[str]:
    """What usually goes wrong with such a source."""
    found = []
    if survey.renormalised:
        found.append(
            "the entries of every position add up to 1, so the source was renormalised over them and has no tail: a "
            "student that learns from it is pushed above the teacher's probabilities"
        )
    if scaled.positions:
        found.append(
            f"{scaled.positions:,} positions had entries that add up to more than 1, {scaled.most:.3f} at most, and "
            "were scaled to 1: the source had rounded them"
        )
    return found
