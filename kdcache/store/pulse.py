"""Pulse: keeps the heartbeat of the shard that this process makes.

A thread writes it when the shard is begun, and then every 5 seconds in a folder, every 15 in an object store, however
long a batch takes; it is deleted at the end, or left with the reason if the shard failed.
Guarantee: nothing of this can fail a shard. A heartbeat that cannot be written is left out until the next one.
Cost: a thread; in an object store 1 put, 4 more a minute, and 1 delete for each shard.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from kdcache.errors import KdcacheError, one_line
from kdcache.store.bad_records import plain_reason
from kdcache.store.heartbeat import Heartbeat, heartbeat_name
from kdcache.store.manifest import Manifest
from kdcache.store.storage import Storage
from kdcache.worker import find_job

Counts = Callable[[], tuple[int, int | None, int]]
"""Rows written, rows that there will be (None where that is not known), and labelled slots written."""

_EVERY, _EVERY_REMOTE = 5.0, 15.0
"""Seconds."""
_PATIENCE = 10.0
"""Seconds to wait for the last writing."""


class Pulse:
    """The heartbeats of one process.

    Args:
        storage: of the cache.
        manifest: of the cache.
        worker: `I/N` where the process is one of several.
    """

    def __init__(self, storage: Storage, manifest: Manifest, worker: str = "") -> None:
        self._storage, self._manifest_sha256, self._worker = storage, manifest.sha256, worker
        self._made = self._made_labels = 0
        self._began: float | None = None

    @contextmanager
    def of(self, shard: int, counts: Counts) -> Iterator[None]:
        """Keep a heartbeat while a shard is made.

        Args:
            shard: its number.
            counts: how far it is; called in another thread.
        """
        started = time.monotonic()
        self._began = began = started if self._began is None else self._began
        made, made_labels = self._made, self._made_labels
        every = _EVERY_REMOTE if self._storage.remote else _EVERY
        host, job = plain_reason(platform.node()), find_job(os.environ)

        def write(failure: str = "") -> None:
            rows, planned, labels = counts()
            now = time.monotonic()
            Heartbeat(
                shard=shard, manifest_sha256=self._manifest_sha256, failure=failure, host=host, pid=os.getpid(),
                worker=self._worker, job=job and plain_reason(job), every=every, seconds=now - started, rows=rows,
                planned_rows=planned, labels=labels, made=made, made_labels=made_labels, busy_seconds=now - began,
            ).write(self._storage)  # fmt: skip

        beats = _Beats(write, lambda: self._storage.delete_object(heartbeat_name(shard)), every)
        try:
            yield
        except Exception as error:
            beats.end(plain_reason(_reason(error)))
            raise
        except BaseException:  # stopped, which is no failure
            beats.end()
            raise
        self._made, self._made_labels = made + 1, made_labels + counts()[2]
        beats.end()


class _Beats:
    """A thread that writes until it is ended, and then deletes, or writes the reason of a failure."""

    def __init__(self, write: Callable[[str], None], delete: Callable[[], None], every: float) -> None:
        self._write, self._delete, self._every = write, delete, every
        self._ended, self._failure = threading.Event(), ""
        self._thread = threading.Thread(target=self._run, name="kdcache-heartbeat", daemon=True)
        self._thread.start()

    def end(self, failure: str = "") -> None:
        """Write the last word, and wait for it, but not for long: a storage may hang."""
        self._failure = failure
        self._ended.set()
        self._thread.join(_PATIENCE)

    def _run(self) -> None:
        while True:
            with contextlib.suppress(Exception):
                self._write("")
            if self._ended.wait(self._every):
                break
        with contextlib.suppress(Exception):
            self._write(self._failure) if self._failure else self._delete()


def _reason(error: Exception) -> str:
    """A failure in one line: the sentence of an error of ours, the kind and the first line of any other."""
    return str(error) if isinstance(error, KdcacheError) else f"{type(error).__name__}: {one_line(error)}"
