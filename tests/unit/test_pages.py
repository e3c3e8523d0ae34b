"""The pages: lines of at most 120 characters, and links that lead somewhere.

Long lines are allowed in code and in tables, which cannot be wrapped.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
WIDTH = 120

_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"#{1,6} (.*)")


def prose(text: str) -> Iterator[tuple[int, str]]:
    """The lines outside code blocks, each with its number from 1."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith("    "):
            yield number, line


def long_lines(text: str) -> list[int]:
    """Numbers of the lines of prose that are too long."""
    return [number for number, line in prose(text) if len(line) > WIDTH and not line.lstrip().startswith("|")]


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in a link, as GitHub makes it: a second one of a name ends in -1."""
    found: dict[str, int] = {}
    names = set()
    for _, line in prose(text):
        if heading := _HEADING.fullmatch(line.rstrip()):
            words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1]).lower()
            name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
            seen = found.get(name, 0)
            found[name] = seen + 1
            names.add(f"{name}-{seen}" if seen else name)
    return names


def broken_links(page: Path) -> list[str]:
    """The relative links of a page whose file or heading does not exist."""
    broken = []
    text = "\n".join(line for _, line in prose(page.read_text(encoding="utf-8")))
    for target in _LINK.findall(re.sub(r"`[^`\n]*`", "", text)):
        if re.match(r"[a-z]+:", target):  # another site
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            broken.append(target)
    return broken


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_no_line_is_too_long(page: Path) -> None:
    assert long_lines(page.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_the_checks_find_what_is_wrong(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    good, bad = "[a](#a-heading-of-pq) [b](other.md)", "[c](#none) [d](missing.md) [e](other.md#b)"
    page.write_text(f"# A heading of `p`/q\n\n{good}\n{bad}\n\n```\n[f](nowhere)\n{'x' * 121}\n```\n{'y ' * 61}\n")
    (tmp_path / "other.md").write_text("# Another\n")
    assert broken_links(page) == ["#none", "missing.md", "other.md#b"]
    assert long_lines(page.read_text()) == [10]
