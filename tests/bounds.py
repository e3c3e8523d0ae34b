"""How far a result may lie from the exact one, on any processor.

A sum of floating-point numbers depends on its order, and the order depends on the processor, the number of threads and
the library. An error is therefore known only to within a factor, and a bound needs room. Two parts make it:

- `ROOM` times the error of the plain computation: the textbook's formula, in the same dtype, on the same machine;
- some unit roundoffs of the largest exact value, for where the plain computation was lucky.

A wrong formula misses by 1e-3 and more of the largest value, so the room hides none.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROOM = 4.0
"""How many times less exact than the plain computation a result may be."""

ROUNDINGS = {torch.float32: 32.0, torch.bfloat16: 2.0, torch.float16: 2.0, torch.float64: 2.0**18}
"""Unit roundoffs (2^-24 of a value in float32) that a result may be off besides.

Sums of half precision are made in float32, so the last rounding is what is left. In float64 the exact value is the
plain computation itself, and no better than what it judges: the roundings alone make the bound, 2.9e-11 of the value,
because a difference of near numbers turns one rounding into thousands.
"""


def bound(exact: Tensor, dtype: torch.dtype, plain: Tensor | None = None, roundings: float | None = None) -> float:
    """The largest error that a computation in `dtype` may have.

    Args:
        exact: what is true, in float64.
        dtype: of the computation that is judged; its unit roundoff counts.
        plain: the plain computation in that dtype, of the same shape.
        roundings: unit roundoffs of the largest exact value, if not those above; more for a long chain of operations.
    """
    count = ROUNDINGS[dtype] if roundings is None else roundings
    allowed = count * torch.finfo(dtype).eps / 2 * exact.abs().max()
    if plain is not None:
        allowed += ROOM * (plain.double() - exact).abs().max()
    return allowed.item()


def require_close(
    found: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    plain: Tensor | None = None,
    roundings: float | None = None,
    what: str = "the result",
) -> None:
    """Fail if `found` is further than `bound` from `exact` in any element, or has another shape."""
    assert found.shape == exact.shape, f"{what} has shape {tuple(found.shape)}, not {tuple(exact.shape)}"
    if not exact.numel():
        return
    error = (found.detach().double() - exact).abs().max().item()
    allowed = bound(exact, dtype, plain, roundings)
    assert error <= allowed, f"{what} is off by {error:.3g}; {allowed:.3g} is allowed"
