"""File systems: from a URL to the fsspec file system behind it, with connections enough for many ranges at once.

Importing this module loads fsspec; connecting loads the package of the protocol.
"""

from __future__ import annotations

from typing import Any

import fsspec

from kdcache.errors import ConfigError

_CONNECTIONS = 64
_TRIES = 2
"""Tries of s3fs, each around botocore's own (five, or AWS_MAX_ATTEMPTS). With its default of five, an endpoint that
accepts connections and never answers would block for half an hour."""


def connect(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path that the URL names in it.

    Args:
        url: any that fsspec knows: `s3://`, `gs://`, `az://`, `https://`, `memory://`, ...

    Raises:
        ConfigError: a protocol that fsspec does not know, or whose package is not installed.
    """
    options: dict[str, Any] = {"use_listings_cache": False}
    if url.startswith(("s3://", "s3a://")):
        wished = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
        options["config_kwargs"] = {"max_pool_connections": _CONNECTIONS, **wished}
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        raise ConfigError(
            f"{url} needs a package that is not installed ({error}); for s3:// it is kdcache[s3]"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{url} is no place that fsspec knows: {error}") from None
    if "config_kwargs" in options:
        fs.retries = min(fs.retries, _TRIES)
    return fs, str(path)
