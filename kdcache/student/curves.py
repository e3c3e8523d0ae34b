"""Curves: the figures of a run over its steps, as one PNG. Needs the `plots` extra.

Four panels over the optimiser step: the loss that was minimised, the student's nll and KL (of the training positions
since the line before, and of the held-out rows), and the learning rate. The file is a pure function of its arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache.errors import ConfigError

TRAINING, HELDOUT, LEVEL = "#0b6e99", "#c1440e", "#555555"

Points = Sequence[tuple[float, float]]


def new_figure(width: float, height: float) -> Any:
    """An empty figure of matplotlib, in inches, that touches no global state.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a plot needs matplotlib: pip install 'kdcache[plots]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def finish(axes: Any) -> None:
    """What all our axes have in common."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(frameon=False, fontsize=9)


def draw_run(path: Path, lines: Sequence[dict[str, Any]], heldout: Sequence[tuple[int, dict[str, Any]]]) -> None:
    """Draw a run.

    Args:
        path: of the PNG.
        lines: what `metrics.jsonl` holds.
        heldout: (step, figures) of the held-out rows, in order.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure = new_figure(10, 6.4)
    panels = figure.subplots(2, 2, sharex=True)
    for axes, name, title in zip(
        panels.flat, ("loss", "nll", "kl", "learning_rate"),
        ("loss", "nll of the next token (nats)", "KL(teacher ‖ student) (nats)", "learning rate"), strict=True,
    ):  # fmt: skip
        _plot(axes, _points((line["step"], line.get(name)) for line in lines), TRAINING, "training")
        if name in ("nll", "kl"):
            _plot(axes, _points((step, figures.get(name)) for step, figures in heldout), HELDOUT, "held out", "o")
        if name == "nll" and heldout and heldout[-1][1].get("teacher_nll") is not None:
            axes.axhline(heldout[-1][1]["teacher_nll"], color=LEVEL, linewidth=1.2, linestyle="--",
                         label="teacher, held out")  # fmt: skip
        axes.set_title(title, fontsize=10, loc="left")
        finish(axes)
    for axes in panels[1]:
        axes.set_xlabel("optimiser step")
    figure.savefig(path, dpi=120)


def _points(pairs: Any) -> list[tuple[float, float]]:
    return [(step, value) for step, value in pairs if value is not None]


def _plot(axes: Any, points: Points, colour: str, label: str, marker: str = "") -> None:
    if points:
        steps, values = zip(*points, strict=True)
        dot = marker or ("o" if len(points) == 1 else "")  # a line of one point is invisible
        axes.plot(steps, values, color=colour, label=label, linewidth=1.6, marker=dot, markersize=4)
