"""The command `plot`: pictures of a cache, of trainings and of evaluations, and their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcache.options import option
from kdcache_cli.frame import Output

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class PlotOptions:
    """Options of `plot`."""

    what: str = option("kept-mass, selections or entropy of a cache; curves of trainings; calibration of evaluations")
    sources: list[str] = option(
        "folder or URL of the cache; for curves folders of train-student, for calibration files of evaluate --out"
    )
    out: str | None = option("new .png or .svg file for the picture; without it the numbers alone are shown", None)
    rows: int = option("rows of the cache to read, evenly spread", 128)


def plot(options: PlotOptions, output: Output) -> None:
    """Draw what a cache, trainings or evaluations say, as PNG or SVG; and show the numbers."""
    from kdcache.drawing import require_kind, style
    from kdcache.plots.open_plot import open_plot
    from kdcache.store.atomic_files import require_new

    if options.out is not None:  # before anything is read
        require_kind(options.out)
        require_new(options.out)
        with style():
            pass
    with output.progress("plot", "rows") as bar:
        made = open_plot(options.what, options.sources, options.rows, bar)
    if options.out is not None:
        made.save(options.out)

    def show(console: Console) -> None:
        _TABLES[options.what](console, made.numbers)
        if options.out is not None:
            console.print(f"\n{options.out}", markup=False, soft_wrap=True)

    output.result({"plot": options.what, "sources": options.sources, "out": options.out, **made.numbers}, show)


def _print_rows(console: Console, numbers: dict[str, Any]) -> None:
    console.print(
        f"{numbers['rows']:,} of {numbers['of_rows']:,} rows, {numbers['positions']:,} positions\n", style="dim"
    )


def _table(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for i, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if i else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _print_kept(console: Console, numbers: dict[str, Any]) -> None:
    _print_rows(console, numbers)
    lines, band = numbers["mean"], numbers["quantiles"]
    heads = ["k", *(f"kept at T = {line['temperature']:g}" for line in lines), "80% of positions"]
    rows = [
        [f"{k:,}", *(f"{line['kept_mass'][i]:.6f}" for line in lines), f"{band['0.1'][i]:.3f} - {band['0.9'][i]:.3f}"]
        for i, k in enumerate(numbers["k"])
    ]
    _table(console, heads, rows)


def _print_selections(console: Console, numbers: dict[str, Any]) -> None:
    _print_rows(console, numbers)
    rows = []
    for point in numbers["points"]:
        error = point["squared_error"]
        between = f"{error['high']:.3g}" if error["is"] != "bounds" else f"{error['low']:.3g} - {error['high']:.3g}"
        stored = "as stored" if point["selection"] == numbers["stored"] else ""
        rows.append([
            f"{point['kind']} {point['name']}", f"{point['entries_per_position']:.1f}",
            f"{point['bytes_per_position']:.1f}", between, error["is"], stored,
        ])  # fmt: skip
    _table(console, ("selection", "entries", "bytes", "squared error", "which is", ""), rows)
    console.print("\neach for one position; bytes are measured, errors computed", style="dim")
    for one in numbers["left_out"]:
        console.print(f"left out: {one['kind']}: {one['why']}", style="dim")


def _print_entropy(console: Console, numbers: dict[str, Any]) -> None:
    _print_rows(console, numbers)
    rows = [
        [
            f"{one['from']:,}" if one["from"] == one["to"] else f"{one['from']:,} - {one['to']:,}",
            f"{one['positions']:,}", f"{one['mean']:.3f}", f"{one['0.1']:.3f} - {one['0.9']:.3f}",
        ]
        for one in numbers["by_position"]
    ]  # fmt: skip
    _table(console, ("tokens read", "positions", "mean nats", "80% of positions"), rows)
    for title, key in (("surest", "surest"), ("least sure", "least_sure")):
        named = ", ".join(f"{one['document']:,} ({one['mean']:.2f})" for one in numbers[key])
        console.print(f"\n{title} of {numbers['documents']:,} documents: {named}")


def _print_curves(console: Console, numbers: dict[str, Any]) -> None:
    rows = []
    for folder, run in numbers["runs"].items():
        last = run["heldout"][-1] if run["heldout"] else {}
        figures = [f"{last[name]:.4f}" if name in last else "" for name in ("nll", "teacher_nll", "kl")]
        step = max([one["step"] for one in (*run["training"][-1:], *run["heldout"][-1:])], default=0)
        rows.append([folder, f"{step:,}", *figures, str(last.get("kl_kind", ""))])
    _table(console, ("run", "step", "held-out nll", "teacher nll", "kl", ""), rows)


def _print_calibration(console: Console, numbers: dict[str, Any]) -> None:
    for name, model in numbers["models"].items():
        console.print(f"{name}: ECE {model['ece']:.4f}", markup=False)
        rows = [
            [f"{one['low']:.3f} - {one['high']:.3f}", f"{one['positions']:,}", f"{one['confidence']:.4f}",
             f"{one['accuracy']:.4f}"]
            for one in model["bins"] if one["positions"]
        ]  # fmt: skip
        _table(console, ("confidence", "positions", "mean", "right"), rows)


_TABLES = {
    "kept-mass": _print_kept,
    "selections": _print_selections,
    "entropy": _print_entropy,
    "curves": _print_curves,
    "calibration": _print_calibration,
}
