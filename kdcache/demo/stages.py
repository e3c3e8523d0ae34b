"""The stages of the demo: what each is called, how long it took, and how much of the budget is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Progress = Callable[[int, int, str], None]
"""Called with what is done, what is to do, and what happens."""


class Stages:
    """Times each stage by name.

    Args:
        seconds: the budget of all stages together.
        on_progress: see `Progress`.

    Attributes:
        done: `name` and `seconds` of each stage that has ended, and whatever else it put there.
    """

    def __init__(self, seconds: float, on_progress: Progress) -> None:
        self.seconds = seconds
        self.done: list[dict[str, Any]] = []
        self._on_progress = on_progress
        self._started = time.perf_counter()

    @property
    def left(self) -> float:
        """Seconds of the budget that are left; negative when it is used up."""
        return self.seconds - (time.perf_counter() - self._started)

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Time what is done inside; it may add to the entry that it is given."""
        entry: dict[str, Any] = {"name": name}
        started = time.perf_counter()
        yield entry
        entry["seconds"] = time.perf_counter() - started
        self.done.append(entry)

    def progress(self, what: str) -> Callable[..., None]:
        """A function of (done, total) that says what is done and to do of `what`."""
        return lambda done, total, *_: self._on_progress(done, total, what)
