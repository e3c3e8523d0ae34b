"""Records: small JSON files that end with a checksum of themselves.

The checksum is the sha256 of the record in canonical form (keys sorted, no spaces, UTF-8)
without its `checksum` field, so it does not depend on how the file is indented.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kdcache.errors import CacheError, CorruptCacheError

_MOST_BYTES = 64 << 20


def canonical(value: Any) -> bytes:
    """The one byte string of a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def checksum(fields: dict[str, Any]) -> str:
    """sha256 of a record's fields, in hexadecimal."""
    return hashlib.sha256(canonical({k: v for k, v in fields.items() if k != "checksum"})).hexdigest()


def seal(fields: dict[str, Any]) -> bytes:
    """The bytes of a record's file: readable, its checksum last."""
    sealed = {k: v for k, v in fields.items() if k != "checksum"}
    return (json.dumps({**sealed, "checksum": checksum(sealed)}, indent=2, ensure_ascii=False) + "\n").encode()


def read_record(path: Path) -> dict[str, Any]:
    """Read a record and check it.

    Raises:
        FileNotFoundError: there is none.
        CorruptCacheError: it is not JSON, or not what it was when it was sealed.
    """
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise CorruptCacheError(f"{path} is larger than any record can be")
        fields = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise CorruptCacheError(f"{path} is damaged: it is not JSON ({error})") from None
    if not isinstance(fields, dict) or fields.get("checksum") != checksum(fields):
        raise CorruptCacheError(f"{path} is damaged: its checksum does not match")
    return fields
