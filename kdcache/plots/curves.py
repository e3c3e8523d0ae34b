"""Curves: those of several trainings side by side; and of two students on held-out rows, for the demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kdcache.drawing import COLOURS, finish, new_figure, rendered, style
from kdcache.plots.plot import Plot
from kdcache.student.curves import draw_runs, read_curves

Curve = Sequence[tuple[int, float]]

_TRAINING = ("loss", "nll", "kl", "learning_rate")
_HELDOUT = ("nll", "kl", "teacher_nll", "kl_kind")


def curves(folders: Sequence[str]) -> Plot:
    """The curves of trainings, each by its folder, also of one that goes on.

    Raises:
        ConfigError: a folder that holds no training, or holds damaged figures.
    """
    runs = {folder: read_curves(folder) for folder in dict.fromkeys(folders)}
    numbers: dict[str, Any] = {
        "runs": {
            folder: {
                "training": [_known({"step": line["step"]}, line, _TRAINING) for line in run.training],
                "heldout": [_known({"step": step}, figures, _HELDOUT) for step, figures in run.heldout],
            }
            for folder, run in runs.items()
        }
    }
    names = _short(list(runs))
    shown = dict(zip(names, runs.values(), strict=True))
    return Plot(name="curves", numbers=numbers, draw=lambda figure, _: draw_runs(figure, shown), size=(9.4, 6.4))


def _known(start: dict[str, Any], figures: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return start | {name: figures[name] for name in names if figures.get(name) is not None}


def _short(folders: list[str]) -> list[str]:
    """The last parts of each path, as few as make them different."""
    parts = [Path(folder).parts for folder in folders]
    for count in range(1, max(map(len, parts))):
        short = ["/".join(each[-count:]) for each in parts]
        if len(set(short)) == len(folders):
            return short
    return folders


def plot_curves(
    path: Path, lines: Mapping[str, Curve], *, level: tuple[str, float] | None, ylabel: str, title: str
) -> None:
    """Draw curves of (step, value) into a PNG, with an optional horizontal line.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure = new_figure(7, 4.2)
    with style():
        axes = figure.subplots()
        for (name, curve), colour in zip(lines.items(), COLOURS, strict=False):
            steps, values = zip(*curve, strict=True)
            axes.plot(steps, values, marker="o", markersize=3.5, linewidth=1.8, color=colour, label=name)
            axes.annotate(f"{values[-1]:.3f}", (steps[-1], values[-1]), xytext=(6, 0), textcoords="offset points",
                          color=colour, va="center", fontsize=9)  # fmt: skip
        if level is not None:
            axes.axhline(level[1], color="#555555", linewidth=1.2, linestyle="--", label=f"{level[0]} ({level[1]:.3f})")
        axes.set(xlabel="optimiser step", ylabel=ylabel, title=title)
        axes.margins(x=0.09)
        finish(axes)
    path.write_bytes(rendered(figure, ".png"))
