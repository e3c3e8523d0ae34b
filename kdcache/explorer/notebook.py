"""Notebook: a cache, a row and a position as small pieces of HTML.

Each needs nothing else: no script, no style sheet, no address. Whatever comes from a cache or a corpus is escaped, with
characters that would change the text around them spelt out. Tints and token texts are those of the explorer's page.
Nothing here raises for what a cache holds or lacks: a cell that is being shown must not fail.

Cost: of a row, decoding each of its tokens beside those before it, some 0.1 s for 512; the tokenizer is loaded once a
cache.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from kdcache.cache import Cache, Position, Row
from kdcache.errors import KdcacheError
from kdcache.explorer.tints import SHADES, TINTS, colour, level_of
from kdcache.explorer.token_texts import readable
from kdcache.report.inspect import describe_cache, describe_position, describe_row

_TOP = 10
_BAR = 14
"""Width of the bar of a probability of 1, in em."""
_MOST_TEXT = 300
_FONT = "font-family:system-ui,sans-serif;font-size:13px;line-height:1.5"
_SOFT = "opacity:.65"


def cache_html(cache: Cache) -> str:
    """What a cache is, as a table."""
    try:
        found = describe_cache(cache)
    except KdcacheError as error:
        return _box([_line(f"{cache.storage}: {error}")])
    state = "complete" if found["complete"] else "incomplete"
    shards, selection = found["shards"], found["selection"]
    rule = " ".join([selection["kind"], *(f"{name}={value}" for name, value in selection.items() if name != "kind")])
    kept, entropy = found["mean_kept_mass"], found["mean_entropy"]
    facts = (
        ("teacher", found["teacher"]),
        ("corpus", found["corpus"]),
        (
            "selection",
            f"{rule}, T {', '.join(f'{t:g}' for t in found['temperatures'])}, precision {found['precision']}",
        ),
        ("rows", f"{found['rows']:,} of {found['seq_len']:,} slots, {found['tokens']:,} tokens"),
        ("positions", f"{found['positions']:,}, {found['bytes_per_position']:.1f} bytes each"),
        ("kept mass", "none: entries are a sample" if kept is None else f"{kept:.6f} on average"),
        ("entropy", "unknown" if entropy is None else f"{entropy:.4f} nats on average"),
    )
    rows = [
        f'<tr><th style="text-align:left;padding:0 1em 0 0;font-weight:600">{_safe(name)}</th>'
        f'<td style="text-align:left">{_safe(value)}</td></tr>'
        for name, value in facts
    ]
    title = f"{cache.storage} ({state}, {shards['committed']:,} of {shards['planned']:,} shards)"
    return _box([_title(title), f"<table>{''.join(rows)}</table>"])


def row_html(row: Row) -> str:
    """A row as text, each token tinted by how it surprised the teacher; pointing at one says how much."""
    if row.cache is None or row.index is None:
        return _box([_line(f"a row of {int((row.segments >= 0).sum()):,} tokens, without the cache it was read from")])
    try:
        found = describe_row(row.cache, row.index)
    except KdcacheError as error:
        return _box([_line(f"row {row.index:,}: {error}")])
    parts = [_title(f"Row {row.index:,}: shard {found['shard']}, its row {found['row']}"), _scale()]
    told = {each["piece"]: each["text"] for each in found["teacher_read"]}
    pieces: dict[int, list[dict[str, Any]]] = {}
    for token in found["tokens"]:
        pieces.setdefault(token["piece"], []).append(token)
    for piece, tokens in pieces.items():
        head = f"document {tokens[0]['document']:,}"
        if piece in told:
            head += f" · the teacher alone read “{told[piece][-_MOST_TEXT:]}” first"
        parts.append(f'<div style="{_SOFT};margin-top:.5em">{_safe(head)}</div>')
        text = "".join(map(_token, tokens))
        parts.append(f'<div dir="auto" style="white-space:pre-wrap;overflow-wrap:anywhere">{text}</div>')
    return _box(parts)


def position_html(position: Position) -> str:
    """A position: what was read, the true next token, and the entries as bars."""
    row, slot = position.row, position.slot
    if row.cache is None or row.index is None:
        return _box([_line(f"slot {slot:,}: token {position.token}, {int(position.target.count)} entries")])
    try:
        found = describe_position(row.cache, row.index, slot, _TOP)
    except KdcacheError as error:
        return _box([_line(f"row {row.index:,}, slot {slot:,}: {error}")])
    context = found["context"][-_MOST_TEXT:]
    parts = [
        _title(f"Row {row.index:,}, position {slot:,}"),
        f'<div dir="auto" style="white-space:pre-wrap;overflow-wrap:anywhere">{_safe(context)}</div>',
    ]
    if found["no_target"] is not None:
        return _box([*parts, _line(f"no target: {found['no_target']}")])
    label, entropy = found["label"], found["entropy"]
    surprise = "" if label["logprob"] is None else f", {-label['logprob']:.2f} nats"
    told = f"next: {label['text']!r}{surprise}" + ("" if entropy is None else f" · entropy {entropy:.2f} nats")
    shares = [
        (repr(each["text"]), each["weight"] if each["probability"] is None else each["probability"],
         each["id"] == label["id"])
        for each in found["entries"]
    ]  # fmt: skip
    hidden = found["kept"] - len(shares)
    if hidden and found["tail"] is not None:
        shares.append((f"{hidden:,} more", max(0.0, 1 - found["tail"] - sum(share for _, share, _ in shares)), False))
    if found["tail"] is not None:
        shares.append(("tail", found["tail"], False))
    return _box([*parts, _line(told), f"<table>{''.join(map(_bar, shares))}</table>"])


def _token(token: dict[str, Any]) -> str:
    text = readable(token["text"]).replace("\n", "↵\n")
    if token["logprob"] is None:
        return f'<span style="{_SOFT}">{html.escape(text)}</span>'
    surprise = -token["logprob"]
    level = level_of("surprise", surprise)
    style = f' style="background:{colour("surprise", level)}"' if level else ""
    said = f"p {math.exp(-surprise):.3g}, {surprise:.2f} nats"
    return f'<span title="{said}"{style}>{html.escape(text)}</span>'


def _bar(share: tuple[str, float, bool]) -> str:
    name, value, true = share
    width = _BAR * min(1.0, max(0.0, value))
    ground = colour("entropy", len(SHADES)) if not true else colour("surprise", len(SHADES))
    cell = 'style="text-align:left;padding:0 1em 0 0"'
    weight = "font-weight:600;" if true else ""
    figure = f"{value:.4f}" if value >= 1e-3 else f"{value:.2g}"
    return (
        f'<tr><td {cell}><bdi style="{weight}white-space:pre-wrap">{_safe(name)}</bdi>{" ← next" if true else ""}</td>'
        f'<td {cell}>{figure}</td><td {cell}><span style="display:inline-block;height:.8em;width:{width:.2f}em;'
        f'background:{ground}"></span></td></tr>'
    )


def _scale() -> str:
    tint = TINTS["surprise"]
    steps: Sequence[float] = tint["steps"]
    fields = "".join(
        f'<span style="background:{colour("surprise", level)};padding:0 .4em">{step:g}</span>'
        for level, step in enumerate(steps, 1)
    )
    return f'<div style="font-size:11px">{_safe(tint["title"])}, nats, from {fields}</div>'


def _safe(value: Any) -> str:
    return html.escape(readable(str(value)))


def _title(text: str) -> str:
    return f'<div style="font-weight:600;overflow-wrap:anywhere">{_safe(text)}</div>'


def _line(text: str) -> str:
    return f"<div>{_safe(text)}</div>"


def _box(parts: Iterable[str]) -> str:
    return f'<div style="{_FONT};max-width:52em">{"".join(parts)}</div>'
