"""Drawing: figures of matplotlib as PNG and SVG, with one look. Needs the `plots` extra.

Guarantee: no global state of matplotlib is changed, and a file is a pure function of what is drawn. Names that come
from files are shown as they are: nothing in them is taken for a formula.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdcache.errors import ConfigError

TRAINING, HELDOUT, LEVEL = "#0b6e99", "#c1440e", "#555555"
COLOURS = (TRAINING, HELDOUT, "#4f772d", "#6d597a", "#b8860b", "#1b998b", "#a23b72", "#6b6b6b")
"""Of lines, in their order; told apart by people who see few colours too, as far as eight can be."""

KINDS = (".png", ".svg")
_SHORT = 40
_STYLE = {
    "font.size": 10.5, "axes.titlesize": 11, "axes.titlelocation": "left", "axes.labelsize": 10.5,
    "legend.fontsize": 9.5, "xtick.labelsize": 9.5, "ytick.labelsize": 9.5, "svg.hashsalt": "kdcache",
}  # fmt: skip


@contextmanager
def style() -> Iterator[None]:
    """What is drawn and written inside has our sizes of letters.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError:
        raise ConfigError("a plot needs matplotlib: pip install 'kdcache[plots]'") from None
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, in inches, on white.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    with style():
        import matplotlib.figure

        return matplotlib.figure.Figure(figsize=(width, height), layout="constrained", facecolor="white")


def finish(axes: Any) -> None:
    """What all our axes have in common."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False)


def shown_name(name: str) -> str:
    """A name as it can stand in a figure: on one line, not long, and no formula."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in name)
    return (plain if len(plain) <= _SHORT else "…" + plain[1 - _SHORT :]).replace("$", r"\$")


def require_kind(path: str) -> str:
    """The suffix of a file to draw into.

    Raises:
        ConfigError: it is neither .png nor .svg.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in KINDS:
        raise ConfigError(f"{path} must end in {' or '.join(KINDS)}")
    return suffix


def rendered(figure: Any, kind: str) -> bytes:
    """A figure as the bytes of a file.

    Args:
        figure: of `new_figure`.
        kind: one of `KINDS`.
    """
    sink = io.BytesIO()
    with style():
        figure.savefig(sink, format=kind[1:], dpi=150, metadata={"Date": None} if kind == ".svg" else {})
    return sink.getvalue()
