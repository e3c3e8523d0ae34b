"""Compiled: how loops over numbers become machine code.

numba, not C: it has wheels for every platform that torch has, and asks for no compiler where kdcache is installed. A
loop is compiled for the types of its first call, about a second each, and kept beside the source, or in the user's
cache folder where that cannot be written. Loops release the interpreter's lock, so threads run them side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


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
    compile_ = partial(numba.njit, nogil=True, error_model="numpy", fastmath=fastmath)
    try:
        return cast(F, compile_(function, cache=True))
    except RuntimeError:  # no folder can be written: compile in every process
        return cast(F, compile_(function))
