"""The stages of a recipe, and the figures of those that evaluate, on a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from kdcache_cli.figures import print_comparison, print_figures

if TYPE_CHECKING:
    from rich.console import Console


def print_listed(console: Console, stages: Sequence[dict[str, Any]]) -> None:
    """Show what stages there are, and the command of each."""
    table = _table("stage", "result", "waits for")
    for stage in stages:
        table.add_row(stage["name"], "there" if stage["stands"] else "missing", ", ".join(stage["needs"]) or "nothing")
    console.print(table)
    console.print()
    for stage in stages:
        console.print(shlex.join(stage["command"]), markup=False, soft_wrap=True)


def print_run(console: Console, stages: Sequence[dict[str, Any]], evaluations: Mapping[str, dict[str, Any]]) -> None:
    """Show what was run, and what evaluations have found."""
    table = _table("stage", "command", "result", "seconds")
    for stage in stages:
        result = "made" if stage["state"] == "made" else "was there"
        table.add_row(stage["name"], stage["command"], result, f"{stage['seconds']:,.1f}")
    console.print(table)
    for name, found in evaluations.items():
        if "students" in found:
            console.print(f"\n{name}", markup=False)
            print_comparison(console, found["students"])
        elif "nll" in found:
            console.print()
            print_figures(console, name, found)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name == "seconds" else "left", overflow="fold")
    return table
