"""Surfaces: how a cache or a row is shown in a notebook or a plot, by code that lies above it.

`Cache.plot` and `_repr_html_` of a cache, a row and a position are methods of low values, and people look for them
there; what they call draws pictures and pages. It is loaded by name when it is first called, so that nothing below
imports it, and everything below works without it.
"""

from __future__ import annotations

import importlib
from typing import Any

_SURFACES = {
    "plot": "kdcache.plots.open_plot:plot_cache",
    "cache": "kdcache.explorer.notebook:cache_html",
    "row": "kdcache.explorer.notebook:row_html",
    "position": "kdcache.explorer.notebook:position_html",
}


def show(what: str, *values: Any, **named: Any) -> Any:
    """What a surface makes of values.

    Args:
        what: the name of the surface.
        values, named: what it is given.
    """
    module, _, name = _SURFACES[what].partition(":")
    return getattr(importlib.import_module(module), name)(*values, **named)
