"""Training: it learns, it normalises by the whole step, it is refused what it cannot do, it resumes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache import open_cache
from kdcache.errors import ConfigError, IncompleteCacheError, IsolationError, KdcacheError, ModelError
from kdcache.student import trainer
from kdcache.student.config import TrainConfig
from kdcache.student.train import train
from tests.making import STUDENT, make_model, make_tokenizer
from tests.processes import python


def options(cache: Path, student: Path, out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "steps": 12, "batch_rows": 4, "lr": 5e-3, "heldout": 0.1, "save_every": 4, "device": "cpu", "soft_weight": 0.9,
    }  # fmt: skip
    return TrainConfig(**{**usual, "cache": str(cache), "student": str(student), "out": str(out), **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def same(one: Path, two: Path) -> bool:
    a, b = weights(one), weights(two)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def figures(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics without what a clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "data_wait_share"} for line in lines]


@pytest.fixture(scope="module")
def run(cache: Path, student_config: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run") / "s"
    return out, train(options(cache, student_config, out, temperature=2.0, eval_every=6))


def test_a_student_learns(run: tuple[Path, dict[str, Any]]) -> None:
    _, summary = run
    before, after = summary["heldout"]["before"], summary["heldout"]["after"]
    assert after["kl"] < before["kl"] and after["nll"] < before["nll"]
    assert after["teacher_nll"] == before["teacher_nll"]
    assert after["delta_nll"] == pytest.approx(after["nll"] - after["teacher_nll"])
    assert after["kl_kind"] == "lower-bound"


def test_what_a_run_leaves_is_a_plain_hugging_face_model(run: tuple[Path, dict[str, Any]], cache: Path) -> None:
    out, summary = run
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(cache / "tokenizer").get_vocab()
    assert json.loads((out / "summary.json").read_text()) == summary
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "heldout" in line] == [6, 12]
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in lines if "loss" in line)
    assert not list(out.rglob("*.partial")) and len(trainer.complete(out)) == 2


def test_evaluate_agrees_with_training(run: tuple[Path, dict[str, Any]], cache: Path, teacher: Path) -> None:
    from kdcache.report.evaluate import evaluate

    out, summary = run
    figures = evaluate(str(out), str(cache), heldout=0.1, teacher=str(teacher), device="cpu")
    for name in ("nll", "kl", "top1_agreement", "teacher_nll"):
        assert figures[name] == pytest.approx(summary["heldout"]["after"][name], abs=1e-6)
    assert figures["dense_kl"] >= figures["kl"] - 1e-6  # the bucket is a lower bound
    assert 0 < figures["acceptance"] < 1
    with pytest.raises(ModelError, match="is not the one that made"):
        evaluate(str(out), str(cache), teacher=str(out), device="cpu")
    with pytest.raises(ConfigError, match="rows is 0"):
        evaluate(str(out), str(cache), rows=0)
    assert evaluate(str(out), str(cache), rows=3, device="cpu")["positions"] < figures["positions"] * 5


def test_a_teacher_measured_against_itself(cache: Path, teacher: Path) -> None:
    from kdcache.report.evaluate import evaluate

    figures = evaluate(str(teacher), str(cache), rows=6, teacher=str(teacher), device="cpu")
    assert abs(figures["kl"]) < 1e-5 and abs(figures["dense_kl"]) < 1e-5 and abs(figures["delta_nll"]) < 1e-5
    assert figures["top1_agreement"] == 1 and figures["acceptance"] == pytest.approx(1, abs=1e-5)


def test_accumulation_is_the_same_step(cache: Path, student_config: Path, tmp_path: Path) -> None:
    """Rows have different numbers of labels: a mean of means would differ in the second digit."""
    one = train(options(cache, student_config, tmp_path / "a", batch_rows=8, accumulate=1, steps=5, lr=1e-3))
    two = train(options(cache, student_config, tmp_path / "b", batch_rows=2, accumulate=4, steps=5, lr=1e-3))
    assert one["positions"] == two["positions"]
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    start = dict(weights_of_fresh(student_config))
    for name in a:
        moved = (a[name] - start[name]).abs().max()
        assert (a[name] - b[name]).abs().max() <= 0.02 * moved + 1e-7, name


def weights_of_fresh(config: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoConfig, set_seed

    set_seed(0)
    return dict(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(config))).state_dict())


def test_the_loss_that_is_logged_is_the_mean_over_the_steps_positions(
    cache: Path, student_config: Path, tmp_path: Path
) -> None:
    from kdcache.isolation import packed_forward
    from kdcache.losses import sparse_kd_loss_from_logits
    from kdcache.student.data import Collator, RowDataset, RunOrder, labelled, split_heldout
    from kdcache.student.mixture import Mixture

    train(options(cache, student_config, tmp_path / "s", batch_rows=3, accumulate=2, steps=1, temperature=2.0))
    logged = json.loads((tmp_path / "s/metrics.jsonl").read_text().splitlines()[0])["loss"]
    opened = open_cache(cache)
    rows = split_heldout(len(opened), 0.1)[0]
    data = RowDataset([opened], [rows])
    batch = Collator([opened])([data[i] for i in RunOrder(Mixture([len(rows)], 0), 6)])
    model = AutoModelForCausalLM.from_config(AutoModelForCausalLM.from_pretrained(tmp_path / "s").config)
    model.load_state_dict(weights_of_fresh(student_config))
    with torch.no_grad():
        logits = packed_forward(model, batch["input_ids"], batch["position_ids"]).logits[labelled(batch)][:, :320]
        loss = sparse_kd_loss_from_logits(
            logits, batch["targets"], labels=batch["labels"][labelled(batch)], temperature=2.0, soft_weight=0.9
        )
    assert logged == pytest.approx(loss.item(), abs=1e-5)


def test_a_student_goes_on_from_a_checkpoint(run: tuple[Path, dict[str, Any]], cache: Path, tmp_path: Path) -> None:
    summary = train(options(cache, run[0], tmp_path / "s", steps=4))
    for name in ("nll", "kl", "top1_agreement"):
        assert summary["heldout"]["before"][name] == pytest.approx(run[1]["heldout"]["after"][name], abs=1e-6)


KILL = """
import os, signal, sys
from pathlib import Path
from kdcache.student import train as module, trainer
from kdcache.student.config import TrainConfig
import json
config = TrainConfig(**json.loads(sys.argv[1]))
promote, where = trainer.promote, sys.argv[2]
def die(*_): os.kill(os.getpid(), signal.SIGKILL)
if where == "half-written":
    from kdcache.student.trainer import DistillationTrainer
    inner = DistillationTrainer._save_optimizer_and_scheduler
    def save(self, folder):
        if self.state.global_step == 8: die()
        inner(self, folder)
    DistillationTrainer._save_optimizer_and_scheduler = save
