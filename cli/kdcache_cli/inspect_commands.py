"""The commands that look into a cache: `inspect-shard` in the terminal or as a page, `explore` in a browser."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kdcache.options import option
from kdcache_cli.frame import Output

if TYPE_CHECKING:
    from rich.console import Console

    from kdcache.explorer.explorer import Explorer


@dataclass(frozen=True, kw_only=True)
class InspectOptions:
    """Options of `inspect-shard`."""

    cache: str = option("folder or URL of the cache")
    shard: int | None = option("show this shard; --row then counts inside it", None)
    row: int | None = option("show one row as text", None)
    position: int | None = option("show the entries of one position of the row", None)
    next: bool = option("show the row after --row, or the position with a target after --position", False)
    previous: bool = option("the same, before it", False)
    csv: bool = option("print a table of comma-separated values on stdout; texts are JSON strings", False)
    top: int = option("how many entries to show", 10)
    temperature: float = option("temperature of the probabilities shown", 1.0)
    exact: bool = option("compute the summary from every row instead of from the sums in the commits", False)
    html: str | None = option("write a page for a browser into this new file instead", None)
    rows: int = option("rows of --html, evenly spread over the cache or the shard", 50)
    entries: int = option("most entries of a position that --html shows", 24)
    compare: str | None = option("a student, or another teacher's cache, to lay beside the cache in --html", None)
    device: str = option("where the student of --compare runs: auto, cpu, cuda or mps", "auto")


def inspect_shard(options: InspectOptions, output: Output) -> None:
    """Show what a cache, a shard, a row or a position holds, in the terminal or as a page."""
    from kdcache.errors import ConfigError
    from kdcache.report.inspect import inspect_position, inspect_row, inspect_summary
    from kdcache_cli import tables

    if options.html is not None:
        _write_page(options, output)
        return
    if options.compare is not None:
        raise ConfigError("compare is for a page, so it needs --html")
    if options.position is not None and options.row is None:
        raise ConfigError("--position needs --row")
    if options.exact and options.row is not None:
        raise ConfigError("--exact is for a summary, so it does not go with --row")
    if options.top < 1:
        raise ConfigError(f"--top is {options.top}, but must be at least 1")
    if options.csv and output.json:
        raise ConfigError("--csv and --json exclude each other")
    number, position = _place(options)
    found: dict[str, Any]
    if number is None:
        with output.progress("inspect", "rows") as bar:
            found = inspect_summary(options.cache, options.shard, exact=options.exact, on_progress=bar)
        show: Callable[[Console], None] = lambda console: console.print(tables.summary_table(found))  # noqa: E731
    elif position is None:
        found = inspect_row(options.cache, number, options.shard)
        show = functools.partial(tables.print_row, row=found)
    else:
        found = inspect_position(options.cache, number, position, options.shard, options.top, options.temperature)
        show = functools.partial(tables.print_position, at=found)
    if options.csv:
        from kdcache_cli.csv_table import print_csv

        print_csv(found)
    else:
        output.result(found, show)


def _place(options: InspectOptions) -> tuple[int | None, int | None]:
    """The row and the position to show."""
    from kdcache.errors import ConfigError
    from kdcache.report.inspect import beside

    if not options.next and not options.previous:
        return options.row, options.position
    if options.next and options.previous:
        raise ConfigError("--next and --previous exclude each other")
    if options.row is None:
        raise ConfigError(f"--{'next' if options.next else 'previous'} needs --row")
    step = 1 if options.next else -1
    return beside(options.cache, options.row, options.position, options.shard, step)


def _write_page(options: InspectOptions, output: Output) -> None:
    """Write the page of `--html`, and say what it holds."""
    from kdcache.errors import ConfigError
    from kdcache.explorer.explorer import Explorer
    from kdcache.explorer.page import write_page
    from kdcache.store.atomic_files import require_new

    if options.position is not None or options.exact or options.csv or options.next or options.previous:
        raise ConfigError("--html shows whole rows, so it excludes --position, --exact, --csv, --next and --previous")
    require_new(str(options.html))
    explorer = Explorer(
        options.cache, shard=options.shard, compare=options.compare, top=options.entries, device=options.device
    )
    with output.progress("page", "rows") as bar:
        page = write_page(explorer, _rows_of(explorer, options), str(options.html), bar)
    output.result(
        page,
        lambda console: console.print(
            f"{page['html']}: {page['rows']:,} rows, {page['bytes']:,} bytes; open it in a browser", markup=False
        ),
    )


def _rows_of(explorer: Explorer, options: InspectOptions) -> Sequence[int]:
    """The rows that a page is to show: the one that is named, or as many as are asked for."""
    from kdcache.errors import CacheError

    if options.row is None:
        return explorer.spread(options.rows)
    if not 0 <= options.row < len(explorer.rows):
        raise CacheError(f"{options.cache} has rows 0 to {len(explorer.rows) - 1}, not {options.row}")
    return [explorer.rows[options.row]]


@dataclass(frozen=True, kw_only=True)
class ExploreOptions:
    """Options of `explore`."""

    cache: str = option("folder or URL of the cache")
    shard: int | None = option("show the rows of this shard alone", None)
    entries: int = option("most entries of a position to show", 24)
    compare: str | None = option("a student, or another teacher's cache, to lay beside the cache", None)
    device: str = option("where the student of --compare runs: auto, cpu, cuda or mps", "auto")
    port: int = option("port of this machine to listen on; 0 takes a free one", 0)
    open: bool = option("open the page in the browser", True)


def explore(options: ExploreOptions, output: Output) -> None:
    """Look at a whole cache in the browser; rows are read as they are looked at. Ctrl-C ends it."""
    import webbrowser

    from kdcache.explorer.explorer import Explorer
    from kdcache.explorer.server import ExplorerServer

    explorer = Explorer(
        options.cache, shard=options.shard, compare=options.compare, top=options.entries, device=options.device
    )
    with ExplorerServer(explorer, options.port) as server:
        output.result(
            {"url": server.url, "rows": len(explorer.rows)},
            lambda console: console.print(f"{server.url} shows {len(explorer.rows):,} rows; Ctrl-C ends it"),
        )
        sys.stdout.flush()
        if options.open:
            webbrowser.open(server.url)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
