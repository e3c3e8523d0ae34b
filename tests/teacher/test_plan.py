"""The plan: what it says of a dump is what the dump then takes, and it leaves nothing behind."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from kdcache_cli.plan_table import print_plan
from rich.console import Console

from benchmarks.peak import output_and_peak
from kdcache.errors import ConfigError, ModelError
from kdcache.planning import memory, selections
from kdcache.planning import plan as plan_module
from kdcache.planning.plan import plan
from kdcache.planning.sample import take_sample
from kdcache.pretrained import find_device
from kdcache.selection import Selection
from kdcache.teacher.config import PlanOptions
from kdcache.teacher.dump import dump
from kdcache.teacher.inputs import open_inputs
from tests.making import dump_options

NEAR = 0.1
"""The share by which planned bytes may be off."""


def plan_options(teacher: Path, corpus: Path, **changes: Any) -> PlanOptions:
    asked = {field.name: getattr(given, field.name) for given in (dump_options(teacher, corpus, Path("unused")),)
             for field in dataclasses.fields(given)}  # fmt: skip
    return PlanOptions(**{**asked, "out": "", **changes})


def of(found: dict[str, Any], name: str) -> dict[str, Any]:
    (line,) = [line for line in found["selections"] if line["name"] == name]
    return line


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "6"},
        pytest.param({"pack": "none", "overlong": "truncate"}, marks=pytest.mark.slow),
        pytest.param({"store": "zarr", "positions": "entropy>1", "precision": None}, marks=pytest.mark.slow),
        pytest.param(
            {"select": "ipps", "adaptive": True, "temperatures": "1", "precision": None}, marks=pytest.mark.slow
        ),
    ],
    ids=["topk", "unpacked", "filtered zarr", "adaptive"],
)
def test_a_small_corpus_is_counted_and_its_bytes_are_near(
    teacher: Path, corpus: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    found = plan(plan_options(teacher, corpus, **changes))
    made = dump(dump_options(teacher, corpus, tmp_path / "c", **changes))
    for name in ("documents", "rows", "labels"):
        assert found[name] == made[name]
    assert found["sampled"]["share"] == 1 and found["shards"] == made["shards"]["planned"]
    assert found["sampled"]["dropped"] == made["dropped"]
    assert found["positions"] == pytest.approx(made["positions"], rel=NEAR)
    assert found["bytes"] == found["selections"][0]["bytes"] == pytest.approx(made["bytes"], rel=NEAR)
    assert found["bytes_per_position"] == pytest.approx(made["bytes_per_position"], rel=NEAR)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ipps 12", {"select": "ipps", "k": 12}),
        pytest.param("topp 0.9", {"select": "topp", "top_p": 0.9, "k": None}, marks=pytest.mark.slow),
        pytest.param("topk 128", {"k": 128}, marks=pytest.mark.slow),
    ],
)
def test_other_selections_take_what_they_would_take(
    teacher: Path, corpus: Path, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    found = plan(plan_options(teacher, corpus, precision=None))
    assert [line["chosen"] for line in found["selections"]] == [True] + 5 * [False]
    made = dump(dump_options(teacher, corpus, tmp_path / "c", precision=None, **changes))
    assert of(found, name)["bytes"] == pytest.approx(made["bytes"], rel=NEAR)


def test_a_selection_that_cannot_be_had_says_why(teacher: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = (Selection(kind="topk", k=321), Selection(kind="ipps", k=12))
    monkeypatch.setattr(selections, "OTHERS", others)
    changes = {"select": "sample", "k": None, "draws": 8, "temperatures": "2", "sample_temperature": 2.0, "batches": 1}
    found = plan(plan_options(teacher, corpus, **changes))
    assert "320" in of(found, "topk 321")["problem"] and of(found, "topk 321")["bytes"] is None
    assert of(found, "sample 8")["problem"] is None and of(found, "sample 8")["bytes"] > 0
    assert of(found, "ipps 12")["bytes"] > 0  # drawn at T = 1, which is always kept


def test_a_sample_stands_for_the_whole(teacher: Path, corpus: Path) -> None:
    inputs = open_inputs(plan_options(teacher, corpus, docs_per_shard=6))
    whole = take_sample(inputs, 4)
    part = take_sample(inputs, 4, whole.characters // 3)
    assert whole.share == 1 and len(whole.parts) == len(inputs.plan)
    assert 0.25 < part.share < 0.6 and len(part.parts) == 16
    documents = [d for each in part.parts for row in each.rows for d in row.piece_documents]
    assert min(documents) < 10 and max(documents) > 95  # from everywhere, not only the first
    assert part.tokens / part.share == pytest.approx(whole.tokens, rel=0.1)
    assert part.labels / part.share == pytest.approx(whole.labels, rel=0.1)


def test_machines_share_the_shards_but_not_the_start(teacher: Path, corpus: Path) -> None:
    found = plan(plan_options(teacher, corpus, batches=1, workers=3, price_per_hour=7.0))
    one, three = found["machines"]
    seconds = found["seconds"]
    fixed = seconds["start"] + seconds["pilot"]
    assert one["seconds"] == seconds["total"] == pytest.approx(sum(v for k, v in seconds.items() if k != "total"))
    assert three["seconds"] == pytest.approx(fixed + (seconds["total"] - fixed) * 2 / 4)  # two of four shards
    assert three["price"] == pytest.approx(3 * three["seconds"] / 3600 * 7)


def test_the_cache_against_the_teacher_in_the_loop(
    teacher: Path, corpus: Path, student_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(plan_module, "in_own_process", lambda function, *args: function(*args))
    found = plan(plan_options(teacher, corpus, student=str(student_config), students=3, epochs=2.0, batches=2))
    training = found["training"]
    assert training["passes"] == 6
    names = ("student_seconds_per_pass", "reading_seconds_per_pass", "teacher_seconds_per_pass")
    student, reading, of_teacher = (training[name] for name in names)
    assert 0 < reading < student and of_teacher > 0
    at = training["break_even_passes"]  # there, both ways take as long
    if at is None:
        assert of_teacher <= reading and not training["pays"]
    else:
        live = student - reading + of_teacher
        assert found["seconds"]["total"] + at * student == pytest.approx(at * live)
        assert training["pays"] == (at < 6)
    assert found["memory"]["training"]["peak_bytes"] >= found["memory"]["dump"]["peak_bytes"] > 1 << 26
    assert not list(tmp_path.iterdir())  # nothing is left
    text = io.StringIO()
    print_plan(Console(file=text, width=120), found)
    for words in ("ipps 12", "bytes per position", "teacher hours", "3 students for 2 epochs", "of disk", "training: "):
        assert words in text.getvalue()


def test_a_student_that_does_not_fit_is_a_problem(
    teacher: Path, corpus: Path, student_config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise memory.NoRoomError

    monkeypatch.setattr(plan_module, "in_own_process", killed)
    found = plan(plan_options(teacher, corpus, student=str(student_config), batches=1))
    assert found["training"] is None and found["memory"]["training"] is None
    (problem,) = found["problems"]
    assert "does not fit" in problem and str(student_config) in problem


@pytest.mark.slow
def test_a_process_of_its_own_says_how_it_ended() -> None:
    assert memory.in_own_process(os.getpid) != os.getpid()
    with pytest.raises(memory.NoRoomError):
        memory.in_own_process(os._exit, 9)
    with pytest.raises(ConfigError, match="nowhere"):
        memory.in_own_process(find_device, "nowhere")


@pytest.mark.slow
def test_memory_is_that_of_the_real_runs(teacher: Path, corpus: Path, student_config: Path, tmp_path: Path) -> None:
    asked = ["--teacher", teacher, "--corpus", corpus, "--seq-len", "64", "--docs-per-shard", "25", "--device", "cpu"]

    def run(command: str, *options: object) -> tuple[dict[str, Any], int]:
        words = [sys.executable, "-m", "kdcache_cli", command, *map(str, options), "--json"]
        output, peak = output_and_peak(words)
        return json.loads(output), peak

    planned, _ = run("plan", *asked, "--student", student_config)  # in a process of its own: what it took itself counts
    _, dumped = run("dump-teacher", *asked, "--out", tmp_path / "c")
    _, trained = run("train-student", "--cache", tmp_path / "c", "--student", student_config, "--out", tmp_path / "s",
                     "--device", "cpu", "--steps", "4")  # fmt: skip
    # Of models this small, libraries are nearly all of it, and the commands do not load the same ones.
    assert planned["memory"]["dump"]["peak_bytes"] == pytest.approx(dumped, rel=0.3)
    assert planned["memory"]["training"]["peak_bytes"] == pytest.approx(trained, rel=0.3)


def test_what_will_not_fit_is_said(
    teacher: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = plan_module.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(plan_module.shutil, "disk_usage", lambda _: full)
    monkeypatch.setattr(memory.os, "sysconf", lambda _: 1)
    disk, workers, too_large = plan(plan_options(teacher, corpus, batches=1, out=str(tmp_path / "a/b"), workers=9))[
        "problems"
    ]
    assert "1,000 free" in disk and "5 of them" in workers and "the dump takes" in too_large
    assert not (tmp_path / "a").exists()


def test_bad_options_are_named(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    for changes, words in (
        ({"batches": 0}, "batches is 0"),
        ({"workers": 0}, "workers is 0"),
        ({"epochs": 0.0}, "epochs is 0"),
        ({"price_per_hour": -1.0}, "price_per_hour is -1"),
        ({"worker": "0/2"}, "worker is 0/2"),
    ):
        with pytest.raises(ConfigError, match=words):
            plan_options(teacher, corpus, **changes)
    with pytest.raises(ModelError, match="nowhere"):
        plan(plan_options(teacher, corpus, student=str(tmp_path / "nowhere.json")))


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize(
    ("corpus_name", "name", "seq_len", "documents"),
    [("wikitext2-valid.txt", "stories260K", 256, 100), ("tinystories.txt", "lab32k", 512, 30)],
)
def test_bytes_are_near_for_real_teachers(
    assets: Path, tmp_path: Path, corpus_name: str, name: str, seq_len: int, documents: int
) -> None:
    changes: dict[str, Any] = {
        "seq_len": seq_len, "limit_docs": documents, "docs_per_shard": 10, "precision": None, "batch_rows": 4, "k": 64,
    }  # fmt: skip
    where = (assets / "models" / name, assets / "text" / corpus_name)
    found = plan(plan_options(*where, **changes))
    for line, more in (("topk 64", {}), ("ipps 12", {"select": "ipps", "k": 12})):
        made = dump(dump_options(*where, tmp_path / line, **{**changes, **more}))
        assert of(found, line)["bytes"] == pytest.approx(made["bytes"], rel=NEAR), line
