"""Waiting: the share of the training's time that its step spent waiting for rows.

Time is taken around the loader's `next`, on this process's clock. It begins when the first batch is there: what comes
before is the start of the readers. A GPU may still be at work while the process waits, so there the share is an upper
bound of the time that the GPU was idle for want of rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

T = TypeVar("T")


class Waiting:
    """Adds up, over a run, how long `next` took."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._begun: float | None = None
        self._waited = 0.0
        self._told = (0.0, 0.0)

    def watch(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches, timed; dropping this leaves the rest of them to the next who asks."""
        while True:
            asked = self._clock()
            try:
                batch = next(batches)
            except StopIteration:
                return
            if self._begun is None:
                self._begun = self._clock()
                self._told = (self._begun, 0.0)
            else:
                self._waited += self._clock() - asked
            yield batch

    def share(self) -> float:
        """Of all the time since the first batch; 0 before it."""
        return 0.0 if self._begun is None else _share(self._waited, self._clock() - self._begun)

    def share_since_told(self) -> float:
        """Of the time since this was last asked."""
        (since, before), now = self._told, self._clock()
        self._told = (now, self._waited)
        return 0.0 if self._begun is None else _share(self._waited - before, now - since)


def _share(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
