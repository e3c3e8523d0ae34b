"""The private names of transformers and accelerate that a run uses: their signatures, and what they are needed for."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from torch.utils.data import DataLoader, Dataset, SequentialSampler
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments

from kdcache.pretrained import keep_attention_cap
from kdcache.student.private_api import PRIVATE_NAMES, PrivateName
from tests.making import STUDENT

ROOT = Path(__file__).parents[2]


def owner_of(private: PrivateName) -> Any:
    module, _, name = private.owner.rpartition(".")
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("private", [p for p in PRIVATE_NAMES if p.parameters is not None], ids=lambda p: p.name)
def test_signatures(private: PrivateName) -> None:
    found = inspect.signature(getattr(owner_of(private), private.name)).parameters
    assert tuple(found)[1:] == private.parameters


def test_all_that_is_overridden_is_listed() -> None:
    """Every underscored method of Trainer that ours replaces, and every private attribute that these files set."""
    from kdcache.student.trainer import DistillationTrainer

    replaced = {name for name in vars(DistillationTrainer) if name.startswith("_") and hasattr(Trainer, name)}
    listed = {private.name for private in PRIVATE_NAMES}
    ordinary = {"__init__", "__module__", "__doc__", "__dict__", "__weakref__", "__firstlineno__"}
    assert {name for name in replaced if not name.startswith("__")} <= listed
    assert {name for name in replaced if name.startswith("__")} <= ordinary | set(vars(object)) | {
        "__static_attributes__", "__annotations__", "__parameters__", "__orig_bases__",
    }  # fmt: skip


class Numbers(Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = torch.full((4,), -100)
        labels[: index % 4 + 1] = index
        return {"input_ids": torch.full((4,), index), "labels": labels, "shift_labels": labels}


class Recorder(Trainer):  # type: ignore[misc]
    """Replaces what ours replaces, and writes down what it is given."""

    def __init__(self, *args: Any, staging: Path, **kwargs: Any) -> None:
        self.seen: list[Any] = []
        self.staging = staging
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        self.seen.append("sampler")
        return SequentialSampler(self.train_dataset)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.seen.append(([b["input_ids"][:, 0].tolist() for b in batches], int(items)))
        return batches, items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        self.seen.append(int(num_items_in_batch))
        loss = model(input_ids=inputs["input_ids"], use_cache=False).logits.square().mean()
        return (loss, {}) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)
        self.seen.append(float(loss))
        return loss

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.seen.append(sorted(p.name for p in self.staging.iterdir()))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        self.seen.append(("rng", checkpoint))
        super()._load_rng_state(checkpoint)


def make(out: Path, **changes: Any) -> Recorder:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **STUDENT))
    options = {
        "max_steps": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "save_steps": 1,
        "use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 0.0,
        "remove_unused_columns": False,
    }  # fmt: skip
    arguments = TrainingArguments(output_dir=str(out), **{**options, **changes})
    return Recorder(model, arguments, train_dataset=Numbers(), staging=out / "staging")


def test_a_step_of_trainer_calls_what_is_replaced(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    sampler, samples, *step = trainer.seen[:6]
    assert sampler == "sampler"
    assert samples == ([[0, 1], [2, 3]], 1 + 2 + 3 + 4)  # labels of both micro-batches, by `shift_labels`
    assert step[0] == step[2] == 10  # both are told the count of the whole step
    with torch.no_grad():
        own = trainer.model(input_ids=torch.tensor([[0] * 4, [1] * 4]), use_cache=False).logits.square().mean()
    assert step[1] == pytest.approx(float(own), rel=1e-5)  # not divided by the accumulation
    saved = [seen for seen in trainer.seen if isinstance(seen, list)]
    assert saved == [["checkpoint-1"], ["checkpoint-1", "checkpoint-2"]]
    names = {path.name for path in (tmp_path / "staging/checkpoint-1").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    assert json.loads((tmp_path / "staging/checkpoint-1/trainer_state.json").read_text())["global_step"] == 1


def test_resuming_loads_the_state_of_random_numbers(tmp_path: Path) -> None:
    make(tmp_path, max_steps=1).train()
    again = make(tmp_path)
    checkpoint = str(tmp_path / "staging/checkpoint-1")
    again.train(resume_from_checkpoint=checkpoint)
    assert ("rng", checkpoint) in again.seen
    assert [seen for seen in again.seen if isinstance(seen, tuple) and seen[0] != "rng"] == [([[4, 5], [6, 7]], 10)]


def test_attributes(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    assert hasattr(Trainer(trainer.model, trainer.args), "model_accepts_loss_kwargs")
    trainer.args._n_gpu = 5
    assert trainer.args.n_gpu == 5
    assert "lm_head.weight" in trainer.model.all_tied_weights_keys
    assert trainer.model.supports_gradient_checkpointing
    inner = trainer.get_train_dataloader().base_dataloader
    assert isinstance(inner, DataLoader)
    inner.worker_init_fn = None
    inner.collate_fn = list


def test_a_cap_of_the_attention_is_not_left_out() -> None:
    """Up to transformers 5.20 `sdpa` ignores it."""
    sizes = {**STUDENT, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 8}
    for cap, expected in ((2.0, "eager"), (None, "sdpa")):
        config = AutoConfig.for_model("gemma2", **sizes, attn_logit_softcapping=cap)
        model = AutoModelForCausalLM.from_config(config)
        model.config._attn_implementation = "sdpa"  # what older versions set
        keep_attention_cap(model)
        assert model.config._attn_implementation == expected


def test_the_range_of_versions_is_bounded_and_holds_what_is_installed() -> None:
    needed = [Requirement(line) for line in re.findall(r'^    "(.*?)",', (ROOT / "pyproject.toml").read_text(), re.M)
              if re.match(r"(transformers|accelerate)\b", line)]  # fmt: skip
    assert {one.name for one in needed} == {"transformers", "accelerate"}
    for one in needed:
        installed = importlib.import_module(one.name).__version__
        assert {spec.operator for spec in one.specifier} == {">=", "<"}
        assert one.specifier.contains(installed), (one, installed)
    assert transformers.__version__
