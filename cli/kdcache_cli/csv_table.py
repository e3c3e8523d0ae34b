"""What `inspect-shard --csv` prints: one table of comma-separated values (RFC 4180).

Texts of a cache are JSON strings inside the values: line feeds and control characters are spelt out, and as each begins
with a quotation mark, no program takes one for a formula.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Mapping
from typing import Any


def print_csv(found: Mapping[str, Any]) -> None:
    """Print a summary as names and values, a row as its tokens, a position as its entries, tail and label."""
    table = csv.writer(sys.stdout, lineterminator="\n")
    if "tokens" in found and isinstance(found["tokens"], list):
        names = ("position", "id", "text", "piece", "document", "logprob")
        _print(table, names, found["tokens"])
    elif "entries" in found and isinstance(found["entries"], list):
        names = ("id", "text", "logprob", "probability", "weight", "label")
        label = found["label"] or {"id": None}
        lines = [{**entry, "label": int(entry["id"] == label["id"])} for entry in found["entries"]]
        if found["tail"] is not None:
            lines.append({"text": None, "id": "tail", "probability": found["tail"]})
        _print(table, names, lines)
    else:
        table.writerow(("name", "value"))
        table.writerows(_flat("", found))


def _print(table: Any, names: Iterable[str], lines: Iterable[Mapping[str, Any]]) -> None:
    names = tuple(names)
    table.writerow(names)
    for line in lines:
        table.writerow([_cell(name, line.get(name)) for name in names])


def _cell(name: str, value: Any) -> Any:
    return json.dumps(value) if name == "text" and value is not None else value


def _flat(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    """Numbers and texts by the names that lead to them."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), one)
    elif isinstance(value, list | str):
        yield prefix, json.dumps(value)
    else:
        yield prefix, value
