"""Plots: held-out curves of several students, as a PNG. Needs the `plots` extra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kdcache.errors import ConfigError

Curve = Sequence[tuple[int, float]]


def plot_curves(
    path: Path, curves: Mapping[str, Curve], *, level: tuple[str, float] | None, ylabel: str, title: str
) -> None:
    """Draw curves of (step, value) into a PNG, with an optional horizontal line.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a plot needs matplotlib: pip install 'kdcache[plots]'") from None
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for (name, curve), colour in zip(curves.items(), ("#0b6e99", "#c1440e", "#4f772d", "#6d597a"), strict=False):
        steps, values = zip(*curve, strict=True)
        axes.plot(steps, values, marker="o", markersize=3.5, linewidth=1.8, color=colour, label=name)
        axes.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(6, 0), textcoords="offset points",
                      color=colour, va="center", fontsize=9)  # fmt: skip
    if level is not None:
        axes.axhline(level[1], color="#555555", linewidth=1.2, linestyle="--", label=f"{level[0]} ({level[1]:.3f})")
    axes.set(xlabel="optimiser step", ylabel=ylabel, title=title)
    axes.margins(x=0.09)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
