"""Ahead: results in order, of work that threads have begun before anyone asks for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def map_ahead(function: Callable[[T], R], items: Iterable[T], at_once: int) -> Iterator[R]:
    """`map`, with up to `at_once` calls under way.

    An error is raised when its turn comes; what still waits is then dropped.
    """
    coming: deque[Future[R]] = deque()
    with ThreadPoolExecutor(at_once, thread_name_prefix="kdcache-ahead") as pool:
        try:
            for item in items:
                coming.append(pool.submit(function, item))
                if len(coming) == at_once:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        finally:
            for waiting in coming:
                waiting.cancel()
