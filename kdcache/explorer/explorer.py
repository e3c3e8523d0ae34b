"""Explorer: one cache as the page is told of it: a head for all, and a payload for each row.

Cost of a row: its read, and some 15 ms for 512 positions of 64 entries; with a student to compare, a forward pass.
"""

from __future__ import annotations

import bisect
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import kdcache
from kdcache.cache import open_cache
from kdcache.errors import CacheError, ConfigError
from kdcache.explorer.payload import Arrays, pack, ratio, row_arrays, target_arrays, with_places
from kdcache.explorer.summary import cache_summary
from kdcache.explorer.token_texts import TokenTexts, readable
from kdcache.report.inspect import Progress, teacher_read
from kdcache.rows import IGNORE, spread_rows

TOP = 24
"""Entries of a position that a page shows, unless told otherwise."""

SECONDS, MATCHES = 0.5, 500
"""How long a search goes on, and how much it finds, before it gives what it has."""


@dataclass(frozen=True)
class RowPayload:
    """A row, before it is packed; tokens as ids.

    Attributes:
        about: where it is, its pieces, and what the teacher alone read.
        own: arrays of its tokens and targets.
        other: arrays of the targets that they are compared with, or None.
    """

    about: dict[str, Any]
    own: Arrays
    other: Arrays | None

    def ids(self) -> Counter[int]:
        """How often each token is named."""
        found: Counter[int] = Counter()
        for arrays in (self.own, self.other or {}):
            for name in ("tokens", "ids"):
                found.update(arrays.get(name, ()))
        return Counter({int(token): count for token, count in found.items()})

    def packed(self, places: Mapping[int, int]) -> dict[str, Any]:
        """The payload as the page takes it.

        Args:
            places: of each token in the table of texts.
        """
        other = None if self.other is None else pack(with_places(self.other, places))
        return {**self.about, "own": pack(with_places(self.own, places)), "other": other}


