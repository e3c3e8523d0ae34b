"""Examine: all that the doctor looks at, and what is wrong with it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kdcache.doctor.access import check_access
from kdcache.doctor.machine import devices, disk_speed, extras, versions
from kdcache.doctor.self_test import run_self_test
from kdcache.pretrained import find_device

_MEGABYTES = 64
_LITTLE_ROOM = 1 << 30


def examine(
    *,
    folder: str | None = None,
    store: str | None = None,
    self_test: bool = True,
    device: str = "auto",
    on_stage: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Look at this machine.

    Args:
        folder: whose disk is measured; None for the folder of temporary files.
        store: folder or URL to which a cache is to be written; None if that is not asked.
        self_test: whether to dump, verify and train something tiny.
        device: where that runs.
        on_stage: called with what begins now.

    Returns:
        `ok`, `versions`, `extras`, `devices`, `disk`, `store` and `self_test` (None where not asked), and `problems`,
        a sentence each.

    Raises:
        ConfigError: no such device or folder.
        CacheError: the folder cannot be written.
    """
    chosen = str(find_device(device))
    found: dict[str, Any] = {"versions": versions(), "extras": extras(), "devices": devices()}
    on_stage("disk")
    found["disk"] = disk_speed(Path(folder or tempfile.gettempdir()), _MEGABYTES)
    on_stage("store")
    found["store"] = None if store is None else check_access(store)
    found["self_test"] = run_self_test(chosen, on_stage) if self_test else None
    problems = [f"{name} is not installed" for name, version in found["versions"].items() if version is None]
    free = found["disk"]["free_bytes"]
    if free is not None and free < _LITTLE_ROOM:
        problems.append(f"{found['disk']['folder']} has {free:,} bytes left")
    problems += [part["error"] for part in (found["store"], found["self_test"]) if part and not part["ok"]]
    return {"ok": not problems, **found, "problems": problems}
