"""Recent: the last few values that were asked for, each made once, however many threads ask for it."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """At most `most` values; the one that nobody has asked for longest leaves first."""

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._kept: OrderedDict[Hashable, _Once[V]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value under this key; made, outside of the lock, if there is none. An error is not kept."""
        with self._lock:
            once = self._kept.setdefault(key, _Once())
            self._kept.move_to_end(key)
            if len(self._kept) > self._most:
                self._kept.popitem(last=False)
        return once.get(make)


class _Once(Generic[V]):
    """A value that the first who asks makes, while the others wait."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: tuple[V] | None = None

    def get(self, make: Callable[[], V]) -> V:
        with self._lock:
            if self._made is None:
                self._made = (make(),)
            return self._made[0]
