"""Reading: a process of its own that opens attacked caches, and says what it cost.

Its address space ends a little above what honest caches need, so an allocation that a header asks for fails even if
its pages are never touched; the peak of its resident memory says what was touched.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache import KdcacheError, open_cache, verify_cache
from kdcache.planning.memory import peak_resident
from kdcache.report.inspect import inspect_summary

MOST_SECONDS = 10.0
"""Processor time that a reader may spend on anything hostile: milliseconds, and room for a machine that is busy."""

ROOM = 192 << 20
"""Bytes of address space above what honest caches take."""


def read_all(folder: str) -> None:
    cache = open_cache(folder)
    _ = cache.tokenizer_path
    for row in range(min(len(cache), 1000)):
        cache[row]


def inspect_all(folder: str) -> None:
    inspect_summary(folder)
    inspect_summary(folder, exact=True)


def attempt(act: Callable[[str], Any], folder: str) -> dict[str, Any]:
    """What came of it: the kind and text of the error, and the seconds of processor time."""
    began = time.process_time()
    try:
        act(folder)
    except BaseException as error:
        kind = "refused" if isinstance(error, KdcacheError) else type(error).__name__
        return {"kind": kind, "text": str(error), "seconds": time.process_time() - began}
    return {"kind": "read", "text": "", "seconds": time.process_time() - began}


def problems(folder: str) -> str:
    report = verify_cache(folder)
    return " ".join(f"{p['object']}: {p['what']}" for p in report.problems)


def main() -> None:
    honest, attacked = json.loads(sys.stdin.read())
    for folder in honest:
        read_all(folder)
        inspect_all(folder)
        assert not problems(folder)
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    before, found = peak_resident(), {}
    for name, folder in attacked.items():
        found[name] = {"read": attempt(read_all, folder), "inspect": attempt(inspect_all, folder)}
        began = time.process_time()
        try:
            found[name]["verify"] = {"kind": "done", "text": problems(folder)}
        except BaseException as error:
            kind = "refused" if isinstance(error, KdcacheError) else type(error).__name__
            found[name]["verify"] = {"kind": kind, "text": str(error)}
        found[name]["verify"]["seconds"] = time.process_time() - began
        found[name]["grown"] = peak_resident() - before
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
