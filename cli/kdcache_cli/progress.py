"""Progress: how far a command is, with rate and time left, for people on a terminal or for machines.

Both are made of the same calls (done, total, note). A bar is one line; it is cut, not wrapped, where it has no room.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Update = Callable[..., None]
"""Called with what is done, what there is to do, and a note."""

_EVERY = 1.0
"""Seconds between two lines for machines."""


@contextmanager
def no_progress() -> Iterator[Update]:
    """Say nothing."""
    yield lambda *_: None


@contextmanager
def progress_bar(what: str, unit: str) -> Iterator[Update]:
    """A bar on stderr.

    Args:
        what: is being done.
        unit: of what is counted.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    def column(text: str, ratio: int | None = None) -> TextColumn:
        return TextColumn(text, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=ratio))

    columns = (
        column("{task.description}"),
        BarColumn(),
        column("{task.fields[count]} " + unit),
        column("{task.fields[rate]}"),
        column("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(what, total=None, count="", rate="", note="")

        def update(done: int, total: int, note: str = "") -> None:
            speed = bar.tasks[0].speed
            rate = f"{speed:,.1f}/s" if speed else ""
            bar.update(task, completed=done, total=total, count=f"{done:,}/{total:,}", rate=rate, note=note)

        yield update


@contextmanager
def progress_lines(what: str, unit: str, write: Callable[[dict[str, Any]], None]) -> Iterator[Update]:
    """An object for each second, and for the end: `progress`, `done`, `total`, `unit`, `per_second`, `seconds`,
    `seconds_left`, `note`.

    Args:
        what: is being done.
        unit: of what is counted; empty where the numbers are stages.
        write: takes an object.
    """
    started = time.monotonic()
    first: list[int] = []

    def line(done: int, total: int, note: str) -> dict[str, Any]:
        seconds = time.monotonic() - started
        rate = (done - first[0]) / seconds if seconds > 0 and done > first[0] else None
        return {
            "progress": what, "done": done, "total": total, "unit": unit or None,
            "per_second": rate, "seconds": round(seconds, 3),
            "seconds_left": None if rate is None else max(0, total - done) / rate, "note": note or None,
        }  # fmt: skip

    waiting: list[dict[str, Any]] = []
    written = -math.inf

    def update(done: int, total: int, note: str = "") -> None:
        nonlocal written
        if not first:
            first.append(done)
        waiting[:] = [line(done, total, note)]
        if time.monotonic() - written >= _EVERY:
            write(waiting.pop())
            written = time.monotonic()

    try:
        yield update
    finally:
        if waiting:
            write(waiting.pop())
