"""Shards: the rows of one shard from its own documents alone.

No tokenise pass over the whole corpus, no shared counter, no order between shards: any worker can make any shard, and
makes the same one. A document that cannot be used is left out, with a reason; which ones are depends on them and on the
manifest alone, so it is the same for every worker and every retry.
Cost: memory for the tokens of one shard (4 bytes each) and the documents of a megabyte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kdcache.corpus.documents import BadDocument, Completion, Conversation, Document, PromptedText, TokenIds
from kdcache.corpus.packing import Packed, PackedRows, Tokens, pack
from kdcache.corpus.plan import Plan
from kdcache.corpus.records import Record, Unreadable
from kdcache.corpus.sources import Corpus, Part
from kdcache.rows import IGNORE

_MOST_REASON = 200
"""Characters of a reason."""

_BATCH = 256
"""Documents tokenised at once: what a tokenizer returns for a text takes many times the memory of its ids."""


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that was left out because it cannot be used.

    Attributes:
        document: its index in the corpus.
        reason: a short one, then ": ", what is wrong with this one, and where it stands.
    """

    document: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardRows:
    """What a range of documents became.

    Attributes:
        rows: packed rows, in the order of the shard.
        documents: documents in the range.
        dropped: how many of them were left out, by reason: those of the filters, `null`, `overlong`, `too-short`, and
            those of bad records.
        bad_records: each document that cannot be used, in order.
        cut, truncated: documents that were too long for a row, and lie in pieces or lost their end.
    """

    rows: PackedRows
    documents: int
    dropped: dict[str, int]
    bad_records: tuple[BadRecord, ...]
    cut: int
    truncated: int


class DocumentTokeniser(Protocol):
    """Makes tokens of documents, as `Tokeniser` does."""

    def tokenise(self, documents: Sequence[tuple[int, Document]]) -> list[list[Tokens] | BadDocument]:
        """For each document, given with its index in the corpus, its sequences, or why it cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Shaping:
    """What makes rows of documents, beside the corpus.

    Attributes:
        tokeniser: documents to tokens.
        seq_len: tokens a row.
        pack, overlong: see `kdcache.corpus.rules`.
        teacher_seq_len: tokens that the teacher reads of a piece at most, with what it alone is told; 0 where it reads
            what its student does.
    """

    tokeniser: DocumentTokeniser
    seq_len: int
    pack: str = "best-fit"
    overlong: str = "auto"
    teacher_seq_len: int = 0

    def packed(self, tokens: Iterator[Tokens] | list[Tokens]) -> Packed:
        """Rows of tokenised documents."""
        return pack(
            tokens, self.seq_len, pack=self.pack, overlong=self.overlong, teacher_seq_len=self.teacher_seq_len
        )  # fmt: skip


def shard_rows(corpus: Corpus, plan: Plan, shard: int, shaping: Shaping) -> ShardRows:
    """Tokenise and pack the documents of a shard.

    Raises:
        CorpusError: they are not those that were planned.
    """
    reading = ShardReading(corpus, shaping.tokeniser)
    packed = shaping.packed(tokens for batch in reading.shard(plan, shard) for tokens in batch)
    return ShardRows(
        rows=packed.rows,
        documents=plan.documents_of(shard),
        dropped=dict(sorted((reading.dropped + Counter(packed.dropped)).items())),
        bad_records=tuple(reading.bad_records),
        cut=packed.cut,
        truncated=packed.truncated,
    )


def has_label(corpus: Corpus, plan: Plan, shaping: Shaping) -> tuple[bool, ShardReading]:
    """Whether any document has a token that carries a target. Documents are read until one has.

    Returns:
        That, and what was read on the way.
    """
    reading = ShardReading(corpus, shaping.tokeniser)
    for shard in range(len(plan)):
        for batch in reading.shard(plan, shard):
            packed = shaping.packed(batch)
            if any((row.labels(shaping.seq_len) != IGNORE).any() for row in packed.rows):
                return True, reading
            reading.dropped.update(packed.dropped)
    return False, reading


_NAMES: dict[type, str] = {
    str: "text",
    PromptedText: "text",
    Conversation: "chat",
    Completion: "completion",
    TokenIds: "tokenised",
}


@dataclass
class ShardReading:
    """Reads the documents of shards, and keeps account of those that are left out.

    Attributes:
        dropped: documents that were left out so far, by reason.
        bad_records: those of them that cannot be used.
        forms: documents that were tokenised, by what they are.
    """

    corpus: Corpus
    tokeniser: DocumentTokeniser
    dropped: Counter[str] = field(default_factory=Counter, init=False)
    bad_records: list[BadRecord] = field(default_factory=list, init=False)
    forms: Counter[str] = field(default_factory=Counter, init=False)

    def shard(self, plan: Plan, shard: int) -> Iterator[list[Tokens]]:
        """The tokens of the documents of a shard, some at a time, in order.

        Raises:
            CorpusError: they are not those that were planned.
        """
        for first, part, records, addresses in self.corpus.read_shard(plan, shard):
            for start in range(0, len(records), _BATCH):
                documents: list[tuple[int, Document]] = []
                stop = min(start + _BATCH, len(records))
                bad: dict[int, BadDocument] = {}
                for i in range(start, stop):
                    try:
                        document = self.corpus.document(records[i])
                    except BadDocument as error:
                        bad[first + i] = error
                        continue
                    if self._keeps(document):
                        assert document is not None
                        documents.append((first + i, document))
                kept = []
                for (number, document), found in zip(documents, self.tokeniser.tokenise(documents), strict=True):
                    if isinstance(found, BadDocument):
                        bad[number] = found
                    else:
                        self.forms[_NAMES[type(document)]] += 1
                        kept += found
                for number in sorted(bad):
                    self._leave_out(number, str(bad[number]), records[number - first], part, addresses[number - first])
                yield kept

    def left_out(self) -> str:
        """What was left out, in words that end a sentence; empty where nothing was."""
        if not self.dropped:
            return ""
        counts = ", ".join(f"{count} {reason}" for reason, count in self.dropped.most_common())
        more = "".join(f"; document {first.document}: {first.reason}" for first in self.bad_records[:1])
        if "overlong" in self.dropped:
            more += "; of what is overlong, no answer begins in the first seq_len tokens"
        return f" (left out: {counts}{more})"

    def _keeps(self, document: Document | None) -> bool:
        """Whether a document says something and passes the filters."""
        reason = "null" if document is None else None
        if document is not None and not isinstance(document, TokenIds):
            reason = self.corpus.filters.reason(document if isinstance(document, str) else document.text)
        if reason:
            self.dropped[reason] += 1
        return reason is None

    def _leave_out(self, number: int, reason: str, record: Record, part: Part, address: int) -> None:
        place = (
            "" if isinstance(record, Unreadable) else f" ({self.corpus.place(part, address)})"
        )  # which says it itself
        reason, most = "".join(c if c.isprintable() else " " for c in reason), _MOST_REASON - len(place)
        reason = (reason if len(reason) <= most else reason[: max(0, most - 3)] + "...") + place
        self.dropped[reason.partition(": ")[0]] += 1
        self.bad_records.append(BadRecord(document=number, reason=reason))
