"""Records: what stands in a corpus for one document, as a source gives it.

A source gives a `str` for each document of a plain text file, and for everything else a dict of the wanted columns that
the record has; columns that are null are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Unreadable:
    """Bytes that stand where a record should, and cannot be read as one.

    Attributes:
        data: the bytes.
        reason: what is wrong with them, in a few words.
    """

    data: bytes
    reason: str


Record = str | dict[str, Any] | Unreadable


def without_nulls(value: Any) -> Any:
    """A value without the fields that are null, at every depth.

    A table gives each object every field that any object of its column has.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


_MOST_LEVELS = 100
"""Levels of a record: far more than the definition of any tool has, and far fewer than what Python can follow."""


def is_nested_too_deeply(value: Any, levels: int = _MOST_LEVELS) -> bool:
    """Whether lists and objects stand in each other so deeply that a record cannot be walked through."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return not levels or any(is_nested_too_deeply(item, levels - 1) for item in value if type(item) not in _FLAT)


_FLAT = (str, int, bool, float, type(None))
