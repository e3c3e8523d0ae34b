"""Access: whether a cache could be written to a place and read from there.

A small object is put, put again (which must be refused: commits depend on it), read, and deleted.
"""

from __future__ import annotations

import secrets
import time
from typing import Any

from kdcache.errors import KdcacheError, one_line
from kdcache.store.open_storage import open_storage

_DATA = b"kdcache doctor"


def check_access(url: str) -> dict[str, Any]:
    """Try a folder or URL.

    Returns:
        `url`, `ok`, `seconds`, and `error`, a sentence, where it is not.
    """
    started, name = time.perf_counter(), f"kdcache-doctor-{secrets.token_hex(6)}"
    try:
        error = _try(url, name)
    except KdcacheError as refused:
        error = str(refused)
    except Exception as failed:  # of whatever library speaks to the place
        error = f"{url} cannot be used: {one_line(failed)}"
    return {"url": url, "ok": error is None, "seconds": time.perf_counter() - started, "error": error}


def _try(url: str, name: str) -> str | None:
    """What is wrong; None if nothing is."""
    storage = open_storage(url)
    if not storage.create(name, _DATA):
        return f"{url} says that an object with a random name exists already"
    try:
        if storage.create(name, b"another"):
            return f"{url} lets a second put replace an object, so two workers could overwrite each other"
        if storage.read(name, 1 << 10) != _DATA:
            return f"{url} gives back other bytes than were put"
    finally:
        storage.delete_object(name)
    return None
