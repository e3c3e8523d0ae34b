"""Open plot: a plot by its name, for `kdcache plot` and for `Cache.plot`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kdcache.cache import Cache, open_cache
from kdcache.errors import ConfigError
from kdcache.plots.plot import Plot, Progress

ROWS = 128
"""Rows that are read, unless told otherwise."""

OF_CACHE = ("kept-mass", "selections", "entropy")
OF_FILES = ("curves", "calibration")


def open_plot(what: str, sources: Sequence[str], rows: int = ROWS, on_progress: Progress | None = None) -> Plot:
    """A plot.

    Args:
        what: one of `OF_CACHE` or `OF_FILES`.
        sources: a cache; for `curves` folders of trainings, for `calibration` files of `evaluate`.
        rows: rows of a cache to read, evenly spread.
        on_progress: called with rows read and rows to read.

    Raises:
        ConfigError: an unknown name, or sources that do not go with it.
        KdcacheError: they cannot be read, or do not know what the plot shows.
    """
    if what in OF_CACHE:
        if len(sources) != 1:
            raise ConfigError(f"{what} is of one cache, not of {len(sources)}")
        return plot_cache(open_cache(sources[0], partial=True), what, rows, on_progress)
    if what == "curves":
        from kdcache.plots.curves import curves

        return curves(sources)
    if what == "calibration":
        from kdcache.plots.calibration import calibration

        return calibration(sources)
    raise ConfigError(f"there is no plot {what[:40]}; there are {', '.join((*OF_CACHE, *OF_FILES))}")


def plot_cache(cache: Cache, what: str, rows: int = ROWS, on_progress: Progress | None = None) -> Plot:
    """A plot of an open cache; see `open_plot`."""
    if what not in OF_CACHE:
        raise ConfigError(f"there is no plot {what[:40]} of a cache; there are {', '.join(OF_CACHE)}")
    return _maker(what)(cache, rows, on_progress)


def _maker(what: str) -> Callable[[Cache, int, Any], Plot]:
    if what == "kept-mass":
        from kdcache.plots.kept_mass import kept_mass as make
    elif what == "entropy":
        from kdcache.plots.entropy import entropy as make
    else:
        from kdcache.plots.selections import selections as make
    return make
