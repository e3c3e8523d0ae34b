"""Training where only some labels carry a target: each term is divided by its own positions of the whole step."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments, set_seed

from kdcache import SparseTargets, open_cache, sparse_kd_loss_from_logits
from kdcache.errors import ConfigError
from kdcache.isolation import packed_forward
from kdcache.losses import TAILS, Objective, distil, measure_positions, target_losses
from kdcache.losses.divergence_registry import divergence_names
from kdcache.losses.logit_sources import LinearHead
from kdcache.student.config import TrainConfig
from kdcache.student.data import batches, labelled, split_heldout
from kdcache.student.evaluation import measure
from kdcache.student.mixture import Mixture
from kdcache.student.schedule import Schedule
from kdcache.student.train import train
from kdcache.student.trainer import DistillationTrainer, arguments
from kdcache.teacher.dump import dump
from tests.making import dump_options
from tests.processes import Ranks

CPU = torch.device("cpu")


def options(cache: Path, student: Path, out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "steps": 6, "batch_rows": 4, "lr": 5e-3, "heldout": 0.1, "save_every": 100, "device": "cpu", "soft_weight": 0.7,
    }  # fmt: skip
    return TrainConfig(**{**usual, "cache": str(cache), "student": str(student), "out": str(out), **changes})


def fresh(student: Path) -> Any:
    set_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(student)))


def step_gradients(cache: Path, student: Path, out: Path, **changes: Any) -> tuple[float, dict[str, torch.Tensor]]:
    """The logged loss and the gradients of one optimiser step, before they are clipped."""
    config = options(cache, student, out, steps=1, **changes)
    opened, model, found = open_cache(cache), fresh(student), {}
    args: TrainingArguments = arguments(config, 1, CPU, False)
    args.max_grad_norm = 0.0
    schedule = Schedule.of(config, opened.manifest, 1)
    rows = split_heldout(len(opened), 0.1)[0]
    trainer = DistillationTrainer(model, [opened], [rows], Mixture([len(rows)], 0), config, schedule, args, [])

    def keep(optimiser: torch.optim.Optimizer, *_: Any) -> None:
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})

    trainer.create_optimizer()
    trainer.optimizer.register_step_pre_hook(keep)
    return trainer.train().training_loss, found


@pytest.mark.slow
@pytest.mark.parametrize("soft_weight", [1.0, 0.7])
def test_accumulation_is_the_same_step(
    chosen_cache: Path, student_config: Path, tmp_path: Path, soft_weight: float
) -> None:
    loss, one = step_gradients(chosen_cache, student_config, tmp_path / "a", batch_rows=4, soft_weight=soft_weight)
    for rows in (1, 2):
        changes = {"batch_rows": rows, "accumulate": 4 // rows, "soft_weight": soft_weight}
        other, two = step_gradients(chosen_cache, student_config, tmp_path / str(rows), **changes)
        assert other == pytest.approx(loss, rel=5e-6)
        assert one.keys() == two.keys() and len(one) > 5
        for name, gradient in one.items():
            assert (two[name] - gradient).abs().max() <= 8e-6 * gradient.abs().max(), name


def test_a_step_is_what_each_term_says_alone(chosen_cache: Path, student_config: Path, tmp_path: Path) -> None:
    """The gradient of the step is that of the mean over targets and that of the mean over labels."""
    _, found = step_gradients(chosen_cache, student_config, tmp_path / "a", batch_rows=2, accumulate=2)
    config = options(chosen_cache, student_config, tmp_path / "a", steps=1, batch_rows=4)
    opened, model = open_cache(chosen_cache), fresh(student_config)
    train_rows = split_heldout(len(opened), 0.1)[0]
    batch = next(batches(opened, train_rows[Mixture([len(train_rows)], config.seed).rows(0, 4)], 4))
    mask, targets = labelled(batch), batch["targets"]
    model.train()
    logits = packed_forward(model, batch["input_ids"], batch["position_ids"]).logits[mask][:, :320].double()
    has, labels = targets.count > 0, batch["labels"][mask]
    assert 0 < int(has.sum()) < 0.5 * len(has)
    soft = sparse_kd_loss_from_logits(logits[has], targets[has])
    hard = torch.nn.functional.cross_entropy(logits, labels)
    (0.7 * soft + 0.3 * hard).backward()
    for name, p in model.named_parameters():
        assert (found[name] - p.grad).abs().max() <= 2e-5 * p.grad.abs().max(), name


@pytest.mark.slow
def test_two_ranks_are_one(chosen_cache: Path, student_config: Path, tmp_path: Path) -> None:
    ranks = Ranks(
        2, "-m", "kdcache_cli", "train-student", "--cache", chosen_cache, "--student", student_config, "--steps", "5",
        "--lr", "1e-3", "--heldout", "0.1", "--device", "cpu", "--json", "--soft-weight", "0.7", "--batch-rows", "1",
        "--accumulate", "2", "--out", tmp_path / "two",
    )  # fmt: skip
    told, words = ranks.communicate()
    assert ranks.returncode == 0, words
    one = train(options(chosen_cache, student_config, tmp_path / "one", steps=5, lr=1e-3))
    figures = json.loads(told)["heldout"]["after"]
    for name in ("nll", "kl"):
        assert figures[name] == pytest.approx(one["heldout"]["after"][name], abs=1e-4)
    lines = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("one", "two")]
    for name in ("loss", "nll", "kl", "kept_mass", "top1_agreement"):
        assert lines[0][name] == pytest.approx(lines[1][name], rel=1e-4), name


def test_figures_are_means_over_what_has_a_target(chosen_cache: Path, student_config: Path) -> None:
    model, opened = fresh(student_config), open_cache(chosen_cache)
    rows = list(range(7))
    found = measure(model, opened, rows, CPU, batch_rows=3)
    nll, told = [], []
    with torch.no_grad():
        for batch in batches(opened, rows, 1):
            mask, targets = labelled(batch), batch["targets"]
            logits = packed_forward(model.eval(), batch["input_ids"], batch["position_ids"]).logits[mask][:, :320]
            labels, has = batch["labels"][mask], targets.count > 0
            nll.append(torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none"))
            told.append({k: v.double() for k, v in measure_positions(logits[has], targets[has], labels[has]).items()})
    mean = {name: float(torch.cat([part[name] for part in told]).mean()) for name in told[0]}
    assert found["targets"] == sum(len(part["kl"]) for part in told) < found["positions"] == len(torch.cat(nll))
    assert found["nll"] == pytest.approx(float(torch.cat(nll).mean()), rel=5e-6)
    assert found["delta_nll"] == pytest.approx(mean["nll"] - mean["teacher_nll"], rel=1e-5)
    for name in ("kl", "teacher_nll", "top1_agreement"):
        assert found[name] == pytest.approx(mean[name], rel=1e-5), name
    assert abs(found["delta_nll"] - (found["nll"] - found["teacher_nll"])) > 1e-3  # the positions differ


@pytest.mark.parametrize("soft_weight", [1.0, 0.7])
def test_figures_of_a_step(chosen_cache: Path, student_config: Path, tmp_path: Path, soft_weight: float) -> None:
    train(
        options(
            chosen_cache, student_config, tmp_path / "s", steps=1, batch_rows=3, accumulate=2, soft_weight=soft_weight
        )
    )
    logged = json.loads((tmp_path / "s/metrics.jsonl").read_text().splitlines()[0])
    opened = open_cache(chosen_cache)
    config = options(chosen_cache, student_config, tmp_path / "s", steps=1, batch_rows=6)
    rows = split_heldout(len(opened), 0.1)[0]
    exact = measure(fresh(student_config), opened, rows[Mixture([len(rows)], config.seed).rows(0, 6)], CPU)
    for name in ("kl", "top1_agreement"):
        assert logged[name] == pytest.approx(exact[name], rel=1e-5), name
    nll = exact["nll"] if soft_weight < 1 else exact["delta_nll"] + exact["teacher_nll"]  # of those the loss saw
    assert logged["nll"] == pytest.approx(nll, rel=1e-5)


@pytest.mark.parametrize("loss", [*divergence_names(), *(f"tail {tail}" for tail in TAILS[1:])])
def test_a_position_without_a_target_has_no_distillation_term(
    loss: str, chosen_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the divergence or tail: values and gradients are those of the others alone."""
    monkeypatch.setattr(target_losses, "_warned", set(TAILS))
    targets = SparseTargets.cat([targets for _, targets in open_cache(chosen_cache).read_rows(range(2))])
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(len(targets.count), 8, generator=g, dtype=torch.float64)
    weight = torch.randn(320, 8, generator=g, dtype=torch.float64)
    labels = torch.randint(320, (len(hidden),), generator=g)
    has = targets.count > 0
    tail = loss.removeprefix("tail ")
    base = Objective(loss="forward-kl", tail=tail) if tail != loss else Objective(loss=loss)

    def run(keep: torch.Tensor, soft_weight: float, **more: Any) -> list[torch.Tensor]:
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        source = LinearHead(leaves[0][keep], leaves[1], None)
        objective = dataclasses.replace(base, soft_weight=soft_weight)
        value = distil(source, targets[keep], labels[keep], objective, **more)
        return [value, *torch.autograd.grad(value, leaves)]

    every = torch.ones_like(has)
    alone, among = run(has, 1.0), run(every, 1.0)
    for a, b in zip(alone, among, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    mixed, hard = run(every, 0.6), run(every, 0.0)
    for a, b, c in zip(mixed, alone, hard, strict=True):
        torch.testing.assert_close(a, 0.6 * b + 0.4 * c, rtol=1e-9, atol=1e-12)
    counted = run(every, 0.6, num_items=10.0, num_targets=4.0)
    for a, b, c in zip(counted, alone, hard, strict=True):
        torch.testing.assert_close(a, 0.6 * b * int(has.sum()) / 4 + 0.4 * c * len(has) / 10, rtol=1e-9, atol=1e-12)
    same = run(every, 0.6, num_items=10.0), run(every, 0.6, num_items=10.0, num_targets=10.0)
    assert all(torch.equal(a, b) for a, b in zip(*same, strict=True))  # num_items is the default


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{}, {"soft_weight": 1.0, "batch_rows": 1}, {"position_weights": "confidence"}, {"loss": "reverse-kl"},
     {"tail": "label-sample", "batch_rows": 1}],
    ids=str,
)  # fmt: skip
def test_a_student_learns(chosen_cache: Path, student_config: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    summary = train(options(chosen_cache, student_config, tmp_path / "s", **{"steps": 25, **changes}))
    before, after = summary["heldout"]["before"], summary["heldout"]["after"]
    assert after["kl"] < before["kl"] and 0 < after["targets"] < after["positions"]


@pytest.mark.slow
@pytest.mark.parametrize("select", ["ipps", "topk"])
def test_rows_without_any_target_do_no_harm(
    select: str, sure_teacher: Path, corpus: Path, student_config: Path, tmp_path: Path
) -> None:
    """Most rows have none, so most steps of one row have no distillation term at all."""
    dump(dump_options(sure_teacher, corpus, tmp_path / "c", select=select, positions="entropy>2.75"))
    counts = [int((row.targets.count > 0).sum()) for row in open_cache(tmp_path / "c")]
    assert 0 < sum(count > 0 for count in counts) < 0.6 * len(counts)
    for weight in (1.0, 0.5):
        out = tmp_path / f"s {weight}"
        summary = train(options(tmp_path / "c", student_config, out, batch_rows=1, steps=12, soft_weight=weight))
        assert summary["heldout"]["after"]["nll"] < 20
        losses = [json.loads(line).get("loss") for line in (out / "metrics.jsonl").read_text().splitlines()]
        assert all(loss is None or 0 <= loss < 20 for loss in losses)


def test_a_cache_without_targets_teaches_by_its_labels_alone(
    sure_teacher: Path, corpus: Path, student_config: Path, tmp_path: Path
) -> None:
    dump(dump_options(sure_teacher, corpus, tmp_path / "c", positions="entropy>9"))
    with pytest.raises(ConfigError, match=r"no position of .* carries a target \(positions entropy>9\)"):
        train(options(tmp_path / "c", student_config, tmp_path / "s"))
    assert not (tmp_path / "s").exists()
    summary = train(options(tmp_path / "c", student_config, tmp_path / "s", soft_weight=0.0, eval_every=3))
    before, after = summary["heldout"]["before"], summary["heldout"]["after"]
    assert after["nll"] < before["nll"] and after["targets"] == 0
    assert after["kl"] is after["teacher_nll"] is after["delta_nll"] is after["top1_agreement"] is None
