"""Sealed JSON: records, small JSON files that end with a checksum of themselves.

The checksum is the sha256 of the record in canonical form (keys sorted, no spaces, UTF-8)
without its `checksum` field, so it does not depend on how the file is indented.

A checksum proves that nothing changed, not that anything is true: whoever writes a lie can seal it too. So a record is
read strictly (one value for each key, a limit on values and levels), and the type of each field is checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any

from kdcache.errors import CacheError, CorruptCacheError
from kdcache.store.storage import Storage

MOST_BYTES = 4 << 20
"""Bytes of a record."""
_MOST_LEVELS, _MOST_VALUES = 32, 1 << 16
_MOST_COUNT = 1 << 63


def canonical(value: Any) -> bytes:
    """The one byte string of a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def checksum(fields: dict[str, Any]) -> str:
    """sha256 of a record's fields, in hexadecimal."""
    return hashlib.sha256(canonical({k: v for k, v in fields.items() if k != "checksum"})).hexdigest()


def seal(fields: dict[str, Any]) -> bytes:
    """The bytes of a record's file: readable, its checksum last.

    Raises:
        CacheError: it is larger than a reader accepts.
    """
    sealed = {k: v for k, v in fields.items() if k != "checksum"}
    data = (json.dumps({**sealed, "checksum": checksum(sealed)}, indent=2, ensure_ascii=False) + "\n").encode()
    if len(data) > MOST_BYTES:
        raise CacheError(f"a record of {len(data):,} bytes is above the limit of {MOST_BYTES:,}")
    return data


def parse(data: bytes, most_values: int = _MOST_VALUES) -> Any:
    """Parse JSON strictly: UTF-8, each key once, no NaN, a limit on values and levels.

    Raises:
        ValueError: it is not.
    """
    if count_values(data) > most_values:  # each takes 60 bytes of memory for 3 of text
        raise ValueError(f"it has more than {most_values} values")
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except RecursionError:
        raise ValueError(f"it has more than {_MOST_LEVELS} levels") from None
    level = [value]
    for _ in range(_MOST_LEVELS):
        inner = [v.values() if isinstance(v, dict) else v for v in level if isinstance(v, dict | list)]
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
    if level:
        raise ValueError(f"it has more than {_MOST_LEVELS} levels")
    return value


def count_values(data: bytes) -> int:
    """At least as many as the values of a JSON text: what is inside strings is counted, too."""
    return sum(map(data.count, (b"{", b"[", b",")))


def read_record(storage: Storage, name: str, most: int = MOST_BYTES) -> dict[str, Any]:
    """Read a record, of at most `most` bytes, and check it.

    Raises:
        FileNotFoundError: there is none.
        CorruptCacheError: it is not JSON, or not what it was when it was sealed.
    """
    data, path = storage.read(name, most), storage.path_of(name)
    try:
        fields = parse(data)
    except ValueError as error:
        raise CorruptCacheError(f"{path} is damaged: it is not JSON ({error})") from None
    try:
        sound = isinstance(fields, dict) and fields.get("checksum") == checksum(fields)
    except ValueError:  # an infinite number, or half of a surrogate pair: no writer can have sealed that
        sound = False
    if not sound:
        raise CorruptCacheError(f"{path} is damaged: its checksum does not match")
    return dict(fields)


def require_fields(fields: dict[str, Any], record: type) -> None:
    """Check that a record has the fields of its dataclass, each of its type; those named `...sha256` are hashes.

    Raises:
        ValueError: a field is missing, unknown, or of another type.
    """
    kinds = {field.name: str(field.type) for field in dataclasses.fields(record)}
    if set(fields) != set(kinds):
        raise ValueError(f"its fields differ by {short(sorted(set(fields) ^ set(kinds)))}")
    for name, value in fields.items():
        if not (_is_sha256 if name.endswith("sha256") else _KINDS[kinds[name]])(value):
            raise ValueError(f"{name} is {short(repr(value))}")


def is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number that 63 bits hold; true and 1.0 are not."""
    return type(value) is int and 0 <= value < _MOST_COUNT


def short(value: object, most: int = 60) -> str:
    """A value for a message: one line, cut where it is long."""
    text = " ".join(str(value).split())
    return text if len(text) <= most else text[: most - 3] + "..."


def _is_float(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _is_list(value: Any, is_item: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(is_item, value))


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


_KINDS: dict[str, Callable[[Any], bool]] = {
    "str": lambda value: isinstance(value, str),
    "str | None": lambda value: value is None or isinstance(value, str),
    "int": is_count,
    "int | None": lambda value: value is None or is_count(value),
    "bool": lambda value: isinstance(value, bool),
    "float": lambda value: type(value) in (int, float),
    "float | None": lambda value: _is_float(value),
    "list[int] | None": lambda value: value is None or _is_list(value, is_count),
    "list[float | None] | None": lambda value: (
        value is None or (isinstance(value, list) and all(map(_is_float, value)))
    ),
    "dict[str, Any]": lambda value: isinstance(value, dict),
    "Known": lambda value: isinstance(value, dict),
    "dict[str, str]": lambda value: isinstance(value, dict) and all(map(_is_sha256, value.values())),
    "dict[str, int]": lambda value: isinstance(value, dict) and all(map(is_count, value.values())),
    "list[int]": lambda value: _is_list(value, is_count),
    "list[dict[str, Any]]": lambda value: isinstance(value, list) and all(isinstance(v, dict) for v in value),
    "tuple[float, ...]": lambda value: isinstance(value, list) and all(type(v) in (int, float) for v in value),
    "tuple[int, ...]": lambda value: isinstance(value, str),  # folded
}
"""The JSON type of each type of a record's dataclass."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("it names a field twice")
    return fields


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a number")
