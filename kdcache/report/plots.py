"""Plots: held-out curves of several students, as a PNG. Needs the `plots` extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kdcache.student.curves import HELDOUT, LEVEL, TRAINING, finish, new_figure

Curve = Sequence[tuple[int, float]]

_COLOURS = (TRAINING, HELDOUT, "#4f772d", "#6d597a")


def plot_curves(
    path: Path, curves: Mapping[str, Curve], *, level: tuple[str, float] | None, ylabel: str, title: str
) -> None:
    """Draw curves of (step, value) into a PNG, with an optional horizontal line.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure = new_figure(7, 4.2)
    axes = figure.subplots()
    for (name, curve), colour in zip(curves.items(), _COLOURS, strict=False):
        steps, values = zip(*curve, strict=True)
        axes.plot(steps, values, marker="o", markersize=3.5, linewidth=1.8, color=colour, label=name)
        axes.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(6, 0), textcoords="offset points",
                      color=colour, va="center", fontsize=9)  # fmt: skip
    if level is not None:
        axes.axhline(level[1], color=LEVEL, linewidth=1.2, linestyle="--", label=f"{level[0]} ({level[1]:.3f})")
    axes.set(xlabel="optimiser step", ylabel=ylabel, title=title)
    axes.margins(x=0.09)
    finish(axes)
    figure.savefig(path, dpi=150)
