"""How the status of a dump is shown in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

_SHOWN = 40
"""Lines of each list."""


def watch_in(console: Console, looks: Iterator[dict[str, Any]]) -> None:
    """Show one look after another: redrawn on a terminal, elsewhere a line whenever it says something else."""
    if not console.is_terminal:
        last = ""
        for found in looks:
            if (line := headline(found)) != last:
                console.print(line, markup=False, soft_wrap=True)
                last = line
        return
    with Live(console=console, auto_refresh=False) as live:
        for found in looks:
            live.update(status_view(found), refresh=True)


def headline(found: dict[str, Any]) -> str:
    """The state of a dump in one line."""
    shards = found["shards"]
    if found["complete"]:
        return f"{found['cache']}: complete, {shards['planned']:,} shards"
    parts = [f"{shards[state]:,} {state}" for state in ("running", "silent", "failed", "waiting") if shards[state]]
    left = "" if found["seconds_left"] is None else f"; {duration(found['seconds_left'])} left"
    return (
        f"{found['cache']}: {shards['committed']:,} of {shards['planned']:,} shards committed "
        f"({found['share']:.1%} of the work), {', '.join(parts)}{left}"
    )


def status_view(found: dict[str, Any]) -> RenderableType:
    """The state of a dump, who works on it, and what went wrong."""
    parts: list[RenderableType] = [Text(headline(found))]
    if found["complete"]:
        return parts[0]
    parts += [Text(line) for line in _rates(found)]
    if found["running"]:
        parts.append(_running(found))
    lines = [
        f"shard {maker['shard']:,}: no sign of {_who(maker)} for {duration(maker['last_sign_seconds'])}"
        for maker in found["silent"]
    ]
    lines += [
        f"shard {maker['shard']:,} failed at {maker['at']} in {_who(maker)}: {maker['reason']}"
        for maker in found["failed"]
    ]
    lines += [one["what"] for one in found["unreadable"]]
    hidden = max(0, len(found["running"]) - _SHOWN) + max(0, len(lines) - _SHOWN)
    parts += [Text(line) for line in lines[:_SHOWN]]
    if hidden:
        parts.append(Text(f"and {hidden:,} more; --json has them all"))
    return Group(*parts)


def _running(found: dict[str, Any]) -> Table:
    """A line for each worker that runs; columns that are empty are left out."""
    columns: dict[str, list[str]] = {
        name: [] for name in ("shard", "worker", "process", "job", "for", "done", "positions/s", "last sign", "note")
    }
    for maker in found["running"][:_SHOWN]:
        cells = (
            f"{maker['shard']:,}",
            maker["worker"],
            _process(maker),
            maker["job"],
            duration(maker["seconds"]),
            "" if maker["share"] is None else f"{maker['share']:.0%}",
            f"{maker['positions_per_second']:,.0f}",
            f"{duration(maker['last_sign_seconds'])} ago",
            "straggler" if maker["shard"] in found["stragglers"] else "",
        )
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table(box=None, pad_edge=False)
    for name in kept:
        table.add_column(name, justify="left" if name in ("worker", "process", "job", "note") else "right")
    for cells in zip(*kept.values(), strict=True):
        table.add_row(*map(Text, cells))
    return table


def _rates(found: dict[str, Any]) -> Iterator[str]:
    rate = found["rate"]
    if rate["shards_per_hour"] is not None:
        yield f"{rate['shards_per_hour']:,.1f} shards an hour, {rate['positions_per_second']:,.0f} positions/s"
    if found["last_commit_seconds"] is not None:
        yield f"last commit {duration(found['last_commit_seconds'])} ago"


def _process(maker: dict[str, Any]) -> str:
    return f"{maker['host']}:{maker['pid']}"


def _who(maker: dict[str, Any]) -> str:
    """A worker in one sentence."""
    named = [f"worker {maker['worker']}" if maker["worker"] else "", f"process {_process(maker)}", maker["job"]]
    return ", ".join(part for part in named if part)


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:,.0f} days"
