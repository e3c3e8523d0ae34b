"""Export: a cache as the files of another tool, or as plain tables.

Row by row, so memory does not grow with the cache. What is written appears as a whole when it is done, and never
replaces anything: a path that is taken is refused, and an export that was stopped leaves nothing and begins again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache.cache import open_cache
from kdcache.errors import CacheError, ConfigError
from kdcache.interop.formats import WRITTEN, find_format
from kdcache.store.atomic_files import sweep


def export(
    cache: str | os.PathLike[str],
    out: str | os.PathLike[str],
    as_: str,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Write a cache in another format.

    Args:
        cache: folder or URL of the cache; it must be complete.
        out: the new file, or folder, on this machine.
        as_: the format, one of `formats.WRITTEN`.
        on_progress: called with (rows done, rows to do).

    Returns:
        `out`, `as`, `rows`, `positions`, `entries`, `bytes`, `seconds`, and `lost`: what the format cannot hold.

    Raises:
        ConfigError: another format, a URL, or a cache that the format cannot hold at all.
        CacheError: the path is taken, or cannot be written.
        KdcacheError: see the exception tree.
    """
    started = time.perf_counter()
    form = find_format(as_, WRITTEN)
    if "://" in str(out):
        raise ConfigError(f"out is {out}, but an export writes to a local file or folder; copy it from there")
    place = Path(out)
    if place.exists():
        raise CacheError(f"{out} exists; an export replaces nothing, so name another path or delete it")
    source = open_cache(cache)
    rows = len(source)
    lost = form.lost_of(source.manifest)
    sweep(place.parent)
    form.write(source, place, lambda done: on_progress(done, rows) if on_progress else None)
    return {
        "out": str(out), "as": as_, "rows": rows,
        **{name: source.commits.total(name) for name in ("positions", "entries")},
        "bytes": _bytes(place), "seconds": time.perf_counter() - started, "lost": lost,
    }  # fmt: skip


def _bytes(place: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [place] if place.is_file() else [path for path in place.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files)
