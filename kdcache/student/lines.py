"""Lines: a file of JSON lines, each of a step, that a run appends to and cuts back where a checkpoint stands."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def cut(path: Path, step: int) -> None:
    """Drop the lines after a step: they will be written again."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        path.write_text("".join(line + "\n" for line in lines))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the last line of a run that was killed may be half a line
        return math.inf
