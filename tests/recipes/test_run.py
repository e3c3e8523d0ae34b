"""Recipes that are really run: every example at a small size, stopped in each of its stages, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from kdcache_cli.frame import OPTIONS_OF
from kdcache_cli.main import STAGES

from kdcache.errors import ConfigError, StageError
from kdcache.recipes import run as running
from kdcache.recipes.recipe import read_recipe
from kdcache.recipes.run import RecipeRun
from tests.making import TEXTS, make_model
from tests.processes import ReadyMade, kdcache
from tests.recipes.kills import distil, left_behind, stop_in_each_stage

RECIPES = Path(__file__).parents[2] / "examples" / "recipes"
SMALL = {
    "seq_len": 32, "k": 8, "draws": 8, "steps": 2, "first_steps": 2, "epochs": 0.1, "batch_rows": 2, "heldout": 0.3,
    "rounds": 2, "generations": 2, "max_new_tokens": 6, "texts": 8, "intermediate": 32,
}  # fmt: skip
DATA = {"teacher": "{teacher}", "small": "{teacher}", "large": "{other}", "corpus": "{texts}", "prompts": "{texts}"}


class Ready:
    """A `subprocess.Popen` of bytes whose process is forked off a server that has imported everything."""

    def __init__(self, words: Sequence[str], **_: Any) -> None:
        self._process = ReadyMade(*words[1:])

    def communicate(self) -> tuple[bytes, bytes]:
        out, err = self._process.communicate()
        return out.encode(), err.encode()

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def poll(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        self._process.terminate()


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:24]))
    return path


@pytest.fixture(scope="module")
def other(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another teacher of the same vocabulary."""
    folder = Path(shutil.copytree(teacher, tmp_path_factory.mktemp("other") / "t"))
    make_model(folder, scale=4.0)
    return folder


def settings(recipe: Path, teacher: Path, texts: Path, other: Path | None = None) -> list[str]:
    """The values of a recipe's [set] that make it small."""
    places = {"{teacher}": str(teacher), "{texts}": str(texts), "{other}": str(other)}
    values = {**SMALL, **{name: places[place] for name, place in DATA.items()}}
    known = tomllib.loads(recipe.read_text())["set"]
    return [f"{name}={value}" for name, value in values.items() if name in known]


def opened(recipe: Path, out: Path, given: Sequence[str]) -> RecipeRun:
    commands = {name: OPTIONS_OF[name] for name in STAGES}
    return RecipeRun(read_recipe(recipe, given, out, commands), out, (sys.executable, "-m", "kdcache_cli"))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_runs(
    recipe: Path, teacher: Path, other: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running.subprocess, "Popen", Ready)
    given = settings(recipe, teacher, texts, other)
    done = opened(recipe, tmp_path, given).run()
    assert {stage["state"] for stage in done} == {"made"}
    (compared,) = [stage["name"] for stage in done if stage["command"] == "evaluate"]
    again = opened(recipe, tmp_path, given)
    figures = again.result(compared)["students"]
    assert len(figures) >= 2 and all(found["nll"] > 0 for found in figures.values())
    assert {stage["state"] for stage in again.run()} == {"stood"}
    another = [text if not text.startswith("seq_len=") else "seq_len=48" for text in given]
    with pytest.raises(ConfigError, match=r"was made with other options \(seq_len\); choose another folder"):
        opened(recipe, tmp_path, another)


KILLED = [
    pytest.param(path, marks=pytest.mark.slow if path.stem == "data-free" else pytest.mark.long, id=path.stem)
    for path in sorted(RECIPES.glob("*.toml"))
]


@pytest.mark.parametrize("recipe", KILLED)
def test_a_recipe_that_is_stopped_in_each_stage_goes_on_and_ends_the_same(
    recipe: Path, teacher: Path, other: Path, texts: Path, tmp_path: Path
) -> None:
    given = [word for text in settings(recipe, teacher, texts, other) for word in ("--set", text)]
    out = tmp_path / "out"  # the same for both, since paths are recorded
    words = [recipe, "--out", out, *given]
    alone = distil(*words)
    said, err = alone.communicate()
    assert alone.returncode == 0, err
    seconds = {stage["name"]: stage["seconds"] for stage in json.loads(said)["stages"]}
    expected = left_behind(out)
    shutil.rmtree(out)
    codes = [code for *_, code in stop_in_each_stage(words, out, seconds, seed=len(recipe.stem))]
    assert len([code for code in codes if code]) >= len(codes) / 2, codes
    last = distil(*words)
    said, err = last.communicate()
    assert last.returncode == 0, err
    assert json.loads(said)["stages"][0]["state"] == "stood"
    found = left_behind(out)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


ONE = """
[stages.check]
command = "check-data"
teacher = "{0}"
corpus = "{1}"
seq_len = 64

[stages.verify]
cache = "{2}"
after = ["check"]
"""


@pytest.mark.slow
def test_a_stage_that_fails_is_one_sentence(
    teacher: Path, texts: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(ONE.format(teacher, texts, tmp_path / "nothing"))
    done = kdcache("distil", recipe, "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: stage verify (verify): ") and done.stderr.count("\n") == 1
    monkeypatch.setattr(running.subprocess, "Popen", Ready)
    damaged = shutil.copytree(cache, tmp_path / "damaged")
    with (damaged / "shards" / "00001.arrow").open("r+b") as file:
        file.seek(-200, 2)
        file.write(b"\xff" * 8)
    recipe.write_text(ONE.format(teacher, texts, damaged))
    run = opened(recipe, tmp_path / "out", ())
    with pytest.raises(StageError, match=r"stage verify \(verify\) ended with exit code 1") as caught:
        run.run()
    assert caught.value.code == 1
    with pytest.raises(ConfigError, match="stage other is none of check, verify"):
        run.run("other")


def test_one_stage_needs_those_before_it(teacher: Path, texts: Path, cache: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(ONE.format(teacher, texts, cache))
    run = opened(recipe, tmp_path / "out", ())
    with pytest.raises(ConfigError, match="stage verify waits for check, which is not there yet"):
        run.run("verify")
    run.write_options()
    assert sorted(path.name for path in (tmp_path / "out" / "stages").iterdir()) == ["check.toml", "verify.toml"]
    with pytest.raises(ConfigError, match=r"out .*r\.toml is a file, but must be a folder"):
        opened(recipe, recipe, ())
    (tmp_path / "out" / "stages" / "check.json").write_text("{")
    with pytest.raises(ConfigError, match="is no record of a stage"):
        opened(recipe, tmp_path / "out", ())
