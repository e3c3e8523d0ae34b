"""Curves: the figures of runs over their steps, in four panels.

The loss that was minimised, the student's nll and KL (of the training positions since the line before, and of the
held-out rows), and the learning rate. What is drawn is a pure function of the arguments.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.drawing import COLOURS, HELDOUT, LEVEL, TRAINING, finish, new_figure, rendered, shown_name, style
from kdcache.errors import ConfigError

BEFORE, METRICS, SUMMARY = "heldout-before.json", "metrics.jsonl", "summary.json"
"""Files of a run that curves are made of."""

Points = Sequence[tuple[float, float]]

_PANELS = {
    "loss": "loss",
    "nll": "nll of the next token (nats)",
    "kl": "KL(teacher ‖ student) (nats)",
    "learning_rate": "learning rate",
}
_HELDOUT = ("nll", "kl")
"""Figures that are measured on held-out rows, too."""


@dataclass(frozen=True)
class Curves:
    """What a run said of itself.

    Attributes:
        training: lines of `metrics.jsonl`, but for those of held-out rows.
        heldout: (step, figures) of the held-out rows, in order.
    """

    training: Sequence[dict[str, Any]]
    heldout: Sequence[tuple[int, dict[str, Any]]]

    def points(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a figure while training, where it is known."""
        return _points((line["step"], line.get(name)) for line in self.training)

    def require_numbers(self) -> None:
        """Check that every figure that is drawn is a number, or absent; raises ValueError or its like."""
        for name in _PANELS:
            self.points(name)
            self.heldout_points(name)

    def heldout_points(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of a figure of the held-out rows, where it is known."""
        return _points((step, figures.get(name)) for step, figures in self.heldout)


def curves_of(metrics: Path, summary: Mapping[str, Any]) -> Curves:
    """The curves of a run.

    Args:
        metrics: its `metrics.jsonl`.
        summary: its `steps` and `heldout{before, after}`; of a run that goes on, `before` alone or nothing.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    before, after = (summary.get("heldout", {}).get(when) for when in ("before", "after"))
    last = None if after is None else summary["steps"]
    heldout = [
        (line["step"], line["heldout"]) for line in lines if "heldout" in line and (last is None or line["step"] < last)
    ]
    heldout = [
        *([] if before is None else [(0, before)]),
        *heldout,
        *([] if last is None else [(last, after)]),
    ]
    return Curves([line for line in lines if "heldout" not in line], heldout)


def read_curves(folder: str) -> Curves:
    """The curves of a run in its folder, also while it goes on.

    Raises:
        ConfigError: the folder holds no run, or its files are damaged.
    """
    path = Path(folder)
    if not (path / METRICS).is_file():
        raise ConfigError(f"{folder} is no folder of a training: it has no {METRICS}")
    try:
        if (path / SUMMARY).is_file():
            summary = json.loads((path / SUMMARY).read_text())
        elif (path / BEFORE).is_file():
            summary = {"heldout": {"before": json.loads((path / BEFORE).read_text())}}
        else:
            summary = {}
        found = curves_of(path / METRICS, summary)
        found.require_numbers()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"the figures of the training in {folder} cannot be read: {error}") from None
    return found


def draw_run(path: Path, run: Curves) -> None:
    """Draw one run into a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    figure = new_figure(10, 6.4)
    draw_runs(figure, {"": run})
    path.write_bytes(rendered(figure, ".png"))


def draw_runs(figure: Any, runs: Mapping[str, Curves]) -> None:
    """Draw runs into a figure: of one run, training and held-out rows each in a colour; of several, a colour each."""
    with style():
        panels = figure.subplots(2, 2, sharex=True)
        for axes, (name, title) in zip(panels.flat, _PANELS.items(), strict=True):
            for (run, found), colour in zip(runs.items(), _colours(len(runs)), strict=True):
                label, heldout = ("training", "held out") if len(runs) == 1 else (shown_name(run), "")
                training_colour, heldout_colour = (TRAINING, HELDOUT) if len(runs) == 1 else (colour, colour)
                _plot(
                    axes,
                    found.points(name),
                    training_colour,
                    label,
                    "",
                    1.0 if len(runs) == 1 or name not in _HELDOUT else 0.45,
                )
                if name in _HELDOUT:
                    _plot(axes, found.heldout_points(name), heldout_colour, heldout, "o", 1.0)
            if name == "nll":
                _draw_teachers(axes, runs)
            axes.set_title(title)
            finish(axes)
            if len(runs) > 1 and axes is not panels[0, 0] and axes.get_legend() is not None:
                axes.get_legend().remove()
        for axes in panels[1]:
            axes.set_xlabel("optimiser step")
        if len(runs) > 1:
            figure.supxlabel(
                "faint: training   ● held-out rows   - - teacher, held-out rows", fontsize=9.5, color=LEVEL
            )


def _draw_teachers(axes: Any, runs: Mapping[str, Curves]) -> None:
    """A line at the nll of each teacher on the held-out rows."""
    for found, colour in zip(runs.values(), _colours(len(runs)), strict=True):
        level = found.heldout[-1][1].get("teacher_nll") if found.heldout else None
        if level is not None:
            one = len(runs) == 1
            axes.axhline(level, color=LEVEL if one else colour, linewidth=1.2, linestyle="--",
                         label="teacher, held out" if one else "")  # fmt: skip


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _points(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[float, float]]:
    return [(int(step), float(value)) for step, value in pairs if value is not None]


def _plot(axes: Any, points: Points, colour: str, label: str, marker: str, alpha: float) -> None:
    if points:
        steps, values = zip(*points, strict=True)
        dot = marker or ("o" if len(points) == 1 else "")  # a line of one point is invisible
        axes.plot(steps, values, color=colour, label=label, linewidth=1.6, marker=dot, markersize=4, alpha=alpha)
