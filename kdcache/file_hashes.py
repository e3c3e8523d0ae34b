"""File hashes: the sha256 of large files, computed once on each machine and remembered.

Guarantee: a hash is taken from memory only for a file of the same path, size, modification time and inode. One that was
modified in the last seconds is not remembered, as a second change could leave its time unchanged. Memory that is
missing, damaged, or cannot be written means hashing again, and nothing else.
A file of the Hugging Face hub's cache whose name is its sha256 is not read at all.

The memory is a folder of small files, `kdcache/sha256` in the user's cache folder (`XDG_CACHE_HOME`, or `~/.cache`).
Each is replaced whole, so any number of processes may use it at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any

from kdcache.store.atomic_files import sha256_file

_WORTH_REMEMBERING = 16 << 20
"""Bytes; what is smaller is hashed in less time than it takes to tidy up after it."""

_SETTLED = 2_000_000_000
"""Nanoseconds since the last change after which a modification time is believed."""

_SHA256 = re.compile("[0-9a-f]{64}")
_MOST_BYTES = 1 << 16


def user_cache_folder() -> Path | None:
    """Where a program may keep what it can make again, `kdcache` in the user's cache folder; None without a home."""
    named = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(named) if named else Path.home() / ".cache") / "kdcache"
    except RuntimeError:  # no home folder is known
        return None


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hexadecimal; from memory if they are known.

    Raises:
        OSError: it cannot be read.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and real.parent.parent.name.startswith("models--") and _SHA256.fullmatch(real.name):
        return real.name
    before = _identity(real)
    if before["size"] < _WORTH_REMEMBERING:
        return sha256_file(real)
    entry = _entry(real)
    known = _read(entry) if entry else {}
    if {name: known.get(name) for name in before} == before and _SHA256.fullmatch(str(known.get("sha256"))):
        return str(known["sha256"])
    found = sha256_file(real)
    if entry and _identity(real) == before and time.time_ns() - int(before["mtime_ns"]) > _SETTLED:
        _write(entry, {**before, "sha256": found})
    return found


def _identity(path: Path) -> dict[str, Any]:
    """What shows whether a file is still the same."""
    found = path.stat()
    return {
        "path": str(path), "size": found.st_size, "mtime_ns": found.st_mtime_ns, "inode": found.st_ino,
        "device": found.st_dev,
    }  # fmt: skip


def _entry(path: Path) -> Path | None:
    """Where the hash of a file is remembered; None without a cache folder."""
    folder = user_cache_folder()
    return folder and folder / "sha256" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()}.json"


def _read(entry: Path) -> dict[str, Any]:
    try:
        with entry.open("rb") as file:
            found = json.loads(file.read(_MOST_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(entry: Path, fields: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=entry.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(fields, file)
            Path(temporary).replace(entry)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
