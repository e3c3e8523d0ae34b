"""Evaluation record: an evaluation as one file that says of what it is.

{"command", "options", "cache_sha256", "teacher_sha256", "versions", "figures"}
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdcache.errors import ConfigError
from kdcache.pretrained import find_device
from kdcache.store.durable import write_new
from kdcache.store.manifest import Manifest
from kdcache.store.places import open_place
from kdcache.student.run_record import versions


def require_new(path: str) -> None:
    """Refuse a file that exists, before anything is measured.

    Raises:
        ConfigError: it does.
    """
    if Path(path).exists():
        raise ConfigError(f"--out {path} exists already; choose another name")


def write_evaluation(path: str, options: dict[str, Any], figures: dict[str, Any]) -> None:
    """Write an evaluation into a new file.

    Args:
        path: of the file; folders on the way are made.
        options: of the command, `cache` and `device` among them.
        figures: what `--json` prints.

    Raises:
        ConfigError: the file has come into being since.
        CacheError: it cannot be written.
    """
    manifest = Manifest.read(open_place(options["cache"]))
    record = {
        "command": "evaluate",
        "options": {**options, "device": str(find_device(options["device"]))},
        "cache_sha256": manifest.sha256,
        "teacher_sha256": manifest.teacher_sha256,
        "versions": versions(),
        "figures": figures,
    }
    if not write_new(Path(path), (json.dumps(record, indent=2) + "\n").encode()):
        require_new(path)
