"""Open storage: from a path or URL that a user gives to a `Storage`."""

from __future__ import annotations

import os

from kdcache.errors import ConfigError
from kdcache.store.local import LocalStorage
from kdcache.store.storage import Storage


def open_storage(path: str | os.PathLike[str]) -> Storage:
    """The storage that a path or URL names.

    Args:
        path: a folder, or any URL that fsspec knows.

    Raises:
        ConfigError: a URL that cannot be used.
    """
    text = os.fspath(path)
    if text.startswith("file://") or "://" not in text:
        return LocalStorage(text.removeprefix("file://"))
    from kdcache.store.remote import RemoteStorage

    return RemoteStorage(text)


def mirror(storage: Storage, cache: str, folder: str | os.PathLike[str], limit: int) -> Storage:
    """The same storage, read through local copies.

    Args:
        storage: of a cache at a URL.
        cache: the checksum of its manifest.
        folder: of the copies, which several caches and processes may share.
        limit: bytes that all copies in it hold together at most.

    Raises:
        ConfigError: the storage is a folder itself.
    """
    if not storage.remote:
        raise ConfigError(f"local_copy is for a cache at a URL, but {storage} is a folder")
    from kdcache.store.mirror import MirroredStorage

    return MirroredStorage(storage.url, cache, folder, limit)


def parse_size(text: str | int) -> int:
    """A number of bytes from `20GB`, `512MiB` or a plain number.

    Raises:
        ConfigError: it is none of these.
    """
    units = {"": 1, "B": 1}
    for power, letter in enumerate("KMGT", 1):
        units |= {f"{letter}B": 1000**power, f"{letter}IB": 1024**power, letter: 1000**power}
    digits = str(text).strip().upper()
    unit = digits.lstrip("0123456789.")
    try:
        return int(float(digits.removesuffix(unit)) * units[unit.strip()])
    except (KeyError, ValueError):
        raise ConfigError(f"local_limit {text} is not a size such as 20GB or 512MiB") from None
