"""Plot: numbers, and a picture of them when one is asked for. Numbers need no matplotlib."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdcache.drawing import new_figure, rendered, require_kind, style
from kdcache.store.atomic_files import require_new, write_new

Progress = Callable[[int, int], None]
"""Called with what is done and what there is to do."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot. A notebook shows its picture.

    Attributes:
        name: what it shows, such as `kept-mass`.
        numbers: all that is drawn, as plain values.
        draw: draws the numbers into a figure of matplotlib.
        size: of the picture, in inches.
    """

    name: str
    numbers: dict[str, Any]
    draw: Callable[[Any, dict[str, Any]], None] = field(repr=False)
    size: tuple[float, float] = (6.8, 4.4)

    def figure(self) -> Any:
        """A new `matplotlib.figure.Figure`.

        Raises:
            ConfigError: matplotlib is not installed.
        """
        figure = new_figure(*self.size)
        with style():
            self.draw(figure, self.numbers)
        return figure

    def save(self, path: str) -> None:
        """Draw into a new file, .png or .svg.

        Raises:
            ConfigError: the file exists, has another suffix, or matplotlib is not installed.
            CacheError: it cannot be written.
        """
        kind = require_kind(path)
        require_new(path)
        if not write_new(Path(path), rendered(self.figure(), kind)):
            require_new(path)

    def _repr_png_(self) -> bytes:
        return rendered(self.figure(), ".png")
