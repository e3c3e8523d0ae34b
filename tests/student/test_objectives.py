"""What a run can be asked to minimise, what it reports on the way, and that the model it saves does not show it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from kdcache import open_cache
from kdcache.convert import convert
from kdcache.errors import ConfigError, TargetError
from kdcache.losses import TAILS, PositionWeights, divergence_names, target_losses
from kdcache.student.config import TrainConfig
from kdcache.student.data import Collator, RowDataset, RunOrder, split_heldout
from kdcache.student.evaluation import measure
from kdcache.student.mixture import Mixture
from kdcache.student.schedule import Schedule
from kdcache.student.train import train
from kdcache.teacher.dump import dump
from tests.making import dump_options


def options(cache: Path, student: Path, out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "steps": 8, "batch_rows": 4, "lr": 5e-3, "heldout": 0.1, "device": "cpu", "soft_weight": 0.9, "temperature": 2,
    }  # fmt: skip
    return TrainConfig(**{**usual, "cache": str(cache), "student": str(student), "out": str(out), **changes})


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        *({"loss": loss} for loss in divergence_names()),
        *({"tail": tail, "temperature": 1} for tail in TAILS),
        {"soft_schedule": "cosine", "warmup": 0.25},
        {"temperature": "2:1"},
        {"position_weights": "confidence"},
        {"position_weights": "entropy-gate:0.1:"},
        {"position_weights": "student-entropy"},
        {"loss": "forward-kl*0.7+decoupled-kl:1:2*0.1"},
        {"tail": "renormalise-both", "temperature": 3},
        {"gradient_checkpointing": True},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_student_learns(
    changes: dict[str, Any], cache: Path, student_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each divergence, tail and the like; LoRA in test_model.py, schedules in test_schedule.py, draws below."""
    monkeypatch.setattr(target_losses, "_warned", set(TAILS))
    summary = train(options(cache, student_config, tmp_path / "s", **changes))
    before, after = summary["heldout"]["before"], summary["heldout"]["after"]
    assert after["kl"] < before["kl"] and after["nll"] < before["nll"]


def test_the_figures_of_a_step_are_means_over_its_positions(cache: Path, student_config: Path, tmp_path: Path) -> None:
    """Across two micro-batches of unequal numbers of labels; at T = 1, whatever the loss is."""
    train(options(cache, student_config, tmp_path / "s", steps=1, batch_rows=3, accumulate=2, soft_weight=1.0))
    logged = json.loads((tmp_path / "s/metrics.jsonl").read_text().splitlines()[0])
    opened = open_cache(cache)
    rows = split_heldout(len(opened), 0.1)[0]
    taken = [rows[i] for i in RunOrder(Mixture([len(rows)], 0), 6)]
    torch.manual_seed(0)
    from transformers import set_seed

    set_seed(0)
    fresh = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(student_config)))
    exact = measure(fresh, opened, taken, torch.device("cpu"))
    for name in ("nll", "kl", "top1_agreement"):
        assert logged[name] == pytest.approx(exact[name], rel=1e-5), name
    batch = Collator([opened])([RowDataset([opened], [taken])[i] for i in range(len(taken))])
    assert 0 < logged["kept_mass"] < 1 and len(batch["targets"].count) == exact["positions"]
    assert 0 < logged["log_partition"] < 20


def test_a_saved_student_is_plain_and_tied(cache: Path, student_config: Path, tmp_path: Path) -> None:
    train(options(cache, student_config, tmp_path / "s", steps=1))
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(student_config)))
    plain.save_pretrained(tmp_path / "plain")
    found = []
    for folder in (tmp_path / "s", tmp_path / "plain"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            found.append((sorted(file.keys()), json.loads((folder / "config.json").read_text())))
    assert found[0] == found[1]
    assert "lm_head.weight" not in found[0][0] and found[0][1]["architectures"] == ["LlamaForCausalLM"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    assert again.lm_head.weight is again.model.embed_tokens.weight


def manifest(cache: Path, **changes: Any) -> Any:
    return dataclasses.replace(open_cache(cache).manifest, **changes)


def test_a_temperature_steps_through_what_is_stored(cache: Path, student_config: Path, tmp_path: Path) -> None:
    stored = manifest(cache, temperatures=(1.0, 4.0, 2.0, 3.0))
    for given, ladder in (("3:1", [3, 3, 2, 2, 1, 1]), ("1:2", [1, 1, 1, 2, 2, 2]), ("4", [4] * 6), ("2:2", [2] * 6)):
        config = options(cache, student_config, tmp_path, temperature=given)
        schedule = Schedule.of(config, stored, 6)
        assert [schedule.at(i).temperature for i in range(6)] == ladder
        assert schedule.at(6).temperature == ladder[-1]
        assert schedule.at(0).soft_weight == 0.9
    both = options(cache, student_config, tmp_path, temperature="2.5", tail="renormalise-both")
    assert Schedule.of(both, stored, 1).at(0).temperature == 2.5  # which needs no partition
    for bad in ("5", "3:5", "5:1"):
        with pytest.raises(ConfigError, match="temperature 5 is not exact: the cache stores"):
            Schedule.of(options(cache, student_config, tmp_path, temperature=bad), stored, 6)


def test_a_temperature_has_one_spelling(cache: Path, student_config: Path, tmp_path: Path) -> None:
    """A run is resumed only with the same options."""
    for given, told in ((2, "2"), (2.0, "2"), ("2.0", "2"), ("2:2", "2"), ("3.50:1", "3.5:1"), ("1:2", "1:2")):
        assert options(cache, student_config, tmp_path, temperature=given).temperature == told


@pytest.mark.parametrize("temperature", ["", "x", "0", "-1", "inf", "nan", "1:2:3", "2:", 0.0])
def test_a_temperature_that_is_none(temperature: Any, cache: Path, student_config: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"temperature is .*must be positive, or two such as 3:1"):
        options(cache, student_config, tmp_path, temperature=temperature)


def test_bad_objectives_are_refused_before_anything_is_written(
    cache: Path, student_config: Path, tmp_path: Path
) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"loss": "kl"}, "loss kl is not one of forward-kl"),
        ({"tail": "ghost"}, "tail 'ghost' is not one of bucket"),
        ({"loss": "jsd", "tail": "none"}, "tail 'none' is for loss 'forward-kl' only"),
        ({"loss": "forward-kl*0+jsd*0"}, "has weights that sum to 0, so there is nothing to learn from"),
        ({"loss": "sampled-reverse-kl"}, "learns from rollouts, but the cache has no writer_logp"),
        ({"tail": "label-sample"}, "'label-sample' is for temperature 1, not 2"),
        ({"position_weights": "half"}, "are not none, confidence or entropy-gate"),
        ({"position_weights": "entropy-gate:3:1"}, "let nothing through"),
    )
    for changes, words in cases:
        with pytest.raises(ConfigError, match=words):
            train(options(cache, student_config, tmp_path / "s", **changes))
        assert not (tmp_path / "s").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ipps", "sample", "sample+power"])
