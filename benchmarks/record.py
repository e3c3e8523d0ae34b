"""The results of a benchmark as JSON: what was measured, where, when and with which versions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch


def machine(device: str) -> dict[str, Any]:
    """Date, processor, device and versions."""
    versions = {}
    for name in ("torch", "triton", "transformers", "numba", "pyarrow"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else device,
        "python": platform.python_version(),
        "versions": versions,
    }


def write(path: str | None, device: str, settings: dict[str, Any], results: Any) -> None:
    """Write one benchmark's record, if a path is given.

    Args:
        path: of the JSON file.
        device: as torch names it.
        settings: of the benchmark.
        results: what it measured; seconds, bytes and ratios by name.
    """
    if path:
        record = {**machine(device), "settings": settings, "results": results}
        Path(path).write_text(json.dumps(record, indent=2) + "\n")
