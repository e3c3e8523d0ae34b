"""A thread that encodes and writes while the device computes: in order, with a short queue.

Encoding and writing release the interpreter's lock where it matters, so they cost no time as long as they are faster
than the forward pass; `stalled_seconds` says for how long they were not.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

_MOST_QUEUED = 2
"""Tasks queued at most: more would only hold more batches in memory."""


class BackgroundWriter:
    """Runs tasks one after another in one thread. Use it as a context manager; leaving it waits for the task that runs.

    Attributes:
        stalled_seconds: for how long the caller had to wait because tasks were behind.
    """

    def __init__(self) -> None:
        self.stalled_seconds = 0.0
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdcache-write")
        self._queued: deque[Future[None]] = deque()

    def submit(self, task: Callable[[], None]) -> None:
        """Queue a task. If too many are queued it waits, and raises what an earlier one raised."""
        self._queued.append(self._pool.submit(task))
        self._wait_until(_MOST_QUEUED)

    def finish(self) -> None:
        """Wait for all tasks, and raise what one of them raised."""
        self._wait_until(0)

    def _wait_until(self, most: int) -> None:
        started = time.perf_counter()
        while len(self._queued) > most:
            self._queued.popleft().result()
        self.stalled_seconds += time.perf_counter() - started

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
