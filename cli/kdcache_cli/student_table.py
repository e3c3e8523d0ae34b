"""How a student that was cut out of its teacher is shown in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from kdcache_cli.figures import figures_table


def print_made(console: Console, made: dict[str, Any]) -> None:
    """What was kept, and what the student is worth before any training."""
    sizes, parameters = made["sizes"], made["parameters"]
    table = Table("", "teacher", "student", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, before in sizes["teacher"].items():
        if before is not None:
            table.add_row(Text(name.replace("_", " "), style="bold"), f"{before:,}", f"{sizes['student'][name]:,}")
    table.add_row(Text("parameters", style="bold"), f"{parameters['teacher']:,}", f"{parameters['student']:,}")
    console.print(Text(f"{made['out']}: {made['class']}, cut out of {made['teacher']}"), soft_wrap=True)
    console.print(table)
    console.print(
        f"ratio {parameters['ratio']:.2f}; layers kept: {', '.join(map(str, made['layers']))}", soft_wrap=True
    )
    if made["layer_kl"]:
        first = made["layer_kl"][0]
        worth = ", ".join(f"{layer}: {'not finite' if kl is None else f'{kl:.3g}'}" for layer, kl in first.items())
        console.print(f"KL without each layer, nats: {worth}", soft_wrap=True)
    if made["heldout"] is None:
        console.print("KL to the teacher: not measured, for want of a --cache")
        return
    console.print("\nBefore any training, on held-out rows:")
    console.print(figures_table({"student": made["heldout"]}))
