"""Compiled: how the loops of the codec become machine code.

numba, not C: it has wheels for every platform that torch has, and asks for no compiler where kdcache is installed. A
loop is compiled for the types of its first call, about a second each, and kept beside the source, or in the user's
cache folder where that cannot be written. Loops release the interpreter's lock, so threads decode side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """Compile a function of arrays and numbers on its first call."""
    try:
        return cast(F, numba.njit(function, nogil=True, error_model="numpy", cache=True))
    except RuntimeError:  # no folder can be written: compile in every process
        return cast(F, numba.njit(function, nogil=True, error_model="numpy"))