elif where == "not-renamed":
    def half(staging, out, keep):
        if (staging / "checkpoint-8").exists(): die()
        promote(staging, out, keep)
    trainer.promote = half
elif where == "just-after":
    def whole(staging, out, keep):
        promote(staging, out, keep)
        if (out / "checkpoint-8").exists(): die()
    trainer.promote = whole
elif where == "before-any":
    DistillationTrainer = module.DistillationTrainer
    def early(self, *a, **k): die()
    DistillationTrainer._save_checkpoint = early
module.train(config)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["half-written", "not-renamed", "just-after", "before-any"])
def test_killed_and_resumed_is_the_uninterrupted_run(
    run: tuple[Path, dict[str, Any]], cache: Path, student_config: Path, tmp_path: Path, where: str
) -> None:
    config = options(cache, student_config, tmp_path / "s", temperature=2.0, eval_every=6)
    died = python("-c", KILL, json.dumps(dataclasses.asdict(config)), where)
    assert died.returncode == -signal.SIGKILL, died.stderr
    expected = {"half-written": [4], "not-renamed": [4], "just-after": [4, 8], "before-any": []}[where]
    assert [int(p.name.split("-")[1]) for p in trainer.complete(tmp_path / "s")] == expected
    summary = train(dataclasses.replace(config, resume=True))
    assert summary["heldout"] == run[1]["heldout"]
    assert same(tmp_path / "s", run[0])
    card, other = (folder / "README.md" for folder in (tmp_path / "s", run[0]))
    assert card.read_text().replace(str(tmp_path / "s"), "OUT") == other.read_text().replace(str(run[0]), "OUT")
    assert (tmp_path / "s/curves.png").read_bytes() == (run[0] / "curves.png").read_bytes()
    assert figures(tmp_path / "s") == figures(run[0])
    assert train(dataclasses.replace(config, resume=True))["heldout"] == run[1]["heldout"]  # nothing left to do


