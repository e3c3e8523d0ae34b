"""Compiled: how loops over numbers become machine code.

numba, not C: it has wheels for every platform that torch has, and asks for no compiler where kdcache is installed. A
loop is handed to numba at its first call and compiled for the types of that, about a second each, and kept next to
the source, or in the user's cache folder where that cannot be written. Loops release the interpreter's lock, so
threads run them at the same time.

Guarantee: a loop is compiled anew when any file of its folder changes, so loops may call loops of other files there.
numba itself looks only at a loop's own file, and would use an old callee.
"""

from __future__ import annotations

import functools
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

_LOCK = threading.Lock()
"""Held while a loop is handed to numba, which changes a setting of numba's for all threads."""


def compiled(function: F) -> F:
    """Compile a function of arrays and numbers on its first call."""
    return _compiled(function, fastmath=False)


def compiled_fused(function: F) -> F:
    """The same, where a product and a sum may be rounded once, together: faster, and the last bit may differ."""
    return _compiled(function, fastmath={"contract"})


def compiled_reordered(function: F) -> F:
    """The same, where a sum may also be made in another order, which is what vectors need."""
    return _compiled(function, fastmath={"contract", "reassoc"})


def _compiled(function: F, fastmath: bool | set[str]) -> F:
    return cast(F, functools.update_wrapper(_Loop(function, fastmath), function))


class _Loop:
    """A function that is compiled when it is first called, by Python or by another loop; numba is imported then."""

    def __init__(self, function: Callable[..., Any], fastmath: bool | set[str]) -> None:
        self._function, self._fastmath = function, fastmath
        self._dispatcher: Any = None

    def __call__(self, *values: Any) -> Any:
        return (self._dispatcher or self._dispatched())(*values)

    @property
    def _numba_type_(self) -> Any:
        """What numba takes this for where another loop calls it."""
        return self._dispatched()._numba_type_

    def _dispatched(self) -> Any:
        with _LOCK:
            if self._dispatcher is None:
                self._dispatcher = self._make()
            return self._dispatcher

    def _make(self) -> Any:
        import numba

        compile_ = functools.partial(numba.njit, nogil=True, error_model="numpy", fastmath=self._fastmath)
        try:
            with _kept_for(Path(self._function.__code__.co_filename).parent):
                return compile_(self._function, cache=True)
        except RuntimeError:  # no folder can be written: compile in every process
            return compile_(self._function)


@contextmanager
def _kept_for(folder: Path) -> Iterator[None]:
    """Loops that are decorated inside are kept in a folder for these sources only, where it can be written."""
    import numba

    before = numba.config.CACHE_DIR
    pycache = folder / "__pycache__"
    if before or os.access(pycache if pycache.exists() else folder, os.W_OK):
        numba.config.CACHE_DIR = str(Path(before or pycache) / f"loops-{_digest(folder, numba.__version__)}")
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before


@functools.cache
def _digest(folder: Path, version: str) -> str:
    """Of the sources and numba's version: two versions would overwrite each other's loops."""
    running = hashlib.sha256(version.encode())
    for path in sorted(folder.glob("*.py")):
        running.update(path.read_bytes())
    return running.hexdigest()[:16]
