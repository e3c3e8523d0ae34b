"""The page as a file: whole in itself, closed to texts that would be markup, never written over another."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from kdcache_cli.main import app
from typer.testing import CliRunner

from kdcache.explorer.explorer import Explorer
from kdcache.explorer.page import render


class Elements(HTMLParser):
    """The tags of a page, and the text of its data."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data, self._inside = "", False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = dict(attrs).get("id") == "data"

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.data += data


def kdcache(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def test_it_is_one_file_that_loads_nothing(cache: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    code, out, _ = kdcache("inspect-shard", cache, "--html", page, "--rows", 3, "--json")
    assert code == 0
    assert json.loads(out) == {"html": str(page), "rows": 3, "bytes": page.stat().st_size}
    text = page.read_text(encoding="utf-8")
    elements = Elements()
    elements.feed(text)
    for tag, attributes in elements.tags:
        assert "src" not in attributes and (tag == "a" or attributes.get("href", "data:,") == "data:,"), (
            tag,
            attributes,
        )
    assert "@import" not in text and "url(" not in text
    told = json.loads(elements.data)
    assert [row["index"] for row in told["rows"]] == [i * told["summary"]["rows"] // 3 for i in range(3)]
    assert len(told["texts"]["ids"]) == len(told["texts"]["texts"]) == len(set(told["texts"]["ids"]))


def test_texts_of_a_cache_are_data(cache: Path) -> None:
    explorer = Explorer(str(cache))
    head = explorer.head([0])
    evil = "</script><script>alert(1)</script><!-- @@data@@"
    head["summary"]["teacher"] = evil
    page = render(head, explorer.packed_rows([0]))
    elements = Elements()
    elements.feed(page)
    assert len([tag for tag, _ in elements.tags if tag == "script"]) == 2
    assert json.loads(elements.data)["summary"]["teacher"] == evil
    (policy,) = [a["content"] for tag, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and "script-src 'sha256-" in policy and "connect-src 'none'" in policy


def test_the_script_makes_no_markup_of_texts() -> None:
    for script in (Path(__file__).parents[2] / "kdcache" / "explorer" / "page").glob("*.js"):
        text = script.read_text(encoding="utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text), (
            script
        )
        assert max(map(len, text.splitlines())) <= 240, script


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--html", "{page}"), "{page} exists already; choose another name"),
        (("--html", "{new}", "--rows", 0), "--rows is 0, but must be at least 1"),
        (("--html", "{new}", "--entries", 0), "--entries is 0, but must be at least 1"),
        (
            ("--html", "{new}", "--position", 1),
            "--html shows whole rows, so it excludes --position, --exact, --csv, --next and --previous",
        ),
        (("--html", "{new}", "--row", 999_999), "has rows 0 to"),
        (("--compare", "x"), "--compare is for a page, so it needs --html"),
    ],
)
def test_bad_options(cache: Path, tmp_path: Path, options: tuple[object, ...], said: str) -> None:
    page, new = tmp_path / "page.html", tmp_path / "new.html"
    page.write_text("mine")
    filled = [str(each).format(page=page, new=new) for each in options]
    code, out, error = kdcache("inspect-shard", cache, *filled)
    assert (code, out) == (2, "") and said.format(page=page) in error, error
    assert page.read_text() == "mine" and not new.exists()


def test_one_row_of_a_shard(cache: Path, tmp_path: Path) -> None:
    page = tmp_path / "p.html"
    code, out, error = kdcache("inspect-shard", cache, "--shard", 1, "--row", 2, "--html", page, "--json")
    assert code == 0 and json.loads(out)["rows"] == 1, error
    elements = Elements()
    elements.feed(page.read_text(encoding="utf-8"))
    (row,) = json.loads(elements.data)["rows"]
    assert (row["shard"], row["row"]) == (1, 2)
