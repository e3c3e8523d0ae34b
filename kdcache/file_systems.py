"""File systems: from a URL to the fsspec file system behind it, with connections enough for many ranges at once.

Importing this module loads fsspec; connecting loads the package of the protocol.
"""

from __future__ import annotations

import functools
from typing import Any

import fsspec

from kdcache.errors import ConfigError

_CONNECTIONS = 64
_TRIES = 3
"""Tries of s3fs, each around botocore's own (five, or AWS_MAX_ATTEMPTS), which wait longer and longer. Where a third of
all requests fail, one in ten million calls does. botocore's other modes stop trying in such a store: they have a budget
for retries. With s3fs's default of five, an endpoint that accepts connections and never answers would block for half an
hour."""


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
        _retry_when_busy()
    return fs, str(path)


@functools.cache
def _retry_when_busy() -> None:
    """Make s3fs try again after a 503 without a body, which is how a request for a size is told to slow down."""
    import s3fs.core  # type: ignore[import-untyped]

    others = s3fs.core.CUSTOM_ERROR_HANDLER

    def is_busy(error: Exception) -> bool:
        answer = getattr(error, "response", None)
        status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
        return status == 503 or bool(others(error))

    s3fs.core.set_custom_error_handler(is_busy)
