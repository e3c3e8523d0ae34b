"""Scan dispatch: which code scans the logits of a device.

a CPU                 scan_cpu.py, compiled by numba
a GPU with Triton     scan_triton.py, once its kernels have given what scan_torch.py gives for logits of this very shape
any other             scan_torch.py, in torch's operations
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from kdcache.lazy_torch import torch
from kdcache.selection import scan_cpu, scan_torch

if TYPE_CHECKING:
    from torch import Tensor

ScanRows = Callable[["Tensor", int, "Tensor", list[float]], "tuple[Tensor, Tensor, Tensor, Tensor]"]
"""Logits, width, ids outside, temperatures: to values, ids, sums and entropy_terms. See `scan_cpu.scan_rows`."""

_COMPARED_ROWS = 16
_CLOSE = 1e-5
"""How far two sums of a block may differ, in units of the whole position's sum."""

_LEAST = 1e-28
"""A position's sum below which that unit shrinks no more: exponentials that are 0 to some would show."""

_trusted: dict[Any, bool] = {}


def scan_rows(
    x: Tensor, width: int, outside: Tensor, temperatures: list[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scan `[n, V]` logits of any floating dtype, on their device; see `scan_cpu.scan_rows`."""
    if x.device.type == "cpu":
        return scan_cpu.scan_rows(x, width, outside, temperatures)
    if x.device.type == "cuda" and _kernels_agree(x, width, outside, temperatures):
        from kdcache.selection import scan_triton

        return scan_triton.scan_rows(x, width, outside, temperatures)
    return scan_torch.scan_rows(x, width, outside, temperatures)


def _kernels_agree(x: Tensor, width: int, outside: Tensor, temperatures: list[float]) -> bool:
    """Whether kernels may be trusted with such logits: found out once for each shape, on the first that are given."""
    shape = (x.device, x.dtype, x.shape[-1], x.stride(0) % 16, width, len(temperatures))
    if shape not in _trusted and len(x):
        few = slice(0, _COMPARED_ROWS)
        _trusted[shape] = find_spec("triton") is not None and trusted(x[few], width, outside[few], temperatures)
    return _trusted.get(shape, False)


def trusted(x: Tensor, width: int, outside: Tensor, temperatures: list[float]) -> bool:
    """Whether kernels run here and agree with torch's operations about some logits; a warning says why not."""
    expected = scan_torch.scan_rows(x, width, outside, temperatures)
    try:
        from kdcache.selection import scan_triton

        why = _difference(scan_triton.scan_rows(x, width, outside, temperatures), expected)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a driver, a compiler, a version: whatever it is, the slower way works
        why = f"{type(error).__name__}: {error}".splitlines()[0]
    if why:
        warnings.warn(f"selection in torch's operations instead of kernels, which is slower: {why}", stacklevel=2)
    return not why


def _difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    """What kernels give differently, if anything. Positions whose logits are not finite do not count."""
    sound = torch.stack([torch.isfinite(part).flatten(1).all(-1) for part in expected]).all(0)
    for name, ours, theirs in zip(("values", "ids"), found, expected, strict=False):
        if not torch.equal(ours[sound], theirs[sound]):
            return f"their {name} differ"
    for name, ours, theirs in zip(("sums", "entropy_terms"), found[2:], expected[2:], strict=True):
        whole = theirs[sound].sum(-1, keepdim=True).clamp(min=_LEAST)
        if not ((ours[sound] - theirs[sound]).abs() <= _CLOSE * whole).all():
            return f"their {name} differ"
    return ""