def test_a_run_is_not_overwritten_and_not_mixed(
    run: tuple[Path, dict[str, Any]], cache: Path, student_config: Path, tmp_path: Path
) -> None:
    out, _ = run
    config = options(cache, student_config, out, temperature=2.0, eval_every=6)
    with pytest.raises(ConfigError, match="already holds a training run; pass resume=True"):
        train(config)
    with pytest.raises(ConfigError, match=r"differs in lr \(was 0\.005, now 0\.1\)"):
        train(dataclasses.replace(config, lr=0.1, resume=True))
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other files and no training run"):
        train(dataclasses.replace(config, out=str(tmp_path)))


def copy_without(cache: Path, to: Path, *names: str) -> Path:
    shutil.copytree(cache, to)
    for name in names:
        (to / name).unlink()
    return to


def test_bad_input_is_one_sentence(cache: Path, student_config: Path, teacher: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.json"
    small.write_text(json.dumps({"model_type": "llama", **STUDENT, "vocab_size": 300}))
    short = tmp_path / "short.json"
    short.write_text(json.dumps({"model_type": "llama", **STUDENT, "max_position_embeddings": 32}))
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    stranger = tmp_path / "stranger"
    make_tokenizer(stranger, size=300)
    make_model(stranger)
    leaky = tmp_path / "leaky.json"
    leaky.write_text(json.dumps({"model_type": "mamba", "vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 1}))
    half = copy_without(cache, tmp_path / "half", "seal.arrow", "commits/00000.json", "commits/00003.json")
    cases: list[tuple[dict[str, Any], type[KdcacheError], str]] = [
        ({"student": small}, ModelError, r"vocabulary of 300, which does not cover the cache's 320 ids"),
        ({"student": short}, ModelError, r"takes 32 positions, but a row of the cache has 64"),
        ({"student": broken}, ModelError, r"no student can be made of"),
        ({"student": tmp_path / "gone.json"}, ModelError, r"does not exist"),
        ({"student": tmp_path / "gone"}, ModelError, r"does not exist"),
        ({"student": stranger}, ModelError, r"has no token '.+', which row 0 of"),
        ({"student": leaky}, IsolationError, r"lets packed pieces see each other"),
        ({"temperature": 3.0}, ConfigError, r"stores temperature\(s\) 1, 2; choose one"),
        ({"cache": half}, IncompleteCacheError, r"2 of 4 shards are missing; run the same dump-teacher command"),
    ]
    for number, (changes, error, words) in enumerate(cases):
        given = {"cache": cache, "student": student_config, "out": tmp_path / f"out{number}", **changes}
        with pytest.raises(error, match=words) as caught:
            train(options(**given))
        assert "\n" not in str(caught.value)
    out_of_range: list[dict[str, Any]] = [
        {"steps": 0}, {"steps": 3, "epochs": 1.0}, {"lr": 0.0}, {"soft_weight": 1.1}, {"heldout": 0.0},
        {"heldout": 1.0}, {"schedule": "linear"}, {"dtype": "int8"}, {"batch_rows": 0}, {"warmup": 2.0},
        {"temperature": 0.0},
    ]  # fmt: skip
    for changes in out_of_range:
        with pytest.raises(ConfigError):
            options(cache, student_config, tmp_path / "x", **changes)


def test_a_refused_student_leaves_its_folder_free(cache: Path, student_config: Path, tmp_path: Path) -> None:
    small = tmp_path / "small.json"
    small.write_text(json.dumps({"model_type": "llama", **STUDENT, "vocab_size": 300}))
    with pytest.raises(ModelError):
        train(options(cache, small, tmp_path / "s"))
    assert train(options(cache, student_config, tmp_path / "s", steps=1))["steps"] == 1


@pytest.mark.slow
def test_a_run_that_was_killed_before_its_record_starts_anew(cache: Path, student_config: Path, tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s/.train-student.json.tmp").write_text("{")
    assert train(options(cache, student_config, tmp_path / "s", steps=1, resume=True))["steps"] == 1


def test_a_training_that_diverges_says_so(cache: Path, student_config: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the training diverged"):
        train(options(cache, student_config, tmp_path / "s", steps=4, lr=1e30))


@pytest.mark.slow
def test_a_run_is_the_same_under_another_spelling_of_its_paths(
    cache: Path, student_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(options(cache, student_config, tmp_path / "s", steps=2))
    monkeypatch.chdir(student_config.parent)
    train(options(cache, Path(student_config.name), tmp_path / "." / "s", steps=2, resume=True))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError,
        match=r"batch_rows 4 x accumulate 1 x 2 rank\(s\) is 8 rows a step, but the run in .* takes 4 "
        r"\(4 x 1 x 1\); choose numbers whose product is that",
    ):
        train(options(cache, student_config, tmp_path / "s", steps=2, resume=True))


@pytest.mark.slow
def test_two_ranks_from_a_fresh_folder(cache: Path, student_config: Path, tmp_path: Path) -> None:
    """Two ranks of one row each make the steps of one rank of two, and print one summary."""
    arguments = [
        "train-student", "--cache", str(cache), "--student", str(student_config), "--steps", "5", "--lr", "1e-3",
        "--heldout", "0.1", "--device", "cpu", "--json",
    ]  # fmt: skip
    two = python(  # its ranks are interpreters that are started anew
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kdcache_cli", *arguments,
        "--batch-rows", "1", "--out", tmp_path / "two", env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    summary = json.loads(two.stdout)
    one = train(options(cache, student_config, tmp_path / "one", batch_rows=2, steps=5, lr=1e-3, soft_weight=1.0))
    assert summary["positions"] == one["positions"]
    assert summary["heldout"]["after"]["nll"] == pytest.approx(one["heldout"]["after"]["nll"], abs=1e-4)


@pytest.mark.slow
def test_the_teacher_is_not_needed(cache: Path, student_config: Path, tmp_path: Path) -> None:
    """Any temperature is exact where everything is kept; and a copied cache has no ties to its teacher."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(cache, moved)
    assert train(options(moved, student_config, tmp_path / "s", steps=2))["steps"] == 2


def test_a_full_cache_trains_at_any_temperature(
    teacher: Path, corpus: Path, student_config: Path, tmp_path: Path
) -> None:
    from kdcache.teacher.dump import dump
    from tests.making import dump_options

    dump(dump_options(teacher, corpus, tmp_path / "c", select="full", temperatures="1", limit_docs=60))
    summary = train(options(tmp_path / "c", student_config, tmp_path / "s", temperature=3.5, steps=4))
    assert summary["heldout"]["after"]["kl_kind"] == "dense"
    assert summary["heldout"]["after"]["kl"] < summary["heldout"]["before"]["kl"]
