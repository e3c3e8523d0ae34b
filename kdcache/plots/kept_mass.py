"""Kept mass: how much of the teacher's probability the k largest entries of a position hold, for k up to the cache's.

Of truncated targets every number is exact at each stored temperature, but for the rounding of the stored values.
Quantiles over positions are read off a histogram of 1,000 bins, so they are right to 0.001.

Shapes: n positions of a row, K entries, k_n numbers of entries.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kdcache.cache import Cache
from kdcache.drawing import COLOURS, finish
from kdcache.errors import ConfigError
from kdcache.plots.plot import Plot, Progress
from kdcache.plots.read_rows import read_spread
from kdcache.targets import SparseTargets

_BINS = 1000
_LEVELS = (0.1, 0.5, 0.9)


def kept_mass(cache: Cache, rows: int, on_progress: Progress | None = None) -> Plot:
    """Mean kept mass by k and temperature, and its quantiles over positions at the first of them.

    Raises:
        ConfigError: the targets are sampled, so their entries keep no mass, or there are none.
    """
    manifest = cache.manifest
    if manifest.rule.sampled:
        raise ConfigError(
            f"the entries of kind {manifest.rule.kind} are a sample of the whole distribution: no mass is kept or lost"
        )
    temperatures = sorted(manifest.temperatures, key=lambda t: (t != 1.0, t))
    ks = entry_counts(manifest.width)
    places = np.array(ks) - 1
    sums = np.zeros((len(temperatures), len(ks)))
    histograms = np.zeros((len(ks), _BINS), np.int64)
    positions = 0
    for targets in read_spread(cache, rows, on_progress):
        for i, temperature in enumerate(temperatures):
            kept = _kept(targets, temperature)[:, places]
            sums[i] += kept.sum(0)
            if not i:
                bins = np.minimum((kept * _BINS).astype(np.int64), _BINS - 1)
                for histogram, column in zip(histograms, bins.T, strict=True):
                    histogram += np.bincount(column, minlength=_BINS)
        positions += len(targets.count)
    if not positions:
        raise ConfigError("there is no position with a target in these rows")
    numbers = {
        "rows": min(rows, len(cache)), "of_rows": len(cache), "positions": positions, "k": ks,
        "mean": [
            {"temperature": t, "kept_mass": (line / positions).tolist()}
            for t, line in zip(temperatures, sums, strict=True)
        ],
        "quantiles": {
            "temperature": temperatures[0],
            **{f"{level:g}": [_quantile(h, level) for h in histograms] for level in _LEVELS},
        },
    }  # fmt: skip
    return Plot(name="kept-mass", numbers=numbers, draw=_draw)


def entry_counts(width: int) -> list[int]:
    """Numbers of entries up to a width: 1, 2, 3, 4, 6, 8, 12, 16, ... and the width itself."""
    powers = [1 << i for i in range(width.bit_length())]
    return sorted({k for power in powers for k in (power, power + power // 2) if k <= width} | {width})


def _kept(targets: SparseTargets, temperature: float) -> Any:
    """`[n, K]` float64 mass of the j + 1 largest entries."""
    logs = targets.at_temperature(temperature)[0].double()
    return logs.sort(-1, descending=True).values.exp().cumsum(-1).clamp(max=1).numpy()


def _quantile(histogram: Any, level: float) -> float:
    """The value below which a share of the counted lies, inside its bin by interpolation."""
    ends = histogram.cumsum()
    wanted = level * ends[-1]
    at = int(np.searchsorted(ends, wanted))
    before = ends[at] - histogram[at]
    return float((at + (wanted - before) / max(1, histogram[at])) / _BINS)


def _draw(figure: Any, numbers: dict[str, Any]) -> None:
    axes = figure.subplots()
    ks, band = numbers["k"], numbers["quantiles"]
    axes.fill_between(ks, band["0.1"], band["0.9"], color=COLOURS[0], alpha=0.15, linewidth=0,
                      label=f"80% of positions, T = {band['temperature']:g}")  # fmt: skip
    for line, colour in zip(numbers["mean"], COLOURS, strict=False):
        values = line["kept_mass"]
        axes.plot(ks, values, marker="o", markersize=3.5, linewidth=1.8, color=colour,
                  label=f"mean, T = {line['temperature']:g}")  # fmt: skip
        axes.annotate(f"{values[-1]:.4f}", (ks[-1], values[-1]), xytext=(6, 0), textcoords="offset points",
                      color=colour, va="center", fontsize=9.5)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks(_ticks(ks), [f"{k:,}" for k in _ticks(ks)])
    axes.minorticks_off()
    axes.set_ylim(min(0.0, axes.get_ylim()[0]) if band["0.1"][0] < 0.2 else axes.get_ylim()[0], 1.02)
    axes.margins(x=0.12)
    axes.set(
        xlabel="entries a position (k)", ylabel="kept mass (share of the probability)",
        title=f"Mass that the k largest entries keep, {numbers['positions']:,} positions",
    )  # fmt: skip
    finish(axes)
    axes.get_legend().set_loc("lower right")


def _ticks(ks: list[int]) -> list[int]:
    """Powers of 2 among them, at most ten, and the last where it has room."""
    powers = [k for k in ks if not k & (k - 1)]
    powers = powers[:: 1 + len(powers) // 10]
    return powers if ks[-1] < 1.5 * powers[-1] else [*powers, ks[-1]]
