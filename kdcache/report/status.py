"""Status: how far a dump is, who works on it, how fast, and what failed; from the cache alone.

What is committed is a listing of `commits/`; who makes what, the heartbeats in `running/`. No commit is read. Ages are
differences of times of one storage: when an object was written, and what the storage's clock shows now. So the clocks
of the workers and of this machine may be wrong. A worker of which there is no sign for three of its intervals is
`silent`: it was killed, or is cut off.

A worker's speed is what it has done since it began its first shard, in characters of the plan (in shards where there is
no plan), so waiting and writing count; the rate is the sum over those that run now.
Cost of a look: in an object store 4 requests (6 while nobody runs), one more for each thousand commits and one for each
shard that is being made; the first look reads the manifest and the plan, too. A complete cache takes one a look.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from kdcache.errors import ConfigError, CorruptCacheError
from kdcache.store.commit import FOLDER as COMMITS
from kdcache.store.heartbeat import FOLDER, Heartbeat, heartbeat_name
from kdcache.store.manifest import Manifest
from kdcache.store.open_storage import open_storage
from kdcache.store.plan import read_plan
from kdcache.store.seal import SEAL
from kdcache.store.shards import recorded_shards

_SILENT = 3
"""Intervals without a heartbeat after which a worker is silent."""
_RESOLUTION = 2.0
"""Seconds by which an age may be wrong: times of object stores are whole seconds."""
_STRAGGLER = 3
"""A straggler has taken this many times as long as a shard of its size takes."""
_MOST_AGE = 1e9
_LEAST_SECONDS = 1e-3
"""Seconds after which a speed means something."""


def watch(path: str, every: float) -> Iterator[dict[str, Any]]:
    """One look after another, until the cache is complete.

    Args:
        path: folder or URL of the cache.
        every: seconds between two looks; a look that takes longer is followed by a pause as long as itself.

    Raises:
        ConfigError: `every` is no duration.
        CacheError: there is no cache, or it cannot be reached.
    """
    if not 0 < every <= 86_400:
        raise ConfigError(f"every is {every:g}, but must be above 0 and at most 86400 seconds")
    reader = StatusReader(path)
    while True:
        started = time.monotonic()
        found = reader.look()
        took = time.monotonic() - started
        yield found
        if found["complete"]:
            return
        time.sleep(max(every, took))


class StatusReader:
    """Looks at one cache, as often as wished.

    Args:
        path: folder or URL of the cache.

    Raises:
        CacheError: there is no cache, or it cannot be reached.
    """

    def __init__(self, path: str) -> None:
        self._storage = open_storage(path)
        self._manifest = Manifest.read(self._storage)
        plan = read_plan(self._storage, self._manifest)
        self._has_plan = plan is not None
        shards = self._manifest.shards
        self._sizes = np.ones(shards) if plan is None else np.maximum(plan.characters, 1).astype(np.float64)

    def look(self) -> dict[str, Any]:
        """What `kdcache status --json` prints.

        Raises:
            CacheError: the cache cannot be reached.
        """
        planned = self._manifest.shards
        if self._storage.size(SEAL) is not None:
            return self._report(range(planned), [], [], None)
        written = self._storage.modified(FOLDER)  # before the commits: what is committed meanwhile runs no longer
        found, unreadable = self._read(recorded_shards(written, FOLDER, planned))
        commits = self._storage.modified(COMMITS)
        done = recorded_shards(commits, COMMITS, planned)
        now = self._storage.clock()
        left = set(found).difference(done)
        makers = [
            _Maker(beat=beat, age=_age(now, written[heartbeat_name(shard)]), now=now, size=float(self._sizes[shard]))
            for shard, beat in found.items()
            if shard in left
        ]
        last = max((commits[name] for name in commits), default=None)
        return self._report(done, makers, unreadable, None if last is None else _age(now, last))

    def _read(self, shards: Sequence[int]) -> tuple[dict[int, Heartbeat], list[dict[str, str]]]:
        """Heartbeats by shard, and what is in their folder but is none."""

        def read(shard: int) -> Heartbeat | CorruptCacheError | None:
            try:
                return Heartbeat.read(self._storage, shard, self._manifest.sha256)
            except CorruptCacheError as error:
                return error

        found, unreadable = {}, []
        for shard, beat in zip(shards, self._storage.map(read, shards), strict=True):
            if isinstance(beat, Heartbeat):
                found[shard] = beat
            elif beat is not None:
                unreadable.append({"object": heartbeat_name(shard), "what": str(beat)})
        return found, unreadable

    def _report(
        self,
        done: Sequence[int],
        makers: Sequence[_Maker],
        unreadable: list[dict[str, str]],
        last_commit: float | None,
    ) -> dict[str, Any]:
        planned = self._manifest.shards
        failed = [maker for maker in makers if maker.beat.failure]
        silent = [maker for maker in makers if not maker.beat.failure and maker.silent]
        running = [maker for maker in makers if not maker.beat.failure and not maker.silent]
        mean, total = float(self._sizes.mean()), float(self._sizes.sum())
        left = total - float(self._sizes[list(done)].sum()) - sum(maker.done for maker in running)
        speeds = _speeds(running, mean)
        rate = sum(speeds) if speeds else None
        slowest = max(
            ((maker.size - maker.done) / speed for maker, speed in zip(running, speeds, strict=False)), default=0.0
        )
        return {
            "cache": str(self._storage),
            "complete": len(done) == planned,
            "shards": {
                "planned": planned,
                "committed": len(done),
                "running": len(running),
                "silent": len(silent),
                "failed": len(failed),
                "waiting": planned - len(done) - len(makers),
            },
            "share": 1.0 if len(done) == planned else max(0.0, 1 - left / total),
            "rate": {
                "shards_per_hour": None if rate is None else 3600 * rate / mean,
                "characters_per_second": rate if self._has_plan else None,
                "positions_per_second": sum(m.positions_per_second for m in running) if running else None,
            },
            "seconds_left": 0.0 if len(done) == planned else None if rate is None else max(left / rate, slowest),
            "last_commit_seconds": last_commit,
            "running": [maker.fields() for maker in running],
            "silent": [maker.fields() for maker in silent],
            "failed": [maker.failure_fields() for maker in failed],
            "stragglers": _stragglers(running, makers, mean),
            "unreadable": unreadable,
        }


@dataclass(frozen=True, kw_only=True)
class _Maker:
    """Who makes a shard, or has tried to.

    Attributes:
        beat: its heartbeat.
        age: seconds since that was written.
        now: what the storage's clock shows.
        size: of the shard, in characters, or 1.
    """

    beat: Heartbeat
    age: float
    now: float
    size: float

    @property
    def silent(self) -> bool:
        """Whether there should have been a sign of it by now."""
        return self.age > _SILENT * self.beat.every + _RESOLUTION

    @property
    def seconds(self) -> float:
        """Since it began the shard."""
        return self.beat.seconds + self.age

    @property
    def done(self) -> float:
        """How much of the shard is done."""
        return self.size * (self.beat.share or 0.0)

    @property
    def positions_per_second(self) -> float:
        """Labelled slots that it has written a second, with those of the shards before this one."""
        beat = self.beat
        busy = beat.busy_seconds
        return (beat.made_labels + beat.labels) / busy if busy > _LEAST_SECONDS else 0.0

    def speed(self, mean: float) -> float | None:
        """What it does a second, with shards of a mean size before this one; None while that is not known."""
        done = self.beat.made * mean + self.done
        return done / self.beat.busy_seconds if done and self.beat.busy_seconds > _LEAST_SECONDS else None

    def fields(self) -> dict[str, Any]:
        """As in the report."""
        return {
            **self._who(),
            "since": _date(self.now - self.seconds),
            "seconds": self.seconds,
            "share": self.beat.share,
            "positions_per_second": self.positions_per_second,
            "last_sign_seconds": self.age,
        }

    def failure_fields(self) -> dict[str, Any]:
        """As in the report, of one that failed."""
        at = _date(self.now - self.age)
        return {**self._who(), "reason": self.beat.failure, "at": at, "seconds": self.beat.seconds}

    def _who(self) -> dict[str, Any]:
        beat = self.beat
        return {"shard": beat.shard, "worker": beat.worker, "host": beat.host, "pid": beat.pid, "job": beat.job}


def _speeds(running: Sequence[_Maker], mean: float) -> list[float]:
    """The speed of each worker that runs; who has not done anything yet is taken for the median of the others."""
    known = [speed for maker in running if (speed := maker.speed(mean)) is not None]
    if not known:
        return []
    return [maker.speed(mean) or statistics.median(known) for maker in running]


def _stragglers(running: Sequence[_Maker], all_makers: Sequence[_Maker], mean: float) -> list[int]:
    """Shards that take far longer than others of their size took these workers before, or do beside them."""
    made = sum(maker.beat.made for maker in all_makers)
    before = sum(maker.beat.busy_seconds - maker.beat.seconds for maker in all_makers)
    found = []
    for maker in running:
        beside = [other.beat.seconds / other.done for other in running if other is not maker and other.done]
        if made:
            usual = before / made / mean * maker.size
        elif beside:
            usual = statistics.median(beside) * maker.size
        else:
            continue
        if maker.seconds > _STRAGGLER * usual + maker.beat.every:
            found.append(maker.beat.shard)
    return found


def _age(now: float, written: float) -> float:
    """Seconds since an object was written."""
    return min(max(0.0, now - written), _MOST_AGE)


def _date(seconds: float) -> str:
    """A time in UTC."""
    return datetime.fromtimestamp(int(seconds), UTC).isoformat().replace("+00:00", "Z")
