"""A student trains without its teacher: nothing of the teacher is opened, and its folder may be gone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kdcache.student.config import TrainConfig
from kdcache.student.train import train
from kdcache.teacher.dump import dump
from tests.making import dump_options, make_model, make_tokenizer
from tests.processes import PATIENCE


@pytest.fixture
def made(corpus: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A teacher, a corpus and a cache of this test's own."""
    teacher, own = tmp_path / "teacher", tmp_path / "corpus.jsonl"
    make_tokenizer(teacher)
    make_model(teacher)
    shutil.copyfile(corpus, own)
    dump(dump_options(teacher, own, tmp_path / "c", limit_docs=40))
    return teacher, own, tmp_path / "c"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_no_file_of_the_teacher_is_opened(made: tuple[Path, Path, Path], student_config: Path, tmp_path: Path) -> None:
    teacher, corpus, cache = made
    log = tmp_path / "trace"
    command = [
        "strace", "-f", "-qq", "-e", "trace=open,openat,openat2", "-o", str(log), sys.executable, "-m", "kdcache_cli",
        "train-student", "--cache", str(cache), "--student", str(student_config), "--out", str(tmp_path / "s"),
        "--steps", "2", "--batch-rows", "4", "--heldout", "0.1", "--device", "cpu", "--quiet",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    opened = log.read_text()
    assert f'"{cache}/shards/' in opened  # so the trace shows what is opened
    for path in (teacher, corpus):
        assert str(path) not in opened


def test_the_teacher_may_be_deleted(made: tuple[Path, Path, Path], student_config: Path, tmp_path: Path) -> None:
    teacher, corpus, cache = made
    shutil.rmtree(teacher)
    corpus.unlink()
    config = TrainConfig(
        cache=str(cache), student=str(student_config), out=str(tmp_path / "s"), steps=8, batch_rows=4, lr=5e-3,
        heldout=0.1, device="cpu",
    )  # fmt: skip
    heldout = train(config)["heldout"]
    assert heldout["after"]["kl"] < heldout["before"]["kl"]
