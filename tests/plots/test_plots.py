"""Plots: their numbers against dense oracles, and their pictures as files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from kdcache_cli.main import app
from typer.testing import CliRunner

from kdcache import Selection, open_cache, select
from kdcache.plots.squared_error import KnownProbabilities, fewer_draws, redrawn_ipps
from kdcache.student.curves import BEFORE, METRICS
from kdcache.teacher.dump import dump
from tests.making import dump_options

N, V = 40, 60


def logits(scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(N, V, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def known(given: torch.Tensor, rule: Selection) -> KnownProbabilities:
    targets = select(given.float(), rule)
    return KnownProbabilities.of(targets, V, rule.labelled)


def oracle_ipps(p: torch.Tensor, k: int) -> torch.Tensor:
    """Sum of p (tau - p) over the lights, tau by bisection, one position after the other."""
    errors = []
    for row in p:
        low, high = 1e-12, 1.0
        for _ in range(200):
            tau = (low + high) / 2
            low, high = (tau, high) if float((row / tau).clamp(max=1).sum()) > k else (low, tau)
        light = row < high
        errors.append(float((row[light] * (high - row[light])).sum()))
    return torch.tensor(errors, dtype=torch.float64)


def test_errors_are_those_of_a_dense_oracle_and_bounds_hold() -> None:
    given = logits()
    p = given.float().double().softmax(-1)
    everything, some = known(given, Selection("full")), known(given, Selection("topk", k=16))
    squares = p.square().sum(-1)
    for k in (2, 5, 16):
        exact = oracle_ipps(p, k)
        low, high = everything.ipps(k)
        assert torch.allclose(low, exact, atol=1e-6) and torch.equal(low, high)
        low, high = some.ipps(k)
        assert (low <= exact + 1e-6).all() and (exact <= high + 1e-6).all()
        kept = select(given.float(), Selection("topk", k=k))
        exact = squares - p.sort(-1, descending=True).values[:, :k].square().sum(-1)
        low, high = some.truncated(kept)
        assert (low <= exact + 1e-6).all() and (exact <= high + 1e-6).all()
        assert torch.allclose(everything.truncated(kept)[1], exact, atol=1e-6)
    low, high = some.sample(7)
    assert (low <= (1 - squares) / 7 + 1e-6).all() and ((1 - squares) / 7 <= high + 1e-6).all()
    assert (some.high - some.low).mean() > 1e-7  # the bounds say something


def test_errors_of_drawn_targets() -> None:
    p = logits()[:1].float().double().softmax(-1)
    many = logits()[:1].float().expand(4000, -1)
    keys = torch.stack([torch.zeros(4000), torch.arange(4000), torch.zeros(4000)], -1).long()
    drawn = select(many, Selection("sample", draws=12), keys=keys)
    found = fewer_draws(drawn, 12, 5)[0]
    exact = float((1 - p.square().sum()) / 5)
    assert abs(float(found.mean()) - exact) < 5 * float(found.std()) / 4000**0.5
    kept = select(many, Selection("ipps", k=8), keys=keys)
    low, high = (float(end.mean()) for end in redrawn_ipps(kept, 4))
    exact = float(oracle_ipps(p, 4))
    assert low - 0.02 * exact <= exact <= high + 0.02 * exact
    low, high = (float(end.mean()) for end in redrawn_ipps(kept, None))
    assert low == 0 and high >= 0.98 * float(oracle_ipps(p, 8))


def test_kept_mass_and_entropy_are_those_of_the_rows(cache: Path) -> None:
    opened = open_cache(cache)
    targets = torch.cat([row.targets.logprobs[row.targets.count > 0] for row in opened])
    kept = opened.plot(rows=10**6).numbers
    assert kept["positions"] == len(targets) and kept["k"] == [1, 2, 3, 4, 6, 8]
    exact = targets.double().exp().sort(-1, descending=True).values.cumsum(-1)[:, [0, 1, 2, 3, 5, 7]]
    assert kept["mean"][0]["kept_mass"] == pytest.approx(exact.mean(0).tolist(), rel=1e-6)
    assert kept["quantiles"]["0.5"] == pytest.approx(exact.median(0).values.tolist(), abs=2e-3)
    found = opened.plot("entropy", rows=10**6).numbers
    entropies = [row.targets.entropy[row.targets.count > 0].double() for row in opened]
    assert found["mean"] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-6)
    first = [row.targets.entropy[0] for row in opened if row.targets.count[0]]  # a piece begins there
    bins = {(one["from"], one["to"]): one for one in found["by_position"]}
    assert bins[1, 1]["positions"] >= len(first)
    assert sum(one["positions"] for one in found["by_document"]) == kept["positions"]


@pytest.mark.slow
def test_bytes_are_those_of_a_cache(cache: Path, teacher: Path, corpus: Path, tmp_path: Path) -> None:
    opened = open_cache(cache)
    found = opened.plot("selections", rows=10**6).numbers
    points = {(one["kind"], one["name"]): one for one in found["points"]}
    stored = points["topk", "k=8"]
    actual = sum(commit.bytes for commit in opened.commits.values()) / found["positions"]
    assert stored["selection"] == found["stored"] and stored["bytes_per_position"] == pytest.approx(actual, rel=0.06)
    sizes = [points["topk", f"k={k}"]["bytes_per_position"] for k in (2, 4, 8)]
    errors = [points["topk", f"k={k}"]["squared_error"]["high"] for k in (2, 4, 8)]
    assert sizes == sorted(sizes) and errors == sorted(errors, reverse=True)
    assert {one["kind"] for one in found["left_out"]} == {"ipps", "sample"}
    dump(dump_options(teacher, corpus, tmp_path / "f", select="full", limit_docs=8, precision="8"))
    full = open_cache(tmp_path / "f").plot("selections", rows=2).numbers
    assert not full["left_out"] and {one["squared_error"]["is"] for one in full["points"]} == {"exact"}
    whole = {(one["kind"], one["name"]): one["squared_error"]["high"] for one in full["points"]}
    assert whole["ipps", "k=16"] < whole["sample", "draws=16"] and whole["full", "full"] < 1e-9


def invoke(*words: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two trainings, one of which goes on, and an evaluation; their names are no formulas."""
    folder = tmp_path_factory.mktemp("files")
    for name in ("a$x_1$", "b"):
        (folder / name).mkdir()
        lines: list[dict[str, Any]] = [
            {"step": s, "loss": 3 / s, "nll": 2 / s, "kl": 1 / s, "learning_rate": 1e-3} for s in (1, 2, 3)
        ]
        lines.insert(2, {"step": 2, "heldout": {"nll": 1.5, "kl": 0.7, "teacher_nll": 1.0}})
        (folder / name / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "b" / BEFORE).write_text(json.dumps({"nll": 4.0, "kl": 3.0, "teacher_nll": 1.0}))
    bins = [
        {"low": i / 3, "high": (i + 1) / 3, "positions": 2 * i, "confidence": (i + 0.5) / 3 if i else None,
         "accuracy": 0.4 if i else None}
        for i in range(3)
    ]  # fmt: skip
    figures = {"ece": 0.1, "calibration": {"bins": bins}, "teacher_ece": 0.05, "teacher_calibration": {"bins": bins}}
    (folder / "e.json").write_text(json.dumps({"options": {"student": "mine"}, "figures": figures}))
    return folder


