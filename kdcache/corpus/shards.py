"""Shards: the plan, and the rows of one shard from its own documents alone.

No tokenise pass over the whole corpus, no shared counter, no order between shards: any worker
can make any shard, and makes the same one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kdcache.corpus.packing import Tokens, pack
from kdcache.corpus.sources import Corpus
from kdcache.corpus.tokenise import take_tokenised, tokenise_chat, tokenise_texts
from kdcache.rows import PackedRow

_SHARDS_WANTED = 64
_LEAST_CHARS, _MOST_CHARS = 1 << 18, 1 << 24


@dataclass(frozen=True, kw_only=True)
class ShardRows:
    """What a range of documents became.

    Attributes:
        rows: packed rows, in the order of the shard.
        documents: documents in the range.
        dropped: how many of them the filters dropped.
    """

    rows: list[PackedRow]
    documents: int
    dropped: int


def docs_per_shard(documents: int, size: int) -> int:
    """Documents a shard, when nobody asks for a number: a pure function of the corpus.

    About 64 shards, none below 256 thousand or above 16 million characters (or tokens): small
    enough to lose little when one is interrupted, large enough to be worth a file.
    """
    wanted = min(max(size / _SHARDS_WANTED, _LEAST_CHARS), _MOST_CHARS)
    return max(1, math.ceil(documents * wanted / max(size, 1)) if size > wanted else documents)


def shard_rows(corpus: Corpus, start: int, stop: int, tokenizer: Any, vocab_size: int, seq_len: int) -> ShardRows:
    """Tokenise and pack documents `start` to `stop`."""
    stop = min(stop, len(corpus))
    kept = [(n, d) for n, d in enumerate(corpus.read(start, stop), start) if corpus.keeps(n, d)]
    tokens: list[Tokens]
    if corpus.form == "text":
        tokens = tokenise_texts(tokenizer, [n for n, _ in kept], [d for _, d in kept])
    elif corpus.form == "chat":
        tokens = [tokenise_chat(tokenizer, n, d) for n, d in kept]
    else:
        tokens = [take_tokenised(n, ids, labels, vocab_size) for n, (ids, labels) in kept]
    return ShardRows(rows=pack(tokens, seq_len), documents=stop - start, dropped=stop - start - len(kept))
