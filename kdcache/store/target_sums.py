"""Target sums: entropy, label log p and tail mass added up over the targets of a shard, as its commit names them.

The sums are of the targets as they are given, so at dump time before a codec rounds anything. A row is added exactly
(`math.fsum`) and rounded once; rows are added with a compensated sum (Neumaier 1974), so the order of magnitude of a
shard does not cost digits. The result depends on the rows and their order alone. Cost: some 30 microseconds a row.

Shapes: N labelled positions of a row, n_T temperatures.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.targets import SparseTargets

_LEAST = -500.0
"""Nats; a smaller log p counts as this, since 4 to 16 bits do not distinguish it from others below -512."""


class TargetSums:
    """Sums over the positions of a shard that carry a target. A quantity that is not finite somewhere is unknown."""

    def __init__(self) -> None:
        self._totals: dict[str, list[_CompensatedSum]] = {}

    def add(self, targets: SparseTargets) -> None:
        """Add the targets of a row.

        Args:
            targets: `[N]`, on the CPU.
        """
        has = (targets.count > 0).numpy()
        columns: dict[str, NDArray[np.float64]] = {}  # [M, n_T]
        for name in ("entropy", "label_logprob"):
            known = getattr(targets, name)
            if known is not None:
                columns[name] = known.double().clamp(min=_LEAST).numpy()[has][:, None]
        if targets.log_tail is not None:
            columns["tail_mass"] = np.exp(targets.log_tail.double().numpy()[has])
        for name, values in columns.items():
            totals = self._totals.setdefault(name, [_CompensatedSum() for _ in range(values.shape[1])])
            for total, column in zip(totals, values.T, strict=True):
                total.add(_exact_sum(column))

    def fields(self) -> dict[str, Any]:
        """The sums under the names that a commit has for them; None for what is unknown.

        `entropy` and `label_logprob` are numbers, nats; `tail_mass` is a list, one number a temperature. All are
        None if no row was added.
        """
        found = {name: [total.value() for total in totals] for name, totals in self._totals.items()}
        one = {name: found[name][0] if name in found else None for name in ("entropy", "label_logprob")}
        tail = found.get("tail_mass")
        return {**one, "tail_mass": None if tail is None or all(mass is None for mass in tail) else tail}


def _exact_sum(values: NDArray[np.float64]) -> float:
    return math.fsum(values.tolist()) if np.isfinite(values).all() else math.nan


class _CompensatedSum:
    """A sum of float64 with a second number for what its roundings lost."""

    def __init__(self) -> None:
        self._total = self._lost = 0.0

    def add(self, value: float) -> None:
        total = self._total + value
        larger, smaller = (self._total, value) if abs(self._total) >= abs(value) else (value, self._total)
        self._lost += (larger - total) + smaller
        self._total = total

    def value(self) -> float | None:
        """The sum; None if a part of it was not finite."""
        found = self._total + self._lost
        return found if math.isfinite(found) else None