def test_a_student_learns_from_draws(
    kind: str, teacher: Path, corpus: Path, student_config: Path, tmp_path: Path
) -> None:
    kind, _, power = kind.partition("+")
    draws = {"draws": 8} if kind == "sample" else {}
    if power:
        draws["proposal_power"] = 0.8
    dump(dump_options(teacher, corpus, tmp_path / "c", select=kind, sample_temperature=2.0, limit_docs=80, **draws))
    if power:
        weights = open_cache(tmp_path / "c")[0].targets.weights.sum(-1)
        assert ((weights - 1).abs() > 1e-3).any()
        with pytest.raises(ConfigError, match="proposal_power cannot be thinned out"):
            convert(tmp_path / "c", tmp_path / "d", k=4)
    config = options(tmp_path / "c", student_config, tmp_path / "s", soft_weight=1.0)
    after = train(config)["heldout"]["after"]
    assert after["nll"] < json.loads((tmp_path / "s/heldout-before.json").read_text())["nll"]
    assert after["kl"] is None  # weights of p_2 say nothing of p
    assert "kl" not in json.loads((tmp_path / "s/metrics.jsonl").read_text().splitlines()[0])
    with pytest.raises(TargetError, match=f"loss 'tvd' needs the teacher's probabilities, but {kind} targets"):
        train(dataclasses.replace(config, out=str(tmp_path / "t"), loss="tvd"))


def test_a_cache_of_draws_refuses_what_would_be_biased(cache: Path, student_config: Path, tmp_path: Path) -> None:
    drawn = manifest(cache, selection={"kind": "ipps", "k": 8})
    Schedule.of(options(cache, student_config, tmp_path, temperature=1), drawn, 1)
    with pytest.raises(TargetError, match="loss 'jsd' needs the teacher's probabilities"):
        Schedule.of(options(cache, student_config, tmp_path, temperature=1, loss="jsd"), drawn, 1)
    with pytest.raises(TargetError, match="ipps targets drawn at temperature 1 say nothing of temperature 2"):
        Schedule.of(options(cache, student_config, tmp_path, temperature=2), drawn, 1)
    forced = manifest(cache, selection={"kind": "topk", "k": 8, "force_label": True})
    with pytest.raises(ConfigError, match="label-sample needs labels that are entries only where the selection"):
        Schedule.of(options(cache, student_config, tmp_path, temperature=1, tail="label-sample"), forced, 1)


def test_position_weights(cache: Path) -> None:
    opened = open_cache(cache)
    targets = opened.read_packed(0)[1]
    vocab = opened.manifest.vocab_size
    assert PositionWeights().of(targets, vocab) is None
    confidence = PositionWeights("confidence").of(targets, vocab)
    assert confidence is not None
    torch.testing.assert_close(confidence, 1 - targets.entropy / torch.tensor(float(vocab)).log())
    middle = targets.entropy.median().item()
    for rule, passes in (
        (f"entropy-gate:{middle}:", targets.entropy >= middle),
        (f"entropy-gate::{middle}", targets.entropy <= middle),
        (f"entropy-gate:{middle}:{middle + 1}", (targets.entropy >= middle) & (targets.entropy <= middle + 1)),
    ):
        found = PositionWeights(rule).of(targets, vocab)
        assert found is not None and torch.equal(found, passes.float()) and 0 < found.mean() < 1
