"""JSON records: the bytes of one record to the columns that are wanted of it, and where records stand in JSON text.

Guarantee: a record is refused for what is not JSON, not UTF-8 or not an object, and for half of a surrogate pair in a
wanted column. What stands in other columns refuses nothing: what the fast parser does not take (half of a pair, an
integer of any length, NaN) is read by Python's own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from kdcache.corpus.records import Unreadable, is_nested_too_deeply

_LONGEST_INTEGER = 400
"""Digits; Python refuses integers of some thousand, and a longer one is no number that anyone counts with."""

_BETWEEN = b" \t\r\n,"


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
    if is_nested_too_deeply(found):
        return Unreadable(data, f"nested too deeply: {where}")
    for column, value in found.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Unreadable(data, f"lone surrogate: {where}, column {column!r}")
    return found


def value_spans(data: bytes, whole: bool) -> list[tuple[int, int]]:
    """Where each object or list of a JSON array, or of such values one behind the other, begins and ends.

    White space and commas between two values are skipped, and so is the bracket that closes the array. Anything else
    between them is given as one value, which nothing can read; so is all that comes behind the closing bracket.

    Args:
        data: from the first byte of a value, or from between two.
        whole: whether nothing comes behind them: a value that is not finished then counts too. Otherwise it does not.
    """
    if not data:
        return []
    text = np.frombuffer(data, np.uint8)
    folded = text | 32  # of both kinds of bracket the same
    brackets = np.flatnonzero((folded == ord("{")) | (folded == ord("}")))
    brackets = brackets[np.searchsorted(_quotes(text), brackets) % 2 == 0]  # those that stand in no string
    steps = np.where(folded[brackets] == ord("{"), 1, -1)
    depth = np.cumsum(steps)
    closing = np.flatnonzero(depth < 0)
    close = int(brackets[closing[0]]) if len(closing) else len(data)
    inside = brackets < close
    begins = brackets[inside & (depth == 1) & (steps == 1)].tolist()
    ends = (brackets[inside & (depth == 0)] + 1).tolist()
    spans, at = [], 0
    for begin, end in zip(begins, ends, strict=False):  # the last may have no end
        if data[at:begin].strip(_BETWEEN):
            spans += _filled(data, at, begin)
        spans.append((begin, end))
        at = end
    return [*spans, *_filled(data, at, close), *_filled(data, close + 1, len(data))] if whole else spans


def _filled(data: bytes, start: int, stop: int) -> list[tuple[int, int]]:
    """What stands in some bytes beside white space and commas, as one value."""
    rest = data[start:stop].lstrip(_BETWEEN)
    begin = stop - len(rest)
    return [(begin, begin + len(rest.rstrip(_BETWEEN)))] if rest else []


def _quotes(text: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Where strings begin and end, in turn: the quotes that no odd number of backslashes stands before."""
    quotes, slashes = np.flatnonzero(text == ord('"')), np.flatnonzero(text == ord("\\"))
    if not len(slashes):
        return quotes
    edge = np.diff(slashes) > 1
    first, last = slashes[np.append(True, edge)], slashes[np.append(edge, True)]
    return np.setdiff1d(quotes, last[(last - first) % 2 == 0] + 1, assume_unique=True)
