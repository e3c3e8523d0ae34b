"""Beside: work that runs in a thread of its own while the device computes, in order and never far behind.

Encoding and writing release the interpreter's lock where it matters, so they hide behind the forward pass as long as
they are faster than it; `waited` says for how long they were not.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

_DEPTH = 2
"""Tasks at most on their way: more would only hold more batches in memory."""


class Beside:
    """Runs tasks one after another in one thread. Use it as a context manager; leaving it waits for the last.

    Attributes:
        waited: seconds for which the caller stood still because tasks were behind.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="kdcache-write")
        self._pending: deque[Future[None]] = deque()

    def run(self, task: Callable[[], None]) -> None:
        """Queue a task; waits, and raises what an earlier one raised, when too many are on their way."""
        self._pending.append(self._pool.submit(task))
        self._settle(_DEPTH)

    def finish(self) -> None:
        """Wait for all tasks, and raise what one of them raised."""
        self._settle(0)

    def _settle(self, most: int) -> None:
        started = time.perf_counter()
        while len(self._pending) > most:
            self._pending.popleft().result()
        self.waited += time.perf_counter() - started

    def __enter__(self) -> Beside:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
