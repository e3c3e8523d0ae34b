"""Machine: versions, cores, memory, devices, and how fast a disk is. Nothing here needs a network."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

from kdcache import __version__
from kdcache.errors import ConfigError
from kdcache.planning.memory import room
from kdcache.store.atomic_files import storage_errors, temporary_name
from kdcache.teacher.engines.free_memory import free_memory
from kdcache.worker import available_cores

_PACKAGES = (
    "torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors", "pyarrow", "zarr", "numcodecs",
    "numba", "numpy", "fsspec",
)  # fmt: skip
_EXTRAS = {
    "plots": "matplotlib", "s3": "s3fs", "lora": "peft", "gguf": "gguf", "ray": "ray", "vllm": "vllm",
    "triton": "triton",
}  # fmt: skip
_CHUNK = 1 << 22


def versions() -> dict[str, str | None]:
    """Of Python, kdcache and what it needs; None where something is not installed."""
    return {
        "python": platform.python_version(), "kdcache": __version__, **{name: _version(name) for name in _PACKAGES}
    }  # fmt: skip


def extras() -> dict[str, str | None]:
    """Version of the package behind each extra; None where it is not installed."""
    return {name: _version(package) for name, package in _EXTRAS.items()}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices() -> list[dict[str, Any]]:
    """The CPU, and each GPU: `name`, `kind`, `bytes` and `free_bytes` of memory; of the CPU `cores`."""
    cpu = torch.device("cpu")
    found: list[dict[str, Any]] = [
        {
            "name": platform.processor() or platform.machine(), "kind": "cpu", "cores": available_cores(),
            "bytes": room(cpu), "free_bytes": free_memory(),
        }
    ]  # fmt: skip
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(number)
        name = torch.cuda.get_device_name(number)
        found.append({"name": name, "kind": f"cuda:{number}", "bytes": total, "free_bytes": free})
    if torch.backends.mps.is_available():
        found.append({"name": "Apple GPU", "kind": "mps", "bytes": room(cpu), "free_bytes": free_memory()})
    return found


def disk_speed(folder: Path, megabytes: int) -> dict[str, Any]:
    """How fast a file is written, flushed to the device and read again, and how much room is left.

    What is read may come from memory: the time of a cold read is only known where the system can drop it.

    Args:
        folder: where; it must exist.
        megabytes: size of the file, which is deleted afterwards.

    Raises:
        ConfigError: there is no such folder.
        CacheError: it cannot be written.
    """
    if not folder.is_dir():
        raise ConfigError(f"folder is {folder}, which does not exist")
    path, data, chunks = temporary_name(folder / "doctor"), os.urandom(_CHUNK), max(1, (megabytes << 20) // _CHUNK)
    try:
        with storage_errors(folder):
            started = time.perf_counter()
            with path.open("xb") as file:
                for _ in range(chunks):
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
                written = time.perf_counter() - started
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            started = time.perf_counter()
            with path.open("rb", buffering=0) as file:
                while file.read(_CHUNK):
                    pass
            read = time.perf_counter() - started
            space = os.statvfs(folder) if hasattr(os, "statvfs") else None
    finally:
        path.unlink(missing_ok=True)
    size = chunks * _CHUNK
    return {
        "folder": str(folder), "bytes": size, "write_bytes_per_second": size / written,
        "read_bytes_per_second": size / read, "free_bytes": space.f_bavail * space.f_frsize if space else None,
    }  # fmt: skip
