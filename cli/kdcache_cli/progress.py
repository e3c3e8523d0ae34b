"""Progress: how far a command is, with rate and time left, for people on a terminal or for machines.

Both are made of the same calls (done, total, note). A bar is one line; it is cut, not wrapped, where it has no room.
"""

from __future__ import annotations

import math
import sys
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

    def column(text: str) -> TextColumn:
        return TextColumn(text, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))

    console = Console(stderr=True)
    bar_width = min(_BAR, console.width // 4)
    columns = (
        column("{task.description}"),
        BarColumn(bar_width=bar_width),
        column("{task.fields[count]} " + unit),
        column("{task.fields[rate]}"),
        TimeRemainingColumn(),
        column("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None, count="", rate="", note="")

        def update(done: int, total: int, note: str = "") -> None:
            _silence_transformers()
            speed = bar.tasks[0].speed
            rate, count = f"{speed:,.1f}/s" if speed else "", f"{done:,}/{total:,}"
            taken = len(what) + bar_width + len(count) + len(unit) + len(rate) + _REST
            room = max(0, console.width - taken)  # the note gets what the figures leave
            shown = note if len(note) <= room else f"{note[: max(0, room - 1)]}…" if room else ""
            bar.update(task, completed=done, total=total, count=count, rate=rate, note=shown)

        yield update


_BAR = 30
"""Columns of a bar."""
_REST = 14
"""Columns of the time left, and of what lies between all of them."""


def _silence_transformers() -> None:
    """Keep the bars of transformers, if it is loaded, from crossing ours; downloads go on to show theirs."""
    loaded = sys.modules.get("transformers.utils.logging")
    if loaded is not None and loaded.is_progress_bar_enabled():
        from huggingface_hub.utils import enable_progress_bars

        loaded.disable_progress_bar()
        enable_progress_bars()


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
    first: list[tuple[int, float]] = []  # what was done when it began, and when that was

    def line(done: int, total: int, note: str) -> dict[str, Any]:
        seconds = time.monotonic() - started
        more, since = done - first[0][0], time.monotonic() - first[0][1]
        rate = more / since if since > 0 and more > 0 else None
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
            first.append((done, time.monotonic()))
        waiting[:] = [line(done, total, note)]
        if time.monotonic() - written >= _EVERY:
            write(waiting.pop())
            written = time.monotonic()

    try:
        yield update
    finally:
        if waiting:
            write(waiting.pop())
