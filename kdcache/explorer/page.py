"""Page: the explorer as one HTML file that needs nothing else: style, code and data stand in it.

Data are JSON in an element that no browser runs; no `<` is left in it, so no text can end it. The only script is named
in the page's policy by its sha256, so no other can run, and the page may connect to nowhere (of a served page: to its
own server). Memory: the page, and the rows that it shows.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache.explorer.explorer import Explorer
from kdcache.explorer.tints import TINTS, style_of_page
from kdcache.report.inspect import Progress
from kdcache.store.atomic_files import require_new, write_new

_PARTS = Path(__file__).parent / "page"
_SCRIPTS = ("unpack", "targets", "view", "text", "charts", "position", "summary", "find", "controls", "main")
"""Modules of the page, in the order in which they stand in its script."""


def policy(live: bool) -> str:
    """The Content-Security-Policy of the page.

    Args:
        live: whether it reads rows from its server.
    """
    digest = base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()
    connect = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; "
        f"connect-src {connect}; base-uri 'none'; form-action 'none'"
    )


def render(head: dict[str, Any], data: dict[str, Any] | None = None) -> str:
    """The page.

    Args:
        head: of `Explorer.head`.
        data: of `Explorer.packed_rows`; without it the page reads its rows from the server that it comes from.
    """
    told = {"live": data is None, "tints": TINTS, **head, **(data or {})}
    parts = {
        "policy": policy(data is None),
        "style": (_PARTS / "page.css").read_text(encoding="utf-8") + style_of_page(),
        "data": json.dumps(told, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
        "script": _script(),
    }
    page = (_PARTS / "page.html").read_text(encoding="utf-8")
    pieces = page.split("@@")  # text, name, text, name, ..., text
    pieces[1::2] = [parts[name] for name in pieces[1::2]]
    return "".join(pieces)


def write_page(
    explorer: Explorer, rows: Sequence[int], path: str, on_progress: Progress | None = None
) -> dict[str, Any]:
    """Write the page into a new file.

    Returns:
        `html`, `rows` and `bytes` of it.

    Raises:
        ConfigError: the file exists.
        CacheError: a row cannot be read, or the file cannot be written.
    """
    require_new(path)
    text = render(explorer.head(rows), explorer.packed_rows(rows, on_progress)).encode()
    if not write_new(Path(path), text):
        require_new(path)
    return {"html": path, "rows": len(rows), "bytes": len(text)}


def _script() -> str:
    parts = [(_PARTS / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS]
    return '"use strict";\n' + "\n".join(parts)