@pytest.mark.parametrize(
    "what",
    ["kept-mass", pytest.param("selections", marks=pytest.mark.slow), "entropy", "curves", "calibration"],
)
def test_a_picture_is_drawn(what: str, cache: Path, files: Path, tmp_path: Path) -> None:
    sources = {"curves": [files / "a$x_1$", files / "b"], "calibration": [files / "e.json"]}.get(what, [cache])
    pictures = []
    for name in ("one.svg", "two.SVG", "three.png") if what == "kept-mass" else ("one.svg", "three.png"):
        code, out, error = invoke("plot", what, *sources, "--out", tmp_path / name, "--rows", 3, "--json")
        assert code == 0, error
        pictures.append((tmp_path / name).read_bytes())
        assert json.loads(out)["plot"] == what
    assert b"<svg" in pictures[0] and pictures[-1].startswith(b"\x89PNG")
    assert len(pictures) == 2 or pictures[0] == pictures[1]  # a pure function of the numbers
    assert invoke("plot", what, *sources, "--rows", 3)[1]


def test_what_cannot_be_drawn_is_one_sentence(cache: Path, files: Path, tmp_path: Path) -> None:
    (tmp_path / "there.png").write_text("")
    (tmp_path / "bad.json").write_text('{"figures": [1]}')
    shutil.copytree(files / "b", tmp_path / "run")
    (tmp_path / "run" / METRICS).write_text('{"step": "x", "nll": "y"}\n')
    for words, said in (
        (("pie", cache), "there is no plot pie"),
        (("kept-mass", cache, cache), "kept-mass is of one cache, not of 2"),
        (("kept-mass", cache, "--out", "a.pdf"), "must end in .png or .svg"),
        (("kept-mass", cache, "--out", tmp_path / "there.png"), "exists"),
        (("kept-mass", cache, "--rows", 0), "rows is 0"),
        (("kept-mass", tmp_path / "none"), "none"),
        (("curves", tmp_path), "no folder of a training"),
        (("curves", tmp_path / "run"), "cannot be read"),
        (("calibration", tmp_path / "bad.json"), "no evaluation"),
        (("calibration", cache), "cannot be read"),
    ):
        code, out, error = invoke("plot", *words)
        assert (code, out) == (2, "") and said in error and error.count("\n") == 1, (words, error)
    assert (tmp_path / "there.png").read_text() == ""
