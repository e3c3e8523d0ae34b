"""Two ranks under Trainer, which copies the student to each (DDP) or shards it (FSDP2), take the steps of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from kdcache.teacher.dump import dump
from tests.making import dump_options, make_model
from tests.processes import Ranks

STEPS = 8


def run(
    cache: Path, student: Path, out: Path, ranks: int, *more: str, module: str = "kdcache_cli"
) -> list[dict[str, float]]:
    """The lines of metrics.jsonl of the command."""
    process = Ranks(
        ranks, "-m", module, "train-student", "--cache", str(cache), "--student", str(student), "--out", str(out),
        "--steps", str(STEPS), "--batch-rows", str(4 // ranks), "--accumulate", "2", "--lr", "5e-3", "--heldout", "0.1",
        "--temperature", "2", "--soft-weight", "0.7", "--device", "cpu", "--dtype", "float32", "--quiet", *more,
    )  # fmt: skip
    _, words = process.communicate()
    assert process.returncode == 0, words
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("data_wait_share", None)  # a time
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["weights", "adapters"])
def test_two_ranks_make_the_loss_curve_of_one(
    lora: bool, cache: Path, student_config: Path, teacher: Path, tmp_path: Path
) -> None:
    """The student has no dropout. Its figures are those of both ranks, and TensorBoard is written by one."""
    student, more = (teacher, ("--lora", "4")) if lora else (student_config, ())
    one = run(cache, student, tmp_path / "one", 1, *more)
    two = run(cache, student, tmp_path / "two", 2, "--log-to", "tensorboard", *more)
    assert [line["step"] for line in one] == [line["step"] for line in two] == list(range(1, STEPS + 1))
    for name in ("loss", "nll", "kl", "top1_agreement", "kept_mass"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], abs=1e-4), name
    if not lora:
        assert one[-1]["loss"] < one[0]["loss"]
    assert len(list((tmp_path / "two/tensorboard").iterdir())) == 1
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert a.keys() == b.keys()
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-3


@pytest.mark.slow
def test_two_ranks_learn_from_two_teachers_as_one_does(
    cache: Path, teacher: Path, corpus: Path, student_config: Path, tmp_path: Path
) -> None:
    shutil.copytree(teacher, tmp_path / "other")
    make_model(tmp_path / "other", scale=4.0, num_hidden_layers=1)
    dump(dump_options(tmp_path / "other", corpus, tmp_path / "c", k=12))
    pool = ("--pool", f"{tmp_path / 'c'}:0.5")
    one = run(cache, student_config, tmp_path / "one", 1, *pool)
    two = run(cache, student_config, tmp_path / "two", 2, *pool)
    for name in ("loss", "nll", "kl", "kl/2"):
        assert [line[name] for line in two] == pytest.approx([line[name] for line in one], abs=1e-4), name
    assert all(abs(line["kl"] - line["kl/2"]) > 1e-3 for line in one)  # they are not one teacher
    a, b = (json.loads((tmp_path / name / "summary.json").read_text())["heldout"]["after"] for name in ("one", "two"))
    assert [t["kl"] for t in a["teachers"]] == pytest.approx([t["kl"] for t in b["teachers"]], abs=1e-4)


@pytest.mark.slow
def test_two_ranks_of_fsdp2_make_the_loss_curve_of_one(cache: Path, student_config: Path, tmp_path: Path) -> None:
    """Sharded on CPUs, which needs some persuasion (sharding_cpus.py, which asserts DTensors); and gone on with."""
    one = run(cache, student_config, tmp_path / "one", 1)
    more = ("--fsdp", "--gradient-checkpointing", "--save-every", "4", "--eval-every", "4")
    lines = run(cache, student_config, tmp_path / "two", 2, *more, module="tests.distributed.sharding_cpus")
    two = [line for line in lines if "loss" in line]
    assert [line["loss"] for line in two] == pytest.approx([line["loss"] for line in one], abs=1e-4)
    whole = load_file(tmp_path / "two/model.safetensors")
    shutil.copytree(tmp_path / "two", tmp_path / "r", ignore=shutil.ignore_patterns("summary.json", "checkpoint-8"))
    again = run(cache, student_config, tmp_path / "r", 2, *more, "--resume", module="tests.distributed.sharding_cpus")
    assert again == lines
    for folder in ("one", "r"):
        other = load_file(tmp_path / folder / "model.safetensors")
        assert other.keys() == whole.keys() and "lm_head.weight" not in other
        assert max((other[name] - whole[name]).abs().max().item() for name in other) < 1e-5
    assert json.loads((tmp_path / "two/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
