"""`evaluate` as a person or a script meets it: one student, several, a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kdcache_cli.main import app
from typer.testing import CliRunner

from kdcache import open_cache
from kdcache.errors import ModelError
from kdcache.student import FusedHead, fuse_head
from tests.making import make_model
from tests.processes import kdcache


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["evaluate", *(str(a) for a in arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three students: A is the teacher itself, B and C are flatter."""
    out = tmp_path_factory.mktemp("students")
    for name, scale in (("A", 8.0), ("B", 4.0), ("C", 1.0)):
        make_model(out / name, scale=scale)
    return out


@pytest.mark.slow
def test_compare_in_a_real_process(cache: Path, folder: Path) -> None:
    done = kdcache("evaluate", "--compare", "A", "B", "C", "--cache", cache, "--rows", 6, "--json", cwd=folder)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = json.loads(done.stdout)["students"]
    assert list(found) == ["A", "B", "C"]
    assert found["A"]["kl"] < found["B"]["kl"] < found["C"]["kl"]
    assert found["A"]["nll_difference"] is None and found["C"]["nll_difference_standard_error"] > 0
    shown = kdcache("evaluate", "--cache", cache, "--rows", 6, "--compare", "A", "B", "C", cwd=folder)
    assert shown.returncode == 0 and shown.stderr == "", shown.stderr
    lines = {line.split("  ")[0]: line for line in shown.stdout.splitlines() if line.strip()}
    assert lines["kl (lower-bound)"].split()[2:] == ["0.0000", "*", *(f"{found[n]['kl']:.4f}" for n in "BC")]
    for name, best in (("nll", min), ("delta nll", min), ("top1 agreement", max), ("ece", min)):
        values = [figures[name.replace(" ", "_")] for figures in found.values()]
        marked = [f"{v:.4f}{' *' if v == best(values) else ''}" for v in values]
        assert lines[name].split() == [*name.split(), *" ".join(marked).split()], name
    assert lines["acceptance bounds"].count(" - ") == 3 and "*" not in lines["teacher nll"]
    assert f"± {found['B']['nll_difference_standard_error']:.4f}" in lines["nll minus that of A"]


@pytest.mark.parametrize("form", ["row", "repeated", "equals", "toml"])
def test_every_way_to_name_several(cache: Path, folder: Path, tmp_path: Path, form: str) -> None:
    a, b = folder / "A", folder / "B"
    (tmp_path / "o.toml").write_text(f'compare = ["{a}", "{b}"]\nrows = 2\n')
    words = {
        "row": ["--rows", 2, "--compare", a, b],
        "repeated": ["--compare", a, "--rows", 2, "--compare", b],
        "equals": [f"--compare={a}", b, "--rows=2"],
        "toml": ["--config", tmp_path / "o.toml"],
    }[form]
    code, out, err = invoke("--cache", cache, *words, "--json", "--device", "cpu")
    assert code == 0, err
    assert list(json.loads(out)["students"]) == [str(a), str(b)]


def test_one_student_shows_its_bins(cache: Path, folder: Path, teacher: Path) -> None:
    code, out, err = invoke("--cache", cache, "--student", folder / "B", "--rows", 4, "--teacher", teacher)
    assert code == 0, err
    for words in ("ece", "teacher ece", "dense kl", "confidence", "acceptance"):
        assert words in out
    figures = json.loads(invoke("--cache", cache, "--student", folder / "B", "--rows", 4, "--json")[1])
    assert "nll_difference" not in figures and figures["acceptance"] is None
    inhabited = [b for b in figures["calibration"]["bins"] if b["positions"]]
    assert all(f"{b['positions']:,}" in out and f"{b['accuracy']:.4f}" in out for b in inhabited)


