"""What a notebook shows of a cache, a row and a position: plain HTML in which nothing hostile lives."""

from __future__ import annotations

import json
import pickle
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kdcache import open_cache
from kdcache.teacher.dump import dump
from tests.making import dump_options

EVIL = "</div><script>alert(1)</script><img src=x onerror=alert(2)> \u202egnp\u202c \x1b]0;owned\x07"


class Strict(HTMLParser):
    """Takes the elements that we write, and no others."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("div", "span", "table", "tr", "td", "th", "bdi"), tag
        assert {name for name, _ in attrs} <= {"style", "title", "dir"}
        assert not any("url(" in (value or "") for _, value in attrs)
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(page: str) -> str:
    parser = Strict()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser.text


@pytest.fixture(scope="module")
def hostile(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "texts.jsonl").write_text(json.dumps({"text": EVIL}) + "\n" + json.dumps({"text": "A heron."}) + "\n")
    dump(dump_options(teacher, folder / "texts.jsonl", folder / "<b>c", seq_len=128))
    return folder / "<b>c"


def test_a_cache_a_row_and_a_position_are_shown(hostile: Path) -> None:
    cache = open_cache(hostile)
    row = cache[0]
    assert "<b>c" in shown(cache._repr_html_()) and "topk k=8" in shown(cache._repr_html_())
    text = shown(row._repr_html_())
    assert "<script>alert(1)</script>" in text and "A heron." in text
    assert "\u202e" not in text and "\x1b" not in text and "⟨U+001B⟩" in text
    slot = int((row.targets.count > 0).nonzero()[3])
    position = row.position(slot)
    assert position.label == int(row.labels[slot]) and int(position.target.count) == 8
    told = shown(position._repr_html_())
    assert told.count("← next") <= 1 and "tail" in told and "entropy" in told
    last = int((row.segments >= 0).sum()) - 1
    assert "no target" in shown(row.position(last)._repr_html_())
    assert len(row._repr_html_()) < 60_000


def test_a_row_without_its_cache_is_shown_too(hostile: Path) -> None:
    row = pickle.loads(pickle.dumps(open_cache(hostile)[0]))
    assert row.cache is None and "without the cache" in shown(row._repr_html_())
    assert shown(row.position(0)._repr_html_())
    with pytest.raises(IndexError, match="slot 128 of a row of 128"):
        row.position(128)
