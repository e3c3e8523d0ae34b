"""A sample of a corpus: documents from all over it, tokenised and packed as a dump would.

Guarantee: a corpus of at most two million characters (more where rows are long) is read whole, so its rows are counted
and not estimated. Of a larger one the beginnings of shards are read, evenly spread over it.
Cost: tokenising so many characters; more where single documents are very long.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kdcache.corpus.plan import Plan
from kdcache.corpus.shards import ShardRows, shard_rows
from kdcache.corpus.sources import Corpus
from kdcache.errors import CorpusError
from kdcache.rows import IGNORE, PackedRow, RowSpec
from kdcache.teacher.inputs import Inputs

_CHARACTERS = 1 << 21
_CHARACTERS_A_SLOT = 1 << 11
"""So each of 16 places fills some 32 rows: the last of them, which is not full, then weighs little."""

_LEAST_PLACES = 16
"""Places of the corpus at which documents are read, if it has as many shards."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Some documents of a corpus and the rows that they became.

    Attributes:
        spec: the shape of its rows.
        parts: what each place of the corpus became, in order.
        share: of the corpus that they are, by characters; 1 if they are all of it.
        characters: theirs; tokens where the corpus is tokenised.
        tokens, labels: in their rows.
        slots: of their rows, padding included, in batches as a dump makes them.
        seconds: that reading, tokenising and packing took.
    """

    spec: RowSpec
    parts: tuple[ShardRows, ...]
    share: float
    characters: int
    tokens: int
    labels: int
    slots: int
    seconds: float

    @property
    def rows(self) -> int:
        """Their number."""
        return sum(len(part.rows) for part in self.parts)

    @property
    def described(self) -> ShardRows:
        """All parts as if they were one shard, but for the rows."""
        dropped: Counter[str] = Counter()
        for part in self.parts:
            dropped.update(part.dropped)
        return dataclasses.replace(
            self.parts[0],
            documents=sum(part.documents for part in self.parts),
            dropped=dict(sorted(dropped.items())),
            bad_records=tuple(bad for part in self.parts for bad in part.bad_records),
            cut=sum(part.cut for part in self.parts),
            truncated=sum(part.truncated for part in self.parts),
        )

    def batches(self, wanted: int, batch_rows: int) -> list[list[PackedRow]]:
        """Batches of rows, evenly spread over the sample; fewer if it has no more rows.

        Args:
            wanted: number of batches.
            batch_rows: rows of each.
        """
        places = [(part.rows, i) for part in self.parts for i in range(len(part.rows))]
        count = min(len(places), wanted * batch_rows)
        if count > batch_rows:
            count -= count % batch_rows  # whole batches: a smaller one is slower by the row
        chosen = [places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count)]
        rows = [packed[i] for packed, i in chosen]
        if not self.spec.packed:
            rows.sort(key=lambda row: -len(row.tokens))  # as they lie in a shard
        return [rows[start : start + batch_rows] for start in range(0, count, batch_rows)]


def take_sample(inputs: Inputs, batch_rows: int, characters: int | None = None) -> Sample:
    """Read a sample of a corpus.

    Args:
        inputs: the corpus, its plan, and what makes rows of it.
        batch_rows: rows of a batch.
        characters: about as many are read; None for what the length of rows asks for.

    Raises:
        CorpusError: documents cannot be read.
    """
    started = time.perf_counter()
    plan, spec = inputs.plan, inputs.manifest.row_spec
    wanted = characters or max(_CHARACTERS, _CHARACTERS_A_SLOT * spec.seq_len)
    total, read = int(plan.characters.sum()), 0
    parts = []
    for stretch in _stretches(inputs.corpus, plan, wanted):
        parts.append(shard_rows(inputs.corpus, stretch, 0, inputs.shaping))
        read += int(stretch.characters[0])
    seconds = time.perf_counter() - started
    tokens = labels = slots = 0
    for part in parts:
        for batch in part.rows.batches(batch_rows):
            slots += slots_of(batch, spec)
            tokens += sum(len(row.tokens) for row in batch)
            labels += sum(int((row.labels(len(row.tokens)) != IGNORE).sum()) for row in batch)
    if not labels:
        raise CorpusError(
            f"none of the {sum(part.documents for part in parts)} documents of a sample has a token to predict"
        )
    return Sample(
        spec=spec, parts=tuple(parts), characters=read, tokens=tokens, labels=labels, slots=slots, seconds=seconds,
        share=read / total if total else sum(part.documents for part in parts) / plan.documents,
    )  # fmt: skip


def slots_of(batch: Sequence[PackedRow], spec: RowSpec) -> int:
    """The slots of a batch, padding included: what a forward pass is given."""
    return len(batch) * spec.length(batch)


def _stretches(corpus: Corpus, plan: Plan, characters: int) -> Iterator[Plan]:
    """Plans of one shard each: the documents with which some of the planned shards begin, in order."""
    total = int(plan.characters.sum())
    if total <= characters:
        yield from (_beginning(corpus, plan, shard, total) for shard in range(len(plan)))
        return
    places = min(len(plan), max(_LEAST_PLACES, characters * len(plan) // total))
    for i in range(places):
        yield _beginning(corpus, plan, (2 * i + 1) * len(plan) // (2 * places), characters // places)


def _beginning(corpus: Corpus, plan: Plan, shard: int, most: int) -> Plan:
    """The first documents of a shard, up to the one that reaches so many characters."""
    wanted, documents, read = plan.documents_of(shard), 0, 0
    content = hashlib.sha256()
    for part in corpus.parts(plan.start(shard), plan.start(shard + 1)):
        found = corpus.examine(part)
        ends = read + np.cumsum(found.characters)
        taken = min(wanted - documents, len(ends), int(np.searchsorted(ends, most)) + 1)
        content.update(found.sha256[: 32 * taken])
        documents, read = documents + taken, int(ends[taken - 1]) if taken else read
        if read >= most or documents == wanted:
            break
    first = plan.first[shard : shard + 1]
    return dataclasses.replace(
        plan,
        first=first,
        last=first + documents - 1,
        characters=np.array([read], np.int64),
        sha256=np.frombuffer(content.digest(), np.uint8).reshape(1, 32),
        file=plan.file[shard : shard + 1],
        offset=plan.offset[shard : shard + 1],
    )
