"""Calibration: how often a model is right in the positions in which it says how sure it is, from files of `evaluate`.

Bins and error are those of `kdcache.student.metrics` (Guo et al. 2017, arXiv 1706.04599).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kdcache.drawing import COLOURS, LEVEL, finish, shown_name
from kdcache.errors import ConfigError
from kdcache.plots.plot import Plot

_MOST_BYTES = 1 << 26


def calibration(files: Sequence[str]) -> Plot:
    """The bins of each model in files of `kdcache evaluate`: `--out`, or what `--json` printed.

    Raises:
        ConfigError: a file is none of these.
    """
    models: dict[str, dict[str, Any]] = {}
    for file in files:
        for name, found in _models(file):
            models[name if name not in models else f"{name} ({len(models) + 1})"] = found
    return Plot(name="calibration", numbers={"models": models}, draw=_draw, size=(5.6, 6.0))


def _models(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each model of a file, with its bins; the teacher once, if it was run."""
    try:
        path = Path(file)
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"{file} is too large for an evaluation")
        found = json.loads(path.read_text(encoding="utf-8"))
        name = str((found.get("options") or {}).get("student") or path.stem)
        figures = found.get("figures", found)
        students = figures.get("students") or {name: figures}
        for student, one in students.items():
            yield student, {"ece": float(one["ece"]), "bins": _bins(one["calibration"]["bins"])}
        for one in list(students.values())[:1]:
            if one.get("teacher_calibration") is not None:
                bins = _bins(one["teacher_calibration"]["bins"])
                yield f"teacher of {name}", {"ece": float(one["teacher_ece"]), "bins": bins}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{file} is no evaluation; `kdcache evaluate --out FILE` writes one") from None


def _bins(given: Any) -> list[dict[str, Any]]:
    """Bins of an evaluation, checked."""
    found = []
    for one in given:
        low, high, positions = float(one["low"]), float(one["high"]), int(one["positions"])
        sure, right = one["confidence"], one["accuracy"]
        if positions < 0 or not 0 <= low < high <= 1 + 1e-9 or (positions and not 0 <= float(right) <= 1 + 1e-9):
            raise ValueError
        found.append({
            "low": low, "high": high, "positions": positions,
            "confidence": float(sure) if positions else None, "accuracy": float(right) if positions else None,
        })  # fmt: skip
    if not any(one["positions"] for one in found):
        raise ValueError
    return found


def _draw(figure: Any, numbers: dict[str, Any]) -> None:
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    above.plot([0, 1], [0, 1], color=LEVEL, linewidth=1.2, linestyle="--", label="right as often as it is sure")
    models = numbers["models"]
    for i, (name, model) in enumerate(models.items()):
        colour, bins = COLOURS[i % len(COLOURS)], [one for one in model["bins"] if one["positions"]]
        if len(models) == 1:
            above.bar(
                [one["low"] for one in bins], [one["accuracy"] for one in bins], align="edge",
                width=[one["high"] - one["low"] for one in bins], color=colour, alpha=0.2, edgecolor=colour,
            )  # fmt: skip
        above.plot(
            [one["confidence"] for one in bins], [one["accuracy"] for one in bins], marker="o", markersize=4.5,
            linewidth=1.6, color=colour, label=f"{shown_name(name)}, ECE {model['ece']:.4f}",
        )  # fmt: skip
        all_positions = sum(one["positions"] for one in bins)
        edges = [model["bins"][0]["low"], *(one["high"] for one in model["bins"])]
        shares = [one["positions"] / all_positions for one in model["bins"]]
        below.stairs(shares, edges, color=colour, linewidth=1.6, fill=len(models) == 1, alpha=0.8)
    above.set(ylabel="accuracy (share that is right)", xlim=(0, 1), ylim=(0, 1.02), title="Calibration")
    below.set(xlabel="confidence (largest probability of any token)", ylabel="share of\npositions", ylim=(0, None))
    finish(above)
    finish(below)
