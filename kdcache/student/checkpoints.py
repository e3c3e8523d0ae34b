"""Checkpoints that exist whole or not at all.

A checkpoint is written into a staging folder, flushed to the device, and renamed last; a run
that is killed while writing one leaves a staging folder, which nothing reads and the next
checkpoint clears.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from kdcache.store.durable import sync_folder

STAGING = "checkpoint.partial"
_NAME = re.compile(r"checkpoint-(\d+)")


def complete(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [(int(m[1]), p) for p in out.glob("checkpoint-*") if (m := _NAME.fullmatch(p.name)) and p.is_dir()]
    return [path for _, path in sorted(found)]


def promote(staging: Path, out: Path, keep: int) -> None:
    """Give a staged checkpoint its place, then forget all but the newest `keep`."""
    (written,) = complete(staging)
    for folder, _, names in os.walk(written):
        for name in names:
            with (Path(folder) / name).open("rb") as file:
                os.fsync(file.fileno())
        sync_folder(Path(folder))
    place = out / written.name
    if place.exists():  # the same step, made again after a resume from an older checkpoint
        shutil.rmtree(place)
    written.rename(place)
    sync_folder(out)
    for old in complete(out)[:-keep]:
        shutil.rmtree(old)
