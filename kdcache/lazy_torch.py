"""torch, imported when something of it is first used.

Importing torch costs two seconds of processor time. Manifests, settings and commits are checked without it, so the
modules of that path take torch from here, and `Tensor` for type checkers alone:

    from kdcache.lazy_torch import torch

Cost: a third of a microsecond a name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

__all__ = ["no_grad", "torch"]

if TYPE_CHECKING:
    import torch
else:

    class _Torch:
        """Stands for the module."""

        def __getattr__(self, name: str) -> Any:
            import torch

            return getattr(torch, name)

    torch = _Torch()

F = TypeVar("F", bound=Callable[..., Any])


def no_grad(function: F) -> F:
    """`torch.no_grad` as a decorator."""

    @functools.wraps(function)
    def run(*values: Any, **named: Any) -> Any:
        with torch.no_grad():
            return function(*values, **named)

    return cast(F, run)
