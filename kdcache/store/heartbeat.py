"""Heartbeat: the small record that says who makes a shard just now, how far that is, or why it failed.

`running/00007.json` is written when shard 7 is begun, again every few seconds while it is made (see `pulse`), and
deleted when it is committed. It is for `status` alone: nothing depends on it, and whoever makes a shard writes over
what an earlier writer has left. A writer that is killed leaves one that is not written any more.

A heartbeat holds durations by its writer's monotonic clock, never a time of day: when it was written is what the
storage says, so the clocks of workers need not agree. Like any record it may be a lie: what it says is bounded, and
plain text.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Self

from kdcache.store.bad_records import require_reason
from kdcache.store.manifest import FORMAT
from kdcache.store.sealed_json import seal
from kdcache.store.shard_record import read_shard_record
from kdcache.store.shards import record_name
from kdcache.store.storage import Storage

FOLDER = "running"
MOST_BYTES = 1 << 14
"""Bytes of a heartbeat."""
_MOST_SECONDS = 1e9
"""Thirty years: a date computed from it exists."""
_MOST_EVERY = 3600.0
"""Seconds: who writes more rarely could not be told from who has died."""
_TEXTS = ("failure", "host", "worker", "job")


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """Contents of `running/00007.json`.

    Attributes:
        shard: the shard's number.
        manifest_sha256: the cache that it belongs to.
        failure: why it was not made, in one line; empty while it is being made.
        host, pid: the machine, and the process on it.
        worker: `I/N` of a worker that is one of several; empty otherwise.
        job: what the scheduler calls it, like `slurm 4711_3`; empty without one.
        every: seconds between two of its writings.
        seconds: since the shard was begun.
        rows, planned_rows: rows that are written, and that there will be; None where that is not known.
        labels: labelled slots that are written.
        made, made_labels: shards that this process has made before this one, and their labelled slots.
        busy_seconds: since it began the first of them.
    """

    shard: int
    manifest_sha256: str
    failure: str
    host: str
    pid: int
    worker: str
    job: str
    every: float
    seconds: float
    rows: int
    planned_rows: int | None
    labels: int
    made: int
    made_labels: int
    busy_seconds: float

    @property
    def share(self) -> float | None:
        """How much of the shard is done, 0 to 1; None where that is not known."""
        return None if not self.planned_rows else min(1.0, self.rows / self.planned_rows)

    def write(self, storage: Storage) -> None:
        """Write it, over an earlier one of the shard."""
        storage.replace(heartbeat_name(self.shard), seal({"format": FORMAT, **dataclasses.asdict(self)}))

    @classmethod
    def read(cls, storage: Storage, shard: int, manifest_sha256: str) -> Self | None:
        """The heartbeat of a shard; None if nobody makes it.

        Raises:
            CorruptCacheError: damaged, or of another shard or cache.
        """
        return read_shard_record(cls, storage, heartbeat_name(shard), MOST_BYTES, shard, manifest_sha256)

    def require_sound(self) -> None:
        """Check what the types of its fields do not say.

        Raises:
            ValueError: text that does more than stand there, or durations that cannot be.
        """
        for name in _TEXTS:
            if getattr(self, name):
                require_reason(getattr(self, name))
        for name, most in (("every", _MOST_EVERY), ("seconds", _MOST_SECONDS), ("busy_seconds", _MOST_SECONDS)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise ValueError(f"{name} is {value:g}, but must be 0 to {most:g}")
        if self.seconds > self.busy_seconds:
            raise ValueError(f"seconds is {self.seconds:g}, above busy_seconds, which is {self.busy_seconds:g}")


def heartbeat_name(shard: int) -> str:
    """The object that holds the heartbeat of a shard."""
    return record_name(FOLDER, shard)
