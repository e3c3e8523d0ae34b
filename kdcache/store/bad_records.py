"""Bad records: which documents of a cache could not be used, and why.

A commit counts those of its shard and lists the first of them, as many as it has room for. When a cache is complete,
`bad_records.jsonl` beside the seal lists those of all shards, one JSON object a line. It is for people: no reader needs
it, and no checksum covers it.

A reason ends up in terminals and reports, so it is one line of at most 200 characters that moves no cursor and turns no
text around. Reasons for which documents were left out, bad ones among them, are of the same form.
Cost: a commit lists at most 10,000, the file at most a million, which is all that is ever in memory.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.store.sealed_json import count_values, require_fields, short

LISTING = "bad_records.jsonl"

MOST_LISTED = 10_000
"""Bad records that one commit lists."""

MOST_REASON = 200
"""Characters of a reason."""

UNPLAIN = r"[\x00-\x1f\x7f-\x9f\x{2028}-\x{202e}\x{2066}-\x{2069}]"
"""What no reason has, as RE2 writes it: control characters, line and paragraph ends, marks that reverse text."""

_UNPLAIN = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_MOST_REASONS, _OTHERS = 64, "other reasons"
_MOST_LINES = 1_000_000
_MOST_BYTES, _MOST_VALUES = 2 << 20, 50_000
"""What the list of a commit may take of the limits of a record; the rest is for its other fields."""
_FIELDS_OF_ONE = 64
"""Bytes that a listed record takes beside its reason, indented as a record's file is."""


@dataclass(frozen=True, kw_only=True)
class BadRecordFields:
    """The fields of one of `bad_records`.

    Attributes:
        document: its number in the corpus.
        reason: why it could not be used.
    """

    document: int
    reason: str


def plain_reason(text: str) -> str:
    """Any text as a reason: one line, cut where it is long."""
    return short(_UNPLAIN.sub(" ", text), MOST_REASON) or "unknown"


def require_reason(reason: str) -> None:
    """Refuse what is no reason.

    Raises:
        ValueError: nothing, too long, or characters that do more than stand there.
    """
    if not 0 < len(reason) <= MOST_REASON or _UNPLAIN.search(reason):
        raise ValueError(f"a reason is {short(ascii(reason))}, not one line of 1 to {MOST_REASON} characters")


def require_listable(records: Sequence[Mapping[str, Any]]) -> None:
    """Check the bad records that a commit lists; how many there are is for the commit to judge.

    Raises:
        ValueError: one that is none, or that does not follow the one before it.
    """
    last = -1
    for record in records:
        require_fields(dict(record), BadRecordFields)
        require_reason(record["reason"])
        if record["document"] <= last:
            raise ValueError(f"bad record {record['document']} stands after bad record {last}")
        last = record["document"]


def by_plain_reason(counts: Mapping[str, int]) -> dict[str, int]:
    """Numbers of documents by plain reason: the most frequent, the rest together; a reason of none is left out."""
    found: Counter[str] = Counter()
    for reason, count in counts.items():
        found[plain_reason(reason)] += count
    ordered = sorted(
        ((reason, count) for reason, count in found.items() if count), key=lambda item: (-item[1], item[0])
    )
    kept, rest = dict(ordered[:_MOST_REASONS]), sum(count for _, count in ordered[_MOST_REASONS:])
    return {**kept, _OTHERS: kept.get(_OTHERS, 0) + rest} if rest else kept


def fit(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first of these bad records, in order of their numbers, that a commit has room for; reasons made plain.

    Raises:
        ValueError: one that is none.
    """
    checked = [dict(record) for record in records]
    for record in checked:
        require_fields(record, BadRecordFields)
    found, size, values = [], 0, 0
    for record in sorted(checked, key=lambda record: record["document"])[:MOST_LISTED]:
        reason = plain_reason(record["reason"])
        text = json.dumps(reason, ensure_ascii=False).encode()
        size, values = size + len(text) + _FIELDS_OF_ONE, values + 3 + count_values(text)
        if size > _MOST_BYTES or values > _MOST_VALUES:
            break
        found.append({"document": record["document"], "reason": reason})
    return found


def listing(records: Iterable[tuple[int, Mapping[str, Any]]]) -> bytes:
    """The content of `bad_records.jsonl`.

    Args:
        records: shard and bad record.
    """
    lines = (
        json.dumps({"document": record["document"], "shard": shard, "reason": record["reason"]}, ensure_ascii=False)
        for shard, record in itertools.islice(records, _MOST_LINES)
    )
    return "".join(f"{line}\n" for line in lines).encode()
