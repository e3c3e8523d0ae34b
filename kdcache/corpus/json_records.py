"""JSON records: the bytes of one record to the columns that are wanted of it, and where records stand in JSON text.

Guarantee: a record is refused for what is not JSON, not UTF-8 or not an object, and for half of a surrogate pair in a
wanted column. What stands in other columns refuses nothing: what the fast parser does not take (half of a pair, an
integer of any length, NaN) is read by Python's own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import orjson

from kdcache.corpus.records import Unreadable

_LONGEST_INTEGER = 400
"""Digits; Python refuses integers of some thousand, and a longer one is no number that anyone counts with."""

_BETWEEN = re.compile(rb"[\s,]*+")
_BRACKET = re.compile(rb'(?:[^"\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")*+[\[\]{}]', re.DOTALL)
_OTHER = re.compile(rb'(?:[^",\[\]{}]++|"[^"\\]*+(?:\\.[^"\\]*+)*+")++', re.DOTALL)


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= _LONGEST_INTEGER else float(digits)


_DECODER = json.JSONDecoder(parse_int=_integer)


def wanted_of(record: dict[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """The columns that are wanted of a record, without those that are null."""
    return {column: record[column] for column in columns if record.get(column) is not None}


def parse_record(data: bytes, columns: Sequence[str] | None, where: str) -> dict[str, Any] | Unreadable:
    """The wanted columns of one record, without those that are null.

    Args:
        data: its bytes.
        columns: None for all, nulls too.
        where: its place, for the reason why it cannot be read.
    """
    try:
        record = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        try:
            record = _DECODER.decode(data.decode().strip())
        except UnicodeDecodeError as bad:
            return Unreadable(data, f"not UTF-8: {where}, {bad.reason}")
        except (ValueError, RecursionError):
            return Unreadable(data, f"not JSON: {where}, {error.msg}")
    if not isinstance(record, dict):
        return Unreadable(data, f"not an object: {where}")
    if columns is None:
        return record
    found = wanted_of(record, columns)
    for column, value in found.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Unreadable(data, f"lone surrogate: {where}, column {column!r}")
    return found


def value_spans(data: bytes, whole: bool) -> list[tuple[int, int]]:
    """Where each value of a JSON array, or of values one behind the other, begins and ends.

    What stands between two values, commas or white space, is skipped, and so is the bracket that closes the array.

    Args:
        data: from the first byte of a value, or from between two.
        whole: whether nothing comes behind them: a value that is not finished then counts too. Otherwise it does not.
    """
    spans: list[tuple[int, int]] = []
    at = 0
    while (between := _BETWEEN.match(data, at)) and (start := between.end()) < len(data):
        if data[start] in b"{[":
            at, depth = start + 1, 1
            while depth and (found := _BRACKET.match(data, at)):
                at = found.end()
                depth += 1 if data[at - 1] in b"{[" else -1
            finished = not depth
        elif data[start] in b"]}":
            at = start + 1
            if data[start] == ord("]") and not data[at:].strip():
                break
            finished = True
        else:
            other = _OTHER.match(data, start)
            at = other.end() if other else len(data)
            finished = at < len(data)
        if not finished:
            if whole:
                spans.append((start, len(data)))
            break
        spans.append((start, at))
    return spans
