"""Summary: what the page says of a cache as a whole, as plain values.

Counts, means and the histogram of entropies come from the commits, so they are of the whole cache and cost nothing.
The bytes of each stream are counted on some rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from kdcache.cache import Cache
from kdcache.codec.streams import deflate
from kdcache.report.inspect import inspect_summary

_MOST_ROWS = 16
"""Rows that streams are counted on."""
_MOST_BAD = 5
"""Bad records that are named."""


def cache_summary(path: str, cache: Cache, rows: Sequence[int], shard: int | None = None) -> dict[str, Any]:
    """The values of `inspect_summary`, with fewer bad records, and two more.

    `entropy_histogram`: labelled positions by entropy H, the i-th bin from (i / 32)^2 nats, None if unknown; and
    `streams`: bytes a position of each stream, compressed by itself as the arrow store does, over some of the rows.
    """
    found = inspect_summary(path, shard)
    found["bad_records"] = found["bad_records"][:_MOST_BAD]
    chosen = cache if shard is None else cache.only([shard])
    return {**found, "entropy_histogram": chosen.commits.histogram(), "streams": _streams(cache, rows)}


def _streams(cache: Cache, rows: Sequence[int]) -> dict[str, float]:
    sizes: Counter[str] = Counter()
    positions = 0
    step = max(1, len(rows) // _MOST_ROWS)
    for index in rows[::step][:_MOST_ROWS]:
        shard, row = cache.locate(index)
        _, _, record = cache.shard(shard).read_with_record(row)
        positions += record.positions
        for name, stream in record.streams.items():
            sizes[name] += len(deflate(stream))
    return {name: size / max(1, positions) for name, size in sizes.most_common()}
