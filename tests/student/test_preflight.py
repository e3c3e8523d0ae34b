"""What a run needs of the machine: packages, GPUs, memory. Refused in a sentence, before anything is written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdcache.errors import ConfigError, ModelError
from kdcache.student import preflight
from kdcache.student.config import TrainConfig
from kdcache.student.train import train


def options(cache: Path, student: Path, out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {"steps": 4, "batch_rows": 4, "lr": 5e-3, "heldout": 0.1, "device": "cpu"}
    return TrainConfig(**{**usual, "cache": str(cache), "student": str(student), "out": str(out), **changes})


def test_tensorboard_holds_what_metrics_hold(cache: Path, student_config: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, environment = tmp_path / "s", dict(os.environ)
    train(options(cache, student_config, out, log_to="tensorboard", eval_every=2))
    assert dict(os.environ) == environment
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for tag, told in (
        ("train/loss", {line["step"]: line["loss"] for line in lines if "loss" in line}),
        ("train/kl", {line["step"]: line["kl"] for line in lines if "kl" in line}),
        ("train/learning_rate", {line["step"]: line["learning_rate"] for line in lines if "learning_rate" in line}),
        ("eval/kl", {line["step"]: line["heldout"]["kl"] for line in lines if "heldout" in line}),
    ):
        assert {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(told, rel=1e-6)
        assert list(told) == ([2, 4] if tag == "eval/kl" else [1, 2, 3, 4]), tag


def test_nothing_is_logged_unasked(cache: Path, student_config: Path, tmp_path: Path) -> None:
    train(options(cache, student_config, tmp_path / "s", steps=1))
    assert not list((tmp_path / "s").rglob("*tfevents*"))


def test_a_tracker_that_is_not_there(
    cache: Path, student_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = preflight.find_spec
    monkeypatch.setattr(preflight, "find_spec", lambda name: None if name == "wandb" else found(name))
    with pytest.raises(ConfigError, match="log_to wandb needs the package wandb, which is not installed: pip"):
        train(options(cache, student_config, tmp_path / "s", log_to="tensorboard,wandb"))
    for name in ("tensorbord", "all", "", "tensorboard,none"):
        with pytest.raises(ConfigError, match="is not none, tensorboard, wandb, or both"):
            options(cache, student_config, tmp_path / "s", log_to=name)
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_recomputed_activations_make_the_same_student(
    cache: Path, student_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    inner, calls = LlamaMLP.forward, []

    def counting(self: Any, hidden: torch.Tensor) -> Any:
        calls.append(torch.is_grad_enabled())
        return inner(self, hidden)

    monkeypatch.setattr(LlamaMLP, "forward", counting)
    for name, recompute in (("a", True), ("b", False)):
        calls.clear()
        train(options(cache, student_config, tmp_path / name, gradient_checkpointing=recompute))
        assert sum(calls) == 4 * (1 + recompute)  # one layer, four steps
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_student_that_cannot_recompute(
    cache: Path, student_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ModelError, match="LlamaForCausalLM cannot be trained with gradient_checkpointing"):
        train(options(cache, student_config, tmp_path / "s", gradient_checkpointing=True))
    assert not (tmp_path / "s").exists()


def test_sharding_is_refused_where_trainer_would_train_copies(
    cache: Path, student_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    config = options(cache, student_config, tmp_path / "s", fsdp=True)
    with pytest.raises(ConfigError, match="fsdp needs GPUs, but the device is cpu, where Trainer would"):
        train(config)
    assert not (tmp_path / "s").exists()
    gpu = torch.device("cuda")
    preflight.require_environment(config, gpu)
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(ConfigError, match="fsdp needs several ranks, but there is one: start this command with"):
        preflight.require_environment(config, gpu)


@pytest.mark.filterwarnings("ignore:.*bf16.*:UserWarning")
@pytest.mark.parametrize("recompute", [False, True])
def test_trainer_is_asked_for_the_second_fsdp(
    recompute: bool, cache: Path, student_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdcache.student.trainer import arguments

    config = options(cache, student_config, tmp_path / "s", fsdp=True, gradient_checkpointing=recompute)
    args = arguments(config, 4, torch.device("cpu"), remote=False)
    plugin = args.fsdp_plugin_args
    assert plugin["fsdp_version"] == 2 and plugin["activation_checkpointing"] == recompute
    assert plugin["state_dict_type"] == "FULL_STATE_DICT"
