"""How figures of students and their next tokens are shown in a terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

_BEST = {
    "nll": min, "delta_nll": min, "kl": min, "top1_agreement": max, "ece": min, "dense_kl": min,
    "dense_top1_agreement": max, "acceptance": max, "bits_per_byte": min,
}  # fmt: skip
"""Which value of a row is the best: the least or the largest."""

_ROWS = (
    "nll", "teacher_nll", "delta_nll", "kl", "top1_agreement", "dense_kl", "dense_top1_agreement", "acceptance",
    "acceptance_bounds", "ece", "teacher_ece", "nll_difference", "bits_per_byte",
    "teacher_bits_per_byte", "aligned_bytes", "tokens_per_chunk", "positions", "targets",
)  # fmt: skip
_OF_TEACHER = ("teacher_nll", "delta_nll")
"""Figures that may be unknown in a cache that has targets."""

_WIDTH = 24


def figures_table(columns: dict[str, dict[str, Any]], mark_best: bool = False) -> Table:
    """Figures of one or several students, one column for each; `mark_best` puts a star at the best of each row."""
    table = Table("", box=None, pad_edge=False)
    for name in columns:
        table.add_column(Text(name))  # a name may hold brackets, which would be markup
    for name in _ROWS:
        cells = [_cell(name, figures) for figures in columns.values()]
        if any(cells):
            best = _best(name, columns) if mark_best else None
            marked = [
                Text(f"{cell} *", style="bold")
                if cell and best is not None and figures.get(name) == best
                else Text(cell)
                for cell, figures in zip(cells, columns.values(), strict=True)
            ]
            table.add_row(_label(name, columns), *marked)
    return table


def _label(name: str, columns: dict[str, dict[str, Any]]) -> str:
    if name == "kl":
        kinds = {figures.get("kl_kind") for figures in columns.values()} - {None}
        return f"kl ({', '.join(sorted(map(str, kinds)))})" if kinds else name
    if name == "nll_difference":
        return f"nll minus that of {next(iter(columns))}"
    return name.replace("_", " ")


def _cell(name: str, figures: dict[str, Any]) -> str:
    if name == "acceptance_bounds":  # only where the rate itself is unknown
        low, high = figures.get("acceptance_low"), figures.get("acceptance_high")
        known = figures.get("acceptance") is not None or low is None or high is None
        return "" if known else f"{low:.4f} - {high:.4f}"
    value = figures.get(name)
    if value is None:
        return "unknown" if name in _OF_TEACHER and name in figures and figures.get("targets") else ""
    if name == "nll_difference":
        error = figures["nll_difference_standard_error"]
        return f"{value:+.4f}" + ("" if error is None else f" ± {error:.4f}")
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _best(name: str, columns: dict[str, dict[str, Any]]) -> float | None:
    values = [figures.get(name) for figures in columns.values()]
    known = [value for value in values if value is not None and math.isfinite(value)]
    return _BEST[name](known) if name in _BEST and known else None


def print_figures(console: Console, student: str, figures: dict[str, Any]) -> None:
    """Figures of one student, and the bins of its calibration."""
    console.print(figures_table({student: figures}))
    _print_whole_logits(console, {student: figures})
    table = Table("confidence", "positions", "mean", "right", "", box=None, pad_edge=False)
    for part in figures["calibration"]["bins"]:
        if part["positions"]:
            table.add_row(
                f"{part['low']:.3f} - {part['high']:.3f}", f"{part['positions']:,}", f"{part['confidence']:.4f}",
                f"{part['accuracy']:.4f}", bar(part["positions"] / figures["positions"]),
            )  # fmt: skip
    console.print()
    console.print(table)


def print_comparison(console: Console, students: dict[str, dict[str, Any]]) -> None:
    """Figures of several students, one column for each."""
    columns = dict(zip(_short(list(students)), students.values(), strict=True))
    console.print(figures_table(columns, mark_best=True))
    console.print("* best of its row   ± standard error of the paired difference")
    _print_whole_logits(console, columns)


def _print_whole_logits(console: Console, columns: dict[str, dict[str, Any]]) -> None:
    """Say which students needed more memory than the others."""
    if whole := [name for name, figures in columns.items() if figures["logits"] == "whole"]:
        names = ", ".join(whole)
        console.print(Text(f"logits of {names} were made whole, not in tiles: this output head is not known"))


def print_next_tokens(console: Console, answer: dict[str, Any]) -> None:
    """The most likely next tokens of a teacher and of students, one column for each."""
    teacher = answer["teacher"]
    names = _short(list(answer["students"]))
    columns = dict(zip(names, (s["entries"] for s in answer["students"].values()), strict=True))
    if teacher["source"] is not None:
        columns = {f"teacher ({teacher['source']})": teacher["entries"], **columns}
    console.print(Text.assemble(("prompt  ", "bold"), repr(answer["prompt"])))
    console.print(Text.assemble(("tokens  ", "bold"), " ".join(repr(t["text"]) for t in answer["tokens"])))
    if teacher["source"] is None:
        console.print("the cache holds no piece that begins with this prompt; use --teacher to run the teacher itself")
    elif teacher["source"] == "cache":
        sampled = (
            f"; sampled at T = {teacher['temperature']:g}, so its probabilities are estimates"
            if teacher["sampled"]
            else ""
        )
        console.print(f"the teacher as stored in row {teacher['row']}, position {teacher['position']}{sampled}")
    if teacher["told"] is not None:
        console.print(Text.assemble(("told    ", "bold"), repr(teacher["told"]), " (the teacher alone)"))
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(Text(name))
        table.add_column("", justify="right")
    first = columns[next(iter(columns))]
    for rank in range(max(map(len, columns.values()))):
        cells = []
        for entries in columns.values():
            if rank < len(entries):
                entry = entries[rank]
                style = "bold" if first and entry["id"] == first[0]["id"] else ""
                cells += [Text(repr(entry["text"]), style=style), Text(f"{entry['probability']:.4f}", style=style)]
            else:
                cells += [Text(""), Text("")]
        table.add_row(*cells)
    console.print()
    console.print(table)


def bar(share: float) -> str:
    """A bar for a share between 0 and 1."""
    return "█" * round(share * _WIDTH) or ("▏" if share > 0 else "")


def _short(names: list[str]) -> list[str]:
    """The last parts of each path, as few as make them different."""
    parts = [Path(name).parts for name in names]
    for count in range(1, max(map(len, parts))):
        short = ["/".join(p[-count:]) for p in parts]
        if len(set(short)) == len(names):
            return short
    return names
