"""The TRL example: its loss is the cache's, whatever a step is made of, and its adapters are TRL's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from kdcache import open_cache
from kdcache.losses import Objective
from kdcache.student import compute_loss, fuse_head, load_student
from kdcache.student.evaluation import measure
from tests.examples.loading import example

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # TRL's own
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),  # Trainer's default
]


def losses(trainer: object) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]  # type: ignore[attr-defined]


def test_it_learns_and_a_step_is_the_same_in_pieces(cache: Path, student_config: Path, tmp_path: Path) -> None:
    """Rows have different numbers of labels, so a mean of means would differ."""
    main = example("trl_sft").main
    whole = losses(main(str(cache), str(student_config), str(tmp_path / "a"), 6))
    split = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    assert losses(main(str(cache), str(student_config), str(tmp_path / "b"), 6, **split)) == pytest.approx(
        whole, abs=1e-4
    )
    assert whole[-1] < whole[0]

    opened, cpu = open_cache(cache), torch.device("cpu")
    fresh, trained = (
        load_student(str(student_config), opened, cpu, 0),
        AutoModelForCausalLM.from_pretrained(tmp_path / "a"),
    )
    assert measure(trained, opened, range(20), cpu)["kl"] < measure(fresh, opened, range(20), cpu)["kl"]
    assert json.loads((tmp_path / "a/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_its_loss_is_that_of_its_rows(cache: Path, student_config: Path, tmp_path: Path) -> None:
    module = example("trl_sft")
    opened = open_cache(cache)
    trainer = module.main(str(cache), str(student_config), str(tmp_path / "s"), 1, learning_rate=0.0)
    batch = next(iter(trainer.get_train_dataloader()))
    model = load_student(str(student_config), opened, torch.device("cpu"), 0)
    own = compute_loss(model, fuse_head(model, "cpu"), batch, Objective(soft_weight=0.9), vocab_size=320)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(own.item(), rel=5e-6)


def test_adapters(cache: Path, student_config: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    trained = example("trl_sft").main(
        str(cache), str(student_config), str(tmp_path / "s"), 6, config, learning_rate=1e-2
    )
    found = losses(trained)
    assert found[-1] < found[0]
    assert (tmp_path / "s/adapter/adapter_model.safetensors").exists()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "s")
    fresh = load_student(str(student_config), open_cache(cache), torch.device("cpu"), 0)
    assert merged.state_dict().keys() == fresh.state_dict().keys()
    assert torch.equal(merged.lm_head.weight, fresh.lm_head.weight)
    assert not torch.equal(merged.model.layers[0].mlp.up_proj.weight, fresh.model.layers[0].mlp.up_proj.weight)
