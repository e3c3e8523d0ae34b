"""Shards: the rows of one shard from its own documents alone.

No tokenise pass over the whole corpus, no shared counter, no order between shards: any worker can make any shard, and
makes the same one.
Cost: memory for the tokens of one shard (4 bytes each) and the documents of a megabyte.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from kdcache.corpus.packing import PackedRows, Tokens, pack
from kdcache.corpus.plan import Plan
from kdcache.corpus.sources import Corpus
from kdcache.corpus.tokenise import take_tokenised, tokenise_chat, tokenise_texts
from kdcache.rows import IGNORE

_BATCH = 256
"""Documents tokenised at once: what a tokenizer returns for a text takes many times the memory of its ids."""


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A document that cannot be used.

    Attributes:
        document: its number.
        reason: why, in one line.
    """

    document: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class ShardRows:
    """What a range of documents became.

    Attributes:
        rows: packed rows, in the order of the shard.
        documents: documents in the range.
        dropped: how many of them became no rows, by reason.
        bad_records: those among these that could not be used.
        cut, truncated: documents longer than a row that lie in several, and those of which the beginning is there.
    """

    rows: PackedRows
    documents: int
    dropped: dict[str, int]
    bad_records: tuple[BadRecord, ...] = ()
    cut: int = 0
    truncated: int = 0


def shard_rows(corpus: Corpus, plan: Plan, shard: int, tokenizer: Any, vocab_size: int, seq_len: int) -> ShardRows:
    """Tokenise and pack the documents of a shard.

    Raises:
        CorpusError: they are not those that were planned, or one cannot be tokenised.
    """
    tokeniser = _Tokeniser(corpus, tokenizer, vocab_size)
    rows = pack((tokens for batch in tokeniser.shard(plan, shard) for tokens in batch), seq_len)
    dropped = {"filtered": tokeniser.dropped} if tokeniser.dropped else {}
    return ShardRows(rows=rows, documents=plan.documents_of(shard), dropped=dropped)


def has_label(corpus: Corpus, plan: Plan, tokenizer: Any, vocab_size: int, seq_len: int) -> bool:
    """Whether any document has a token that carries a target. Documents are read until one has."""
    tokeniser = _Tokeniser(corpus, tokenizer, vocab_size)
    return any(
        (row.labels(seq_len) != IGNORE).any()
        for shard in range(len(plan))
        for batch in tokeniser.shard(plan, shard)
        for row in pack(batch, seq_len)
    )


@dataclass
class _Tokeniser:
    """Documents of a corpus to tokens, some at a time.

    Attributes:
        dropped: documents that the filters dropped so far.
    """

    corpus: Corpus
    tokenizer: Any
    vocab_size: int
    dropped: int = field(default=0, init=False)

    def shard(self, plan: Plan, shard: int) -> Iterator[list[Tokens]]:
        """The tokens of the documents of a shard that the filters keep, in order."""
        for first, documents in self.corpus.read_shard(plan, shard):
            for start in range(0, len(documents), _BATCH):
                batch = list(enumerate(documents[start : start + _BATCH], first + start))
                kept = [(n, document) for n, document in batch if self.corpus.keeps(n, document)]
                self.dropped += len(batch) - len(kept)
                yield self._tokenise(kept)

    def _tokenise(self, documents: list[tuple[int, Any]]) -> list[Tokens]:
        if self.corpus.form == "text":
            return tokenise_texts(self.tokenizer, [n for n, _ in documents], [text for _, text in documents])
        if self.corpus.form == "chat":
            return [tokenise_chat(self.tokenizer, n, messages) for n, messages in documents]
        return [take_tokenised(n, ids, labels, self.vocab_size) for n, (ids, labels) in documents]
