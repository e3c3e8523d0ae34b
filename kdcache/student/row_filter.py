"""The fields `rows` and `where`, as values. Importing this costs nothing.

The two are not alike. `rows` names the rows that a run may read: nothing else is read, to train or to measure.
`where` picks, among these, the rows to train on: the held-out rows stay, so runs with different `where` are measured
on the same rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from kdcache.errors import ConfigError

_RANGE = re.compile(r"(-?\d*):(-?\d*)")
_BOUND = re.compile(r"entropy\s*([<>])\s*(\S+)")


@dataclass(frozen=True)
class Bound:
    """A row must have a mean entropy above, or below, so many nats."""

    above: bool
    nats: float

    def holds(self, entropy: float) -> bool:
        """Whether a row of this mean entropy satisfies it; NaN, a row without positions, never does."""
        return entropy > self.nats if self.above else entropy < self.nats


def parse_rows(text: str | None) -> tuple[slice, ...]:
    """The ranges of `rows`, such as `0:1000` or `:100,200:300,-50:`; everything if it was not given.

    Raises:
        ConfigError: it is no list of ranges.
    """
    if text is None:
        return (slice(None),)
    found = [_RANGE.fullmatch(part.strip()) for part in text.split(",")]
    if not all(found) or "-" in [end for match in found if match for end in match.groups()]:
        raise ConfigError(f"rows {text} is not a range of rows such as 0:1000, nor several with commas between")
    return tuple(slice(*(int(end) if end else None for end in match.groups())) for match in found if match)


def parse_where(text: str | None) -> tuple[Bound, ...]:
    """The bounds of `where`, such as `entropy<2.5` or `entropy>0.5,entropy<2.5`.

    Raises:
        ConfigError: it is none of these.
    """
    return tuple(_bounds(text)) if text is not None else ()


def _bounds(text: str) -> Iterable[Bound]:
    for part in text.split(","):
        match = _BOUND.fullmatch(part.strip())
        try:
            nats = float(match[2]) if match else math.nan
        except ValueError:
            nats = math.nan
        if match is None or not math.isfinite(nats):
            raise ConfigError(f"where {text} is not a bound such as entropy<2.5, nor several with commas between")
        yield Bound(match[1] == ">", nats)
