"""Split: which rows of each cache a run trains on, and which it measures on.

Held out are the rows that `split_heldout` names in the whole cache, so a row that one run holds out is never trained on
by another with the same `--heldout`, whatever else their options say. `--rows` then narrows both sides: what lies
outside is never read. `--where` narrows the training side only, so runs that differ in it are measured on equal rows.

`--where` reads every training row once, to know its entropy. The ranks share that work, each with its readers; what
came of it is kept in the run's folder, so that going on does not repeat it.
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
from kdcache.student.caches import Source
from kdcache.student.config import TrainConfig
from kdcache.student.data import Item, RowDataset, split_heldout
from kdcache.student.row_filter import Bound, parse_rows, parse_where

Ints = NDArray[np.int64]

ROWS = "rows.npz"
_AT_ONCE = 64


@dataclass(frozen=True)
class Split:
    """Rows of each cache, ascending; one array a cache on either side."""

    train: tuple[Ints, ...]
    heldout: tuple[Ints, ...]

    def record(self) -> dict[str, Any]:
        """How many rows there are to train on, and the sha256 of their list.

        Hashed are, for each cache in turn, the number of its rows and the rows, as little-endian int64.
        """
        digest = hashlib.sha256()
        for rows in self.train:
            digest.update(np.array([len(rows)], "<i8").tobytes())
            digest.update(rows.astype("<i8").tobytes())
        return {"count": sum(map(len, self.train)), "sha256": digest.hexdigest()}


def split(
    sources: Sequence[Source], config: TrainConfig, on_progress: Callable[[int, int], None] | None = None
) -> Split:
    """The rows of a run. With `--where` every training row is read, unless the run's folder says what came of that.

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
        kept = distributed.agree(_kept(Path(config.out) / ROWS, len(sources)))
        train = _where(sources, train, bounds, config, on_progress) if kept is None else kept
    for source, rows in zip(sources, train, strict=True):
        if not len(rows):
            raise ConfigError(f"--where {config.where} leaves no row of {source.name} to train on")
    return Split(train, heldout)


def keep(split: Split, out: Path) -> None:
    """Write the training rows into a run's folder."""
    temporary = out / f".{ROWS}"
    with temporary.open("wb") as file:
        steps: dict[str, Any] = {str(cache): np.diff(rows, prepend=0) for cache, rows in enumerate(split.train)}
        np.savez_compressed(file, **steps)
    temporary.replace(out / ROWS)


def _kept(path: Path, caches: int) -> tuple[Ints, ...] | None:
    """What `keep` wrote, if it is there whole; train-student.json says whether it is right."""
    try:
        with np.load(path, allow_pickle=False) as steps:
            return tuple(np.cumsum(steps[str(cache)]) for cache in range(caches))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _within(source: Source, config: TrainConfig, ranges: tuple[slice, ...]) -> tuple[Ints, Ints]:
    """The two sides of a cache, both inside `--rows`."""
    train, heldout = split_heldout(len(source.cache), config.heldout)
    inside = np.zeros(len(source.cache), bool)
    for part in ranges:
        inside[part] = True
    sides = train[inside[train]], heldout[inside[heldout]]
    if not all(map(len, sides)):
        raise ConfigError(
            f"--rows {config.rows} leaves {len(sides[0])} of {len(train)} rows to train on and {len(sides[1])} of "
            f"{len(heldout)} held-out rows of {source.name}, but each side needs one; widen it, or hold out more"
        )
    return sides


def _where(
    sources: Sequence[Source],
    train: Sequence[Ints],
    bounds: Sequence[Bound],
    config: TrainConfig,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[Ints, ...]:
    for source in sources:
        source.cache.known.require("entropy", "--where", source.name)
    mine = [rows[distributed.rank() :: distributed.world()] for rows in train]
    done, total = 0, sum(map(len, mine))
    kept = []
    with data_workers.translate_worker_errors():
        for source, rows in zip(sources, mine, strict=True):
            good: list[bool] = []
            count = data_workers.how_many(config.readers, source.cache.storage.remote)
            for entropies in mean_entropies(source.cache, rows, count):
                good += [all(bound.holds(entropy) for bound in bounds) for entropy in entropies]
                done += len(entropies)
                if on_progress:
                    on_progress(done, total)
            kept.append(rows[np.array(good, bool)])
    said = distributed.gather(kept)
    return tuple(np.sort(np.concatenate([one[cache] for one in said])) for cache in range(len(train)))


def mean_entropies(cache: Cache, rows: Ints, count: int) -> Iterator[list[float]]:
    """The mean entropy of the teacher over the positions of each row that carry a target, nats, as lists; NaN for none.

    Args:
        cache: where the rows are.
        rows: which to read.
        count: processes that read; 0 for this one.
    """
    loader = DataLoader(
        RowDataset([cache], [rows]),
        batch_size=_AT_ONCE,
        collate_fn=_means,
        num_workers=count,
        multiprocessing_context=data_workers.START if count else None,
    )
    yield from loader


def _means(items: list[Item]) -> list[float]:
    means = []
    for item in items:
        entropy = item.targets.require("entropy", "--where")
        means.append(float(entropy[item.targets.count > 0].double().mean()))
    return means
