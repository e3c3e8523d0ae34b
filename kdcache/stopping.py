"""Stopping: SIGTERM and SIGUSR1 end a command between two units of its work, and not inside one.

A signal stops a command at once, unless it is inside a `deferred` block: there it is only noted, and the command stops
where the block ends, or at a `check` inside it. So a shard is finished or dropped, and a step of a training is finished
and saved. A command that was stopped ends with exit code 75 (EX_TEMPFAIL: "run me again"), whatever stopped it but
Ctrl-C.

A second signal stops the command at once, if it comes more than `REPEATED` seconds after the first: launchers tell a
process twice, since SLURM signals all processes of a step, and torchrun passes on what it gets. SIGUSR1 is what SLURM
can send some time before it sends SIGTERM; Windows does not have it.

Processes that a command starts to help it get those signals too, and must not die of them before the command is ready:
start them inside `shielded`, and let them call `obey_parent`.

No signal stops a process in the middle of an import: PyTorch's C++ code imports modules too, and aborts the process if
that ends with an exception. The handler comes back when the import is done.

Guarantee: outside of `handled` (as a library, or in another thread) nothing here has any effect. Cost: none.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

EXIT_CODE = 75
"""Of a command that SIGTERM or SIGUSR1 has stopped."""

GRACE = 20.0
"""Seconds that a unit of work may go on after a signal: less than the 30 that SLURM and torchrun wait by default."""

REPEATED = 5.0
"""Seconds after which another signal is a second one."""

_AGAIN = 0.05
"""Seconds after which a signal that came in the middle of an import is handled, if the import is done by then."""

SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Stopped(BaseException):
    """The command was told to stop. Like KeyboardInterrupt it is no error."""


class _State:
    asked_at: float | None = None
    blocks = 0


_state = _State()


@contextmanager
def handled() -> Iterator[None]:
    """Handle the signals, in the main thread, while a command runs."""

    def note(*_: Any) -> None:
        first = _state.asked_at is None
        if _state.asked_at is None:
            _state.asked_at = time.monotonic()
        if not _state.blocks or (not first and time.monotonic() - _state.asked_at > REPEATED):
            raise Stopped

    previous = [(number, signal.signal(number, outside_imports(note))) for number in SIGNALS]
    try:
        yield
    except Exception as error:
        if requested():  # a helper, or another rank, may have ended first
            raise Stopped from error
        raise
    finally:
        for number, handler in previous:
            signal.signal(number, handler)
        _state.asked_at, _state.blocks = None, 0


def requested() -> bool:
    """Whether the command was told to stop."""
    return _state.asked_at is not None


def check(grace: float = 0.0) -> None:
    """Stop here if the command was told to, at least `grace` seconds ago.

    Raises:
        Stopped: it was.
    """
    if _state.asked_at is not None and time.monotonic() - _state.asked_at >= grace:
        raise Stopped


@contextmanager
def deferred() -> Iterator[None]:
    """Finish what is inside before the command stops.

    Raises:
        Stopped: at the end, if the command was told to stop by then.
    """
    _state.blocks += 1
    try:
        yield
    finally:
        _state.blocks -= 1
    check()


def outside_imports(handler: Callable[[int, FrameType | None], None]) -> Callable[[int, FrameType | None], None]:
    """A handler of signals that may raise: it is called when no module is being imported."""

    def handle(number: int, frame: FrameType | None) -> None:
        if not _importing(frame):
            handler(number, frame)
            return
        again = threading.Timer(_AGAIN, signal.raise_signal, [number])
        again.daemon = True
        again.start()

    return handle


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


@contextmanager
def shielded() -> Iterator[None]:
    """Processes that are started inside begin with the signals blocked, so that those do not end them."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def obey_parent(*_: Any) -> None:
    """Called in a process that helps another: from now on only the second SIGTERM ends it, and no SIGUSR1.

    The first may be what its parent was sent too. A parent that ends its helpers asks a second time.
    """
    asked = False

    def end(*_: Any) -> None:
        nonlocal asked
        if asked:
            os._exit(0)
        asked = True

    for number in SIGNALS:
        signal.signal(number, end if number == signal.SIGTERM else signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
