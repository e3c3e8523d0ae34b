"""Draws the pictures of docs/concepts.md: `python docs/site/draw.py` writes docs/pictures/*.svg.

Every bar is computed here, from one teacher with a vocabulary of eight words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from xml.sax.saxutils import escape

FOLDER = Path(__file__).parents[1] / "pictures"

WORDS = ("dog", "cat", "bird", "fish", "frog", "bear", "fox", "owl")
TEACHER = (0.42, 0.20, 0.12, 0.08, 0.06, 0.05, 0.04, 0.03)
"""p of the next word, after “The girl had a little”."""
KEPT = 3

INK, GREY, LIGHT, KEEP, TAIL, WRONG = "#1f2328", "#57606a", "#d0d7de", "#0969da", "#8c959f", "#cf222e"
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"


class Drawing:
    """A picture of so many pixels, on white, so that it is readable on a dark page too.

    Args:
        words: what it shows, for those who do not see it.
    """

    def __init__(self, width: int, height: int, words: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'aria-label="{escape(words)}" font-family="{FONT}">',
            '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="{GREY}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>',
        ]

    def text(
        self, x: float, y: float, words: str, size: int = 14, fill: str = INK, anchor: str = "start", bold: bool = False
    ) -> None:
        """Words, their baseline at y."""
        weight = ' font-weight="600"' if bold else ""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>'
            f"{escape(words)}</text>"
        )

    def box(self, x: float, y: float, width: float, height: float, fill: str, line: str = "none", r: int = 2) -> None:
        """A rectangle."""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{r}" fill="{fill}" stroke="{line}"/>'
        )

    def arrow(self, x: float, y: float, to_x: float, to_y: float) -> None:
        """A line with a head."""
        self._parts.append(
            f'<path d="M{x:g} {y:g} L{to_x:g} {to_y:g}" stroke="{GREY}" stroke-width="1.6" marker-end="url(#a)"/>'
        )

    def bars(
        self, x: float, y: float, values: Sequence[float], names: Sequence[str], colours: Sequence[str], scale: float
    ) -> None:
        """Upright bars on the line y, `scale` pixels for a probability of 1, each with its value and its name."""
        for i, (value, name, colour) in enumerate(zip(values, names, colours, strict=True)):
            left = x + 37 * i
            self.box(left, y - scale * value, 28, max(1.0, scale * value), colour)
            self.text(left + 14, y - scale * value - 5, f"{value:.2f}".lstrip("0"), 11, GREY, "middle")
            self.text(left + 14, y + 16, name, 12, INK, "middle")

    def write(self, name: str) -> None:
        """Into the folder of pictures."""
        (FOLDER / f"{name}.svg").write_text("\n".join([*self._parts, "</svg>", ""]), encoding="utf-8")


def softened(p: Sequence[float], temperature: float) -> list[float]:
    """p at a temperature."""
    powers = [value ** (1 / temperature) for value in p]
    return [power / sum(powers) for power in powers]


def flow() -> None:
    """What runs once, and what runs as often as you like."""
    d = Drawing(
        940, 250, "A corpus and a teacher make a cache, once; students learn from the cache, any number of times"
    )
    d.box(14, 44, 560, 192, "#ddf4ff", r=10)
    d.box(590, 44, 336, 192, "#dafbe1", r=10)
    d.text(26, 30, "once: dump-teacher", 15, "#0550ae", bold=True)
    d.text(602, 30, "as often as you like: train-student", 15, "#116329", bold=True)
    steps = (("corpus", "documents, chats"), ("rows", "tokens, packed"), ("teacher", "one forward pass"),
             ("cache", "k entries and a tail"))  # fmt: skip
    for i, (name, what) in enumerate(steps):
        x = 28 + 137 * i
        d.box(x, 98, 120, 76, "#ffffff", GREY, 8)
        d.text(x + 60, 132, name, 16, anchor="middle", bold=True)
        d.text(x + 60, 154, what, 11, GREY, "middle")
        if i:
            d.arrow(x - 16, 136, x - 1, 136)
    for i, name in enumerate(("student of 6 layers", "student of 12 layers", "another loss, another T")):
        y = 66 + 54 * i
        d.box(668, y, 244, 42, "#ffffff", GREY, 8)
        d.text(790, y + 26, name, 14, anchor="middle")
        d.arrow(560, 136, 666, y + 21)
    d.write("flow")


def temperature() -> None:
    """What a temperature does to the entries, and to the tail."""
    d = Drawing(
        940, 290, "The same distribution at T = 1 and T = 2: at T = 2 the tail is larger, and is no power of the other"
    )
    tails = []
    for i, t in enumerate((1, 2)):
        p, x = softened(TEACHER, t), 24 + 330 * i
        d.text(x, 30, f"T = {t}", 16, bold=True)
        d.bars(x, 240, p, WORDS, [KEEP] * KEPT + [TAIL] * (len(p) - KEPT), 420)
        tails.append(sum(p[KEPT:]))
        d.text(x, 278, f"kept: {sum(p[:KEPT]):.2f}", 13, KEEP, bold=True)
        d.text(x + 110, 278, f"tail: {tails[-1]:.2f}", 13, GREY, bold=True)
    d.text(700, 76, "The tail at T = 2", 16, bold=True)
    as_one = [sum(TEACHER[KEPT:]) ** 0.5, *(p**0.5 for p in TEACHER[:KEPT])]
    d.text(700, 104, f"summed over its words: {tails[1]:.2f}", 14)
    d.text(700, 132, f"softened as one number: {as_one[0] / sum(as_one):.2f}", 14, WRONG)
    d.text(700, 168, "A tail is a sum of many words, and", 13, GREY)
    d.text(700, 186, "one number cannot say what each", 13, GREY)
    d.text(700, 204, "becomes at another T. So a cache", 13, GREY)
    d.text(700, 222, "stores the tail at each T you name.", 13, GREY)
    d.write("temperature")


def bias() -> None:
    """What students learn from the largest entries alone, and from draws."""
    d = Drawing(
        940,
        300,
        "Top-k renormalised teaches the kept words too high and the others as zero; draws are right on average",
    )
    rest = sum(TEACHER[KEPT:])
    draws = drawn(40_000, 3)
    panels = (
        ("what the teacher says", TEACHER, [KEEP] * 8, "all of it"),
        ("top 3, made to sum to 1", [v / (1 - rest) if i < KEPT else 0 for i, v in enumerate(TEACHER)],
         [WRONG] * 8, "biased: the optimum of every student is wrong"),
        ("3 draws, mean of 40,000 positions", draws,
         ["#1a7f37"] * 8, "unbiased: rough each time, exact in the mean"),
    )  # fmt: skip
    for i, (title, values, colours, verdict) in enumerate(panels):
        x = 18 + 311 * i
        d.text(x, 30, title, 15, bold=True)
        d.bars(x, 240, values, WORDS, colours, 330)
        d.text(x, 284, verdict, 13, GREY)
    d.write("bias")


def drawn(positions: int, draws: int) -> list[float]:
    """The mean target of so many positions, of so many draws each."""
    rng = random.Random(1)
    found = rng.choices(range(len(TEACHER)), TEACHER, k=positions * draws)
    return [found.count(i) / len(found) for i in range(len(TEACHER))]


def tail() -> None:
    """What a tail is, on both sides."""
    d = Drawing(940, 250, "Teacher and student as bars of length 1: the kept words, and the tail as one outcome more")
    student = softened(TEACHER, 1.6)
    d.text(
        24, 30, "Each bar is all of the probability: the kept words, and the tail as one outcome more", 15, bold=True
    )
    for name, p, y in (("teacher", TEACHER, 62), ("student", student, 140)):
        d.text(24, y + 30, name, 14)
        x = 100.0
        for word, value in [*zip(WORDS[:KEPT], p[:KEPT], strict=True), ("tail", sum(p[KEPT:]))]:
            width, kept = 800 * value, word != "tail"
            d.box(x, y, width - 3, 48, KEEP if kept else LIGHT, r=3)
            d.text(x + width / 2, y + 22, word, 13, "#ffffff" if kept else INK, "middle", bold=True)
            d.text(x + width / 2, y + 39, f"{value:.2f}", 12, "#ffffff" if kept else INK, "middle")
            x += width
    d.text(
        100,
        222,
        "The loss compares outcome by outcome. How the tail is split among its words is not known, and not taught.",
        13,
        GREY,
    )
    d.write("tail")


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for draw in (flow, temperature, bias, tail):
        draw()