def test_a_student_whose_head_is_not_known_says_that_its_logits_were_made_whole(
    cache: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = ["--cache", cache, "--compare", folder / "A", folder / "B", "--rows", 2]
    tiled = json.loads(invoke(*usual, "--json")[1])["students"]
    assert {figures["logits"] for figures in tiled.values()} == {"tiles"}
    assert "made whole" not in invoke(*usual)[1]

    def refuse_b(model: Any, device: Any) -> FusedHead:
        if model.config.name_or_path == str(folder / "B"):
            raise ModelError("its logits are not those of a head")
        return fuse_head(model, device)

    monkeypatch.setattr("kdcache.student.evaluation.fuse_head", refuse_b)
    found = json.loads(invoke(*usual, "--json")[1])["students"]
    assert [figures["logits"] for figures in found.values()] == ["tiles", "whole"]
    for name in ("nll", "kl", "ece", "top1_agreement", "acceptance_low"):
        assert found[str(folder / "B")][name] == pytest.approx(tiled[str(folder / "B")][name], rel=1e-4), name
    shown = invoke(*usual)[1]
    assert shown.count("made whole") == 1 and "logits of B were made whole" in shown


def test_a_prompt_side_by_side(cache: Path, folder: Path, teacher: Path) -> None:
    usual = ["--cache", cache, "--compare", folder / "A", folder / "C", "--prompt", "The fox", "--top", 4]
    code, out, err = invoke(*usual, "--json")
    assert code == 0, err
    answer = json.loads(out)
    assert answer["teacher"]["source"] == "cache" and list(answer["students"]) == [str(folder / n) for n in "AC"]
    code, out, _ = invoke(*usual)
    assert code == 0 and "teacher (cache)" in out and "as stored in row" in out
    for entries in (answer["teacher"]["entries"], *(s["entries"] for s in answer["students"].values())):
        assert len(entries) == 4
        assert all(repr(e["text"]) in out and f"{e['probability']:.4f}" in out for e in entries)
    assert "teacher (live)" in invoke(*usual, "--teacher", teacher)[1]
    code, out, _ = invoke("--cache", cache, "--student", folder / "A", "--prompt", "Line\nbreak")
    assert code == 0 and "the cache holds no piece that begins with this prompt" in out
    assert "'Line\\nbreak'" in out and "teacher (" not in out


def test_an_evaluation_leaves_its_configuration(cache: Path, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "e.json"
    code, printed, err = invoke(
        "--cache", cache, "--student", folder / "A", "--rows", 3, "--device", "cpu", "--out", out, "--json"
    )
    assert code == 0, err
    record, manifest = json.loads(out.read_text()), open_cache(cache).manifest
    assert record["figures"] == json.loads(printed)
    assert record["cache_sha256"] == manifest.sha256 and record["teacher_sha256"] == manifest.teacher_sha256
    assert record["options"]["rows"] == 3 and record["options"]["batch_rows"] == 8
    assert set(record["versions"]) == {"kdcache", "torch", "transformers", "python"}


BAD = [
    ([], "needs either one --student or several as --compare"),
    (["--student", "{A}", "--compare", "{A}"], "either one --student or several"),
    (["--compare", "{A}", "{A}"], "is named twice"),
    (["--compare", "{A}", "nowhere-at-all/"], "does not exist"),
    (["--student", "{A}", "--prompt", ""], "--prompt is empty"),
    (["--student", "{A}", "--prompt", "word " * 200], "but a row of the cache has 64"),
    (["--student", "{A}", "--prompt", "x", "--top", "0"], "--top is 0"),
    (["--student", "{A}", "--prompt", "x", "--rows", "3"], "it excludes --heldout and --rows"),
    (["--compare", "{A}", "{A}", "--prompt", "x"], "is named twice"),
    (["--student", "{A}", "--prompt", "x", "--teacher", "{B}"], "is not the one that made"),
    (["--student", "{A}", "--out", "{A}/config.json"], "exists already"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD, ids=[words for _, words in BAD])
def test_bad_input_is_one_sentence_and_exit_2(cache: Path, folder: Path, arguments: list[str], words: str) -> None:
    places = {name: folder / name for name in "ABC"}
    code, out, err = invoke("--cache", cache, *(a.format(**places) for a in arguments))
    assert code == 2 and out == ""
    assert err.startswith("error: ") and words in err and err.count("\n") == 1, err


def test_compare_without_a_name_is_a_usage_error(cache: Path) -> None:
    done = kdcache("evaluate", "--cache", cache, "--compare")
    assert done.returncode == 2 and "--compare" in done.stderr and done.stderr.count("\n") == 1