class Explorer:
    """A cache to be looked at; also one that is still being dumped.

    Args:
        path: folder or URL of the cache.
        shard: look at the rows of this shard alone.
        compare: a student, or another teacher's cache, to lay beside it.
        top: entries of a position to show, at most.
        device: where a student runs.

    Attributes:
        rows: the cache-wide numbers of the rows that can be looked at.

    Raises:
        ConfigError: `top` below 1, or a cache of other rows to compare.
        KdcacheError: what cannot be opened; see the exception tree.
    """

    def __init__(
        self, path: str, *, shard: int | None = None, compare: str | None = None, top: int = TOP, device: str = "auto"
    ) -> None:
        if top < 1:
            raise ConfigError(f"entries is {top}, but must be at least 1")
        self.path, self.shard, self.top = path, shard, top
        self.cache = open_cache(path, partial=True)
        if shard is None:
            self.rows: Sequence[int] = range(len(self.cache))
        else:
            first = self.cache.index(shard, 0)
            self.rows = range(first, first + self.cache.commits[shard].rows)
        self._tokenizer = self.cache.load_tokenizer() if self.cache.manifest.tokenizer_files else None
        self._texts = TokenTexts(self._tokenizer)
        self._compared = None
        if compare is not None:
            from kdcache.explorer.compared import open_compared  # it loads what runs a student

            self._compared = open_compared(compare, self.cache, top, device)

    def spread(self, count: int) -> list[int]:
        """At most so many of the rows, evenly spread.

        Raises:
            ConfigError: below 1.
            CacheError: there is no row.
        """
        if count < 1:
            raise ConfigError(f"rows is {count}, but must be at least 1")
        if not self.rows:
            raise CacheError(f"{self.path} has no rows to show")
        return spread_rows(self.rows, count)

    def head(self, rows: Sequence[int]) -> dict[str, Any]:
        """What the page is told before any row.

        Args:
            rows: some rows, to measure the bytes of streams on.
        """
        manifest, rule = self.cache.manifest, self.cache.manifest.rule
        compared = self._compared
        return {
            "version": kdcache.__version__,
            "summary": _readable(cache_summary(self.path, self.cache, rows, self.shard)),
            "sampled": rule.sampled,
            "temperatures": [rule.target_temperature] if rule.sampled else list(manifest.temperatures),
            "everything": manifest.width == manifest.vocab_size,
            "width": manifest.width,
            "top": min(self.top, manifest.width),
            "range": [self.rows[0], self.rows[-1]] if self.rows else [],
            "compare": None
            if compared is None
            else {
                "name": readable(compared.name),
                "what": compared.what,
                "kl_kind": compared.kl_kind,
                "sampled": compared.sampled,
                "temperatures": list(compared.temperatures),
            },
        }

    def row(self, index: int) -> RowPayload:
        """One row.

        Raises:
            CacheError: it cannot be read, or what is compared has no such row.
        """
        row, targets = self.cache.read_packed(index)
        labels = row.labels(len(row.tokens))
        labels = labels[labels != IGNORE]
        own = {**row_arrays(row, targets), **target_arrays(targets, labels, self.top)}
        other = None
        if self._compared is not None:
            found, kl = self._compared.read(index, row, targets)
            other = {
                "slots": row_arrays(row, found)["slots"],
                **target_arrays(found, labels, self.top),
                "kl": ratio(kl[found.count > 0]),
            }
        shard, number = self.cache.locate(index)
        told = [(piece, teacher_read(self._tokenizer, row, piece)) for piece in range(len(row.piece_lengths))]
        about = {
            "index": index,
            "shard": shard,
            "row": number,
            "pieces": row.piece_lengths.tolist(),
            "documents": row.piece_documents.tolist(),
            "told": [{"piece": piece, **_readable(read)} for piece, read in told if read is not None],
        }
        return RowPayload(about, own, other)

    def packed_row(self, index: int) -> dict[str, Any]:
        """One row with a table of texts of its own.

        Raises:
            CacheError: see `row`.
        """
        payload = self.row(index)
        ids = [token for token, _ in payload.ids().most_common()]
        places = {token: place for place, token in enumerate(ids)}
        return {**payload.packed(places), "texts": self._table(ids)}

    def find(self, text: str, start: int, seconds: float = SECONDS, most: int = MATCHES) -> dict[str, Any]:
        """Where a text occurs, in any case, from a row on; for so long, or until so many are found.

        The text of a row is that of its tokens one after the other, as the page shows them. Only tokens are read.

        Args:
            text: not empty.
            start: the row to begin with.
            seconds: to go on for, about.
            most: matches to give, about.

        Returns:
            `matches`: `[row, first token]` of each; `rows`: how many rows were looked through; `next`: the row to go on
            with, None after the last.

        Raises:
            CacheError: a row cannot be read.
        """
        needle, until = text.lower(), time.monotonic() + seconds
        matches: list[tuple[int, int]] = []
        rows = range(max(start, self.rows[0]), self.rows[-1] + 1) if self.rows else range(0)
        for looked, (index, tokens) in enumerate(zip(rows, self.cache.storage.map(self._tokens, rows), strict=True), 1):
            matches += ((index, token) for token in _occurrences([self._texts[token] for token in tokens], needle))
            if index != rows[-1] and (len(matches) >= most or time.monotonic() >= until):
                return {"matches": matches, "rows": looked, "next": index + 1}
        return {"matches": matches, "rows": len(rows), "next": None}

    def _tokens(self, index: int) -> list[int]:
        shard, row = self.cache.locate(index)
        found: list[int] = self.cache.shard(shard).read_tokens(row).tokens.tolist()
        return found

    def packed_rows(self, rows: Sequence[int], on_progress: Progress | None = None) -> dict[str, Any]:
        """Several rows as `rows`, and their common table of texts as `texts`.

        Raises:
            CacheError: see `row`.
        """
        payloads = list(self._payloads(rows, on_progress))
        counted: Counter[int] = Counter()
        for payload in payloads:
            counted += payload.ids()
        ids = [token for token, _ in counted.most_common()]
        places = {token: place for place, token in enumerate(ids)}
        return {"texts": self._table(ids), "rows": [payload.packed(places) for payload in payloads]}

    def _payloads(self, rows: Sequence[int], on_progress: Progress | None) -> Iterator[RowPayload]:
        for done, index in enumerate(rows, 1):
            yield self.row(index)
            if on_progress is not None:
                on_progress(done, len(rows))

    def _table(self, ids: Sequence[int]) -> dict[str, Any]:
        return {"ids": ids, "texts": [self._texts[token] for token in ids]}


def _occurrences(texts: Sequence[str], needle: str) -> Iterator[int]:
    """The first token of each place where a text in small letters occurs, as `search` of page/find.js counts them."""
    text = "".join(texts)
    small = text.lower()
    if len(small) != len(text):  # some letters are longer in lower case
        small = text
    starts = list(itertools.accumulate((len(each) for each in texts), initial=0))
    at = small.find(needle)
    while at >= 0:
        yield bisect.bisect_right(starts, at, hi=len(texts)) - 1
        at = small.find(needle, at + len(needle))


def _readable(value: Any) -> Any:
    """A plain value whose texts are readable; other objects become texts."""
    if isinstance(value, dict):
        return {readable(str(key)): _readable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_readable(one) for one in value]
    return value if value is None or isinstance(value, bool | int | float) else readable(str(value))
