"""Split: which rows of each cache a run trains on, and which it measures on.

Held out are the rows that `split_heldout` names in the whole cache, so a row that one run holds out is never trained on
by another with the same `heldout`, whatever else their options say. `rows` then narrows both sides: what lies
outside is never read. `where` narrows the training side only, so runs that differ in it are measured on equal rows.

`where` reads every training row once, to know its entropy. The ranks share that work, each with its readers; the
result is kept in the run's folder, so that a resumed run does not repeat it. Sets of rows are bits (see `row_set`), so
a cache of 10^9 rows takes 141 MB on each side.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from kdcache.cache import Cache
from kdcache.errors import ConfigError
from kdcache.student import data_workers, distributed
from kdcache.student.caches import CacheSource
from kdcache.student.config import TrainConfig
from kdcache.student.data import Item, RowDataset, Rows, split_heldout
from kdcache.student.row_filter import Bound, parse_rows, parse_where
from kdcache.student.row_set import RowSet, set_bits

ROWS = "rows.npz"
_AT_ONCE = 64
_EXCHANGED = 1 << 24  # bytes


@dataclass(frozen=True)
class Split:
    """Rows of each cache, ascending; one set a cache on either side."""

    train: tuple[RowSet, ...]
    heldout: tuple[RowSet, ...]

    def record(self) -> dict[str, Any]:
        """How many rows there are to train on, and a sha256 that says which: over `RowSet.digest` of each cache."""
        digest = hashlib.sha256(b"".join(rows.digest() for rows in self.train))
        return {"count": sum(map(len, self.train)), "sha256": digest.hexdigest()}


def split(
    sources: Sequence[CacheSource], config: TrainConfig, on_progress: Callable[[int, int], None] | None = None
) -> Split:
    """The rows of a run. With `where` every training row is read, unless the run's folder holds the result.

    Args:
        sources: the caches.
        config: heldout, rows, where; out, and readers for the reading.
        on_progress: called with (rows read, rows to read), by this process.

    Raises:
        ConfigError: a side of a cache that is empty.
        KdcacheError: rows that cannot be read.
    """
    ranges, bounds = parse_rows(config.rows), parse_where(config.where)
    halves = [_within(source, config, ranges) for source in sources]
    train, heldout = tuple(half[0] for half in halves), tuple(half[1] for half in halves)
    if bounds:
        kept = _kept(Path(config.out) / ROWS, [rows.total for rows in train]) if distributed.rank() == 0 else None
        kept = distributed.agree(kept)
        train = _where(sources, train, bounds, config, on_progress) if kept is None else kept
    for source, rows in zip(sources, train, strict=True):
        if not len(rows):
            raise ConfigError(f"where {config.where} leaves no row of {source.name} to train on")
    return Split(train, heldout)


def keep(split: Split, out: Path) -> None:
    """Write the training rows into a run's folder: the bits of each cache, by its number."""
    temporary = out / f".{ROWS}"
    with temporary.open("wb") as file:
        bits: dict[str, Any] = {str(cache): rows.bits for cache, rows in enumerate(split.train)}
        np.savez_compressed(file, **bits)
    temporary.replace(out / ROWS)


def _kept(path: Path, totals: Sequence[int]) -> tuple[RowSet, ...] | None:
    """What `keep` wrote, if it is there whole; train-student.json says whether it is right."""
    try:
        with np.load(path, allow_pickle=False) as found:
            each = [found[str(cache)] for cache in range(len(totals))]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if any(bits.dtype != np.uint8 or bits.shape != (-(-n // 8),) for bits, n in zip(each, totals, strict=True)):
        return None
    return tuple(RowSet(total, bits) for total, bits in zip(totals, each, strict=True))


def _within(source: CacheSource, config: TrainConfig, ranges: tuple[slice, ...]) -> tuple[RowSet, RowSet]:
    """The two sides of a cache, both inside `rows`."""
    train, heldout = sides = split_heldout(len(source.cache), config.heldout)
    if config.rows is not None:
        inside = RowSet.of_ranges(len(source.cache), ranges)
        sides = train & inside, heldout & inside
    if not all(map(len, sides)):
        raise ConfigError(
            f"rows {config.rows} leaves {len(sides[0])} of {len(train)} rows to train on and {len(sides[1])} of "
            f"{len(heldout)} held-out rows of {source.name}, but each side needs one; widen it, or hold out more"
        )
    return sides


def _where(
    sources: Sequence[CacheSource],
    train: Sequence[RowSet],
    bounds: Sequence[Bound],
    config: TrainConfig,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[RowSet, ...]:
    for source in sources:
        source.cache.known.require("entropy", f"the row filter {config.where}", source.name)
    first, step = distributed.rank(), distributed.world()
    mine = [range(first, len(rows), step) for rows in train]
    done, total = 0, sum(map(len, mine))
    found = []
    with data_workers.translate_worker_errors():
        for source, rows, places in zip(sources, train, mine, strict=True):
            bits, at = np.zeros_like(rows.bits), 0
            count = data_workers.how_many(config.readers, source.cache.storage.remote)
            for entropies in mean_entropies(source.cache, rows, count, places):
                good = [all(bound.holds(entropy) for bound in bounds) for entropy in entropies]
                set_bits(bits, rows[np.array(places[at : at + len(good)], np.int64)[good]])
                at, done = at + len(good), done + len(good)
                if on_progress:
                    on_progress(done, total)
            found.append(bits)
    return tuple(RowSet(rows.total, _united(bits)) for rows, bits in zip(train, found, strict=True))


def _united(bits: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The bits that any rank has set."""
    if distributed.world() == 1:
        return bits
    for start in range(0, len(bits), _EXCHANGED):  # so that the ranks' copies are small, however many there are
        part = bits[start : start + _EXCHANGED]
        np.bitwise_or.reduce(distributed.gather(part), out=part)
    return bits


def mean_entropies(cache: Cache, rows: Rows, count: int, places: Sequence[int] | None = None) -> Iterator[list[float]]:
    """The mean entropy of the teacher over the positions of each row that carry a target, nats, as lists; NaN for none.

    Args:
        cache: where the rows are.
        rows: which rows are meant.
        count: processes that read; 0 for this one.
        places: which of `rows` to read, in this order; None for all.
    """
    loader = DataLoader(
        RowDataset([cache], [rows]),
        batch_size=_AT_ONCE,
        sampler=range(len(rows)) if places is None else places,
        collate_fn=_means,
        num_workers=count,
        multiprocessing_context=data_workers.START if count else None,
    )
    yield from loader


def _means(items: list[Item]) -> list[float]:
    means = []
    for item in items:
        entropy = item.targets.require("entropy", "the row filter")
        means.append(float(entropy[item.targets.count > 0].double().mean()))
    return means
