"""Read rows: the targets of some rows of a cache, evenly spread over it, for what is computed of their positions."""

from __future__ import annotations

from collections.abc import Iterator

from kdcache.cache import Cache
from kdcache.errors import CacheError, ConfigError
from kdcache.plots.plot import Progress
from kdcache.rows import PackedRow, spread_rows
from kdcache.targets import SparseTargets


def read_packed_spread(
    cache: Cache, rows: int, on_progress: Progress | None = None
) -> Iterator[tuple[int, PackedRow, SparseTargets]]:
    """Number, row and targets `[N]` of the labelled slots of at most so many rows.

    Raises:
        ConfigError: rows below 1.
        CacheError: the cache has no rows, or one cannot be read.
    """
    if rows < 1:
        raise ConfigError(f"rows is {rows}, but must be at least 1")
    if not len(cache):
        raise CacheError(f"{cache.storage} has no rows")
    wanted = spread_rows(range(len(cache)), rows)
    for done, (index, (row, targets)) in enumerate(zip(wanted, cache.read_rows(wanted), strict=True), 1):
        yield index, row, targets
        if on_progress is not None:
            on_progress(done, len(wanted))


def read_spread(cache: Cache, rows: int, on_progress: Progress | None = None) -> Iterator[SparseTargets]:
    """Their targets `[n]` alone, of the positions that carry one."""
    for _, _, targets in read_packed_spread(cache, rows, on_progress):
        yield targets[targets.count > 0]
