"""What a run leaves to be read: the card, the curves, the versions."""

from __future__ import annotations

import dataclasses
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from kdcache_cli.main import app
from typer.testing import CliRunner

import kdcache
from kdcache import open_cache
from kdcache.student import model_card
from kdcache.student.config import TrainConfig
from kdcache.student.train import train


def options(cache: Path, student: object, out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {"steps": 4, "batch_rows": 4, "lr": 5e-3, "heldout": 0.1, "eval_every": 2, "device": "cpu"}
    return TrainConfig(**{**usual, "cache": (str(cache),), "student": str(student), "out": str(out), **changes})


@pytest.fixture(scope="module", autouse=True)
def curves() -> None:
    """They are drawn here."""


@pytest.fixture(scope="module")
def run(cache: Path, student_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Any]:
    config = options(cache, student_config, tmp_path_factory.mktemp("run") / "s")
    return config, train(config)


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    found = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def test_the_card_says_from_what_and_how_well(run: tuple[TrainConfig, Any], cache: Path, teacher: Path) -> None:
    config, summary = run
    card, manifest = (Path(config.out) / "README.md").read_text(), open_cache(cache).manifest
    assert front_matter(card) == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["distillation", "kdcache"],
    }  # fmt: skip
    for words in (
        str(teacher), manifest.teacher_sha256, manifest.corpus_sha256, manifest.sha256, "kind=topk k=8", "forward-kl",
        f"torch {torch.__version__}", f"| steps | {summary['steps']}, of 4 rows each |", "fresh weights from seed 0",
        f"| nll | {summary['heldout']['before']['nll']:.4f} | {summary['heldout']['after']['nll']:.4f} |",
        f"| rows | {summary['rows']['train']} trained on, {summary['rows']['heldout']} held out |", "(curves.png)",
    ):  # fmt: skip
        assert words in card, words
    assert summary["curves"] == "curves.png"


def test_a_finished_run_keeps_its_card(run: tuple[TrainConfig, Any]) -> None:
    card = Path(run[0].out) / "README.md"
    written = card.read_text()
    card.write_text(written + "\nMy own words.\n")
    train(dataclasses.replace(run[0], resume=True))
    assert card.read_text() == written + "\nMy own words.\n"
    card.write_text(written)


def test_the_run_names_its_cache_and_versions(run: tuple[TrainConfig, Any], cache: Path) -> None:
    record = json.loads((Path(run[0].out) / "train-student.json").read_text())
    assert open_cache(cache).manifest.sha256 in json.dumps(record["caches"])
    expected = (platform.python_version(), torch.__version__, transformers.__version__, kdcache.__version__)
    assert tuple(record[name] for name in ("python", "torch", "transformers", "kdcache")) == expected


def test_a_resumed_run_may_have_other_versions(run: tuple[TrainConfig, Any]) -> None:
    path = Path(run[0].out) / "train-student.json"
    written = path.read_text()
    path.write_text(json.dumps({**json.loads(written), "transformers": "1.0", "python": "2.7"}))
    assert train(dataclasses.replace(run[0], resume=True)) == run[1]
    path.write_text(written)


MANY = {
    "student": "org/model", "out": "a folder/it's", "temperature": "2:1", "lr": 1e-5, "resume": True, "steps": None,
    "epochs": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, MANY], ids=["few", "many"])
def test_the_command_of_the_card_is_the_run_again(
    run: tuple[TrainConfig, Any], changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(run[0], **changes)
    asked: list[TrainConfig] = []

    def remember(given: TrainConfig, *_: Any) -> Any:
        asked.append(given)
        return run[1]

    monkeypatch.setattr("kdcache.student.train.train", remember)
    name, *arguments = shlex.split(model_card.command(config))
    assert name == "kdcache" and "--resume" not in arguments
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.stderr
    assert asked == [dataclasses.replace(config, resume=False)]


def make_card(config: TrainConfig, cache: Path, summary: Any, **origin: Any) -> str:
    manifest = open_cache(cache).manifest
    other = dataclasses.replace(manifest, origin={**manifest.origin, **origin})
    return model_card.make_card(config, {config.cache[0]: other, "second": manifest}, 8, summary, None)


def test_names_from_elsewhere_break_neither_the_front_matter_nor_a_table(
    run: tuple[TrainConfig, Any], cache: Path, tmp_path: Path
) -> None:
    bad = "x` | y\n---\nlicense: stolen\n| a | b |"
    config = dataclasses.replace(run[0], student='org/na: "me" # \u00e9\U0001f600')
    card = make_card(config, cache, run[1], teacher=bad, corpus=None)
    assert front_matter(card)["base_model"] == config.student
    assert "license" not in front_matter(card) and "\nlicense" not in card
    (line,) = [line for line in card.splitlines() if line.startswith("| teacher |")]
    assert line.count("|") == 4  # a name column and one for each of two caches
    assert "curves" not in card
    folder = tmp_path / "deep" / "base"
    folder.mkdir(parents=True)
    assert (
        front_matter(make_card(dataclasses.replace(config, student=str(folder)), cache, run[1]))["base_model"] == "base"
    )


def test_the_curves_are_a_picture_of_the_run(run: tuple[TrainConfig, Any]) -> None:
    from matplotlib.image import imread

    path = Path(run[0].out) / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(path)
    assert pixels.shape[0] > 500 and pixels.shape[1] > 800
    colours = {tuple(c) for c in (pixels[..., :3].reshape(-1, 3) * 255).round().astype(int).tolist()}
    assert {(255, 255, 255), (0x0B, 0x6E, 0x99), (0xC1, 0x44, 0x0E)} <= colours  # paper, training, held out
    assert len(colours) > 20


def test_without_matplotlib_a_run_goes_on_and_says_so(
    cache: Path, student_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["train-student", "--cache", cache, "--student", student_config, "--out", tmp_path / "s", "--steps", 2]
    result = CliRunner().invoke(app, [*map(str, arguments), "--device", "cpu"])
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("no curves.png: matplotlib is not installed (pip install 'kdcache[plots]')") == 1
    assert not (tmp_path / "s/curves.png").exists() and "curves" not in (tmp_path / "s/README.md").read_text()
    assert json.loads((tmp_path / "s/summary.json").read_text())["curves"] is None
    assert "before" in result.stdout and "ece" in result.stdout
