"""Tints: by what a token is tinted, from which values on, and in which colours; for the page and for notebooks.

A token is tinted by what the teacher said of it, one slot earlier: by the target whose true next token it is. There are
eight levels, each from a value on; below the first there is no tint.
"""

from __future__ import annotations

import bisect
from typing import Any

TINTS: dict[str, dict[str, Any]] = {
    "surprise": {
        "title": "Surprise",
        "unit": "nats",
        "steps": [0.1, 0.5, 1, 2, 3, 4.5, 6, 8],
        "about": "−log of the probability that the teacher gave the token",
        "hue": "226 116 28",
    },
    "entropy": {
        "title": "Entropy",
        "unit": "nats",
        "steps": [0.1, 0.4, 0.8, 1.4, 2, 2.8, 3.8, 5],
        "about": "of the teacher's distribution: how unsure it was",
        "hue": "22 128 178",
    },
    "tail": {
        "title": "Tail",
        "unit": "",
        "steps": [0.001, 0.005, 0.01, 0.03, 0.07, 0.15, 0.3, 0.5],
        "about": "mass that is not kept, at the chosen T and number of entries",
        "hue": "130 84 200",
    },
    "kl": {
        "title": "KL",
        "unit": "nats",
        "steps": [0.01, 0.03, 0.07, 0.15, 0.3, 0.6, 1.2, 2.5],
        "about": "from the teacher to what it is compared with",
        "hue": "206 48 98",
    },
}

SHADES = (0.07, 0.14, 0.21, 0.28, 0.36, 0.44, 0.52, 0.6)
"""How opaque each level is."""


def level_of(tint: str, value: float) -> int:
    """The level of a value, 0 to 8."""
    return bisect.bisect_right(TINTS[tint]["steps"], value)


def colour(tint: str, level: int) -> str:
    """The colour of a level from 1 on, as CSS writes it; it is see-through, for a light and a dark ground."""
    return f"rgb({TINTS[tint]['hue']} / {SHADES[level - 1]})"


def style_of_page() -> str:
    """CSS of the page: the classes `t1` to `t8`, coloured by the tint that the body names."""
    hues = [f'[data-tint="{name}"] {{ --hue: {tint["hue"]}; }}' for name, tint in TINTS.items()]
    levels = [f".t{level} {{ background: rgb(var(--hue) / {shade}); }}" for level, shade in enumerate(SHADES, 1)]
    return "\n".join([*hues, *levels])
