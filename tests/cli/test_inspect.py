"""`inspect-shard` in a terminal: beside, as a table, with hostile and wide texts; and progress for machines."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from pathlib import Path

import pytest
from kdcache_cli.main import app
from kdcache_cli.progress import progress_lines
from kdcache_cli.tables import print_position, print_row
from rich.console import Console
from typer.testing import CliRunner

from kdcache import open_cache


def invoke(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["inspect-shard", *map(str, words)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def place(*words: object) -> tuple[int, int | None]:
    code, out, error = invoke(*words, "--json")
    assert code == 0, error
    found = json.loads(out)
    return found["row"], found.get("position")


def test_what_follows_and_what_precedes(cache: Path) -> None:
    opened = open_cache(cache)
    slots = (opened[0].targets.count > 0).nonzero()[:, 0].tolist()
    first = int((opened[1].targets.count > 0).nonzero()[0])
    assert place(cache, "--row", 0, "--position", slots[2], "--next") == (0, slots[3])
    assert place(cache, "--row", 0, "--position", slots[3], "--previous") == (0, slots[2])
    assert place(cache, "--row", 0, "--position", slots[-1], "--next") == (1, first)
    assert place(cache, "--row", 1, "--position", first, "--previous") == (0, slots[-1])
    assert place(cache, "--row", 0, "--next") == (1, None)
    rows = opened.commits[1].rows
    assert place(cache, "--shard", 1, "--row", rows - 1, "--previous")[0] == rows - 2
    for words, said in (
        (("--next",), "--next needs --row"),
        (("--row", 0, "--next", "--previous"), "exclude each other"),
        (("--row", 0, "--previous"), "row 0 is the first; there is none before it"),
        (("--row", 0, "--position", slots[0], "--previous"), "there is no position with a target before"),
        (("--shard", 1, "--row", rows - 1, "--next"), "is the last"),
        (("--row", 0, "--csv", "--json"), "--csv and --json exclude each other"),
    ):
        code, out, error = invoke(cache, *words)
        assert (code, out) == (2, "") and said in error and error.count("\n") == 1, (words, error)


def test_tables_of_comma_separated_values(cache: Path) -> None:
    row, slot = open_cache(cache)[0], 5
    lines = list(csv.DictReader(io.StringIO(invoke(cache, "--row", 0, "--csv")[1])))
    assert [int(line["id"]) for line in lines] == row.tokens[row.segments >= 0].tolist()
    assert all(line["text"].startswith('"') for line in lines)  # never a formula
    entries = list(csv.DictReader(io.StringIO(invoke(cache, "--row", 0, "--position", slot, "--csv")[1])))
    assert [line["id"] for line in entries[:-1]] == [str(i) for i in row.targets.ids[slot].tolist()]
    assert entries[-1]["id"] == "tail" and sum(float(line["probability"]) for line in entries) == pytest.approx(1, 1e-4)
    summary = dict(csv.reader(io.StringIO(invoke(cache, "--csv")[1])))
    assert summary["rows"] == str(len(open_cache(cache))) and summary["selection.k"] == "8"


def at(*texts: str) -> dict[str, object]:
    entries = [{"id": i, "text": t, "logprob": -1.0, "probability": 0.3, "weight": 0.3} for i, t in enumerate(texts)]
    return {
        "shard": 0, "row": 0, "position": 1, "document": 0, "teacher_read": None, "context": "x", "no_target": None,
        "label": {"id": 0, "text": texts[0], "logprob": -1.0}, "entropy": 1.0, "tail": 0.1, "temperature": 1.0,
        "kept": len(texts), "entries": entries,
    }  # fmt: skip


def columns(line: str) -> int:
    """How many columns of a terminal a line takes (Unicode, annex 11)."""
    wide = {"W": 2, "F": 2}
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else wide.get(unicodedata.east_asian_width(c), 1)
        for c in line
    )


def test_wide_characters_stand_in_columns_and_hostile_ones_are_spelt_out() -> None:
    sink = io.StringIO()
    console = Console(file=sink, width=80, highlight=False)
    print_position(console, at("the", "漢字", "cafe\u0301", "नमस्ते", "😀", "\x1b[2Jx\u202e"))  # type: ignore[arg-type]
    lines = [line for line in sink.getvalue().splitlines() if "-1.0000" in line and "log p -" not in line]
    plain = [line.split("-1.0000")[0] for line in lines]
    assert len(plain) == 6 and len(set(map(columns, plain))) == 1
    assert "\x1b[2J" not in sink.getvalue() and "\u202e" not in sink.getvalue()
    tokens = [{"position": 0, "id": 1, "text": "a\x1b]0;owned\x07", "piece": 0, "document": 0, "logprob": None}]
    sink = io.StringIO()
    row = {"shard": 0, "row": 0, "pieces": 1, "tokens": tokens, "teacher_read": []}
    print_row(Console(file=sink, width=80), row)
    assert "\x1b" not in sink.getvalue() and "⟨U+001B⟩" in sink.getvalue()


def test_colour_is_for_terminals(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b" not in invoke(cache, "--row", 0)[1]
    shown = []
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        sink = io.StringIO()
        row = json.loads(invoke(cache, "--row", 0, "--json")[1])
        print_row(Console(file=sink, force_terminal=True, width=60), row)
        shown.append(sink.getvalue())
    assert "\x1b[32m" in shown[0] or "\x1b[33m" in shown[0] or "\x1b[31m" in shown[0]
    assert not any(f"\x1b[{code}m" in shown[1] for code in (31, 32, 33))


def test_progress_for_machines(cache: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["verify", str(cache), "--log-json", "--json"])
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.exit_code == 0 and json.loads(done.stdout)["ok"]
    assert lines[-1]["progress"] == "verify" and lines[-1]["unit"] == "shards" and lines[-1]["total"] > 1
    done = CliRunner().invoke(app, ["verify", str(tmp_path), "--log-json"])
    assert done.exit_code == 2 and "error" in json.loads(done.stderr)
    assert CliRunner().invoke(app, ["verify", str(cache), "--log-json", "--quiet"]).stderr == ""
    said: list[dict[str, object]] = []
    with progress_lines("dump", "rows", said.append) as update:
        for count in range(5):
            update(count, 4, "x")
    assert [line["done"] for line in said] == [0, 4] and said[-1]["seconds_left"] == 0  # one a second, and the last
