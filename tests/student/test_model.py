"""LoRA: adapters learn, the weights beside them stay, and what is saved is a plain model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kdcache.errors import ConfigError
from kdcache.student import preflight
from kdcache.student.config import TrainConfig
from kdcache.student.model import with_adapters
from kdcache.student.train import train
from tests.making import STUDENT, make_model


def options(cache: Path, student: Path, out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {
        "steps": 8, "batch_rows": 4, "lr": 1e-2, "heldout": 0.1, "save_every": 4, "device": "cpu", "lora": 4,
    }  # fmt: skip
    return TrainConfig(**{**usual, "cache": str(cache), "student": str(student), "out": str(out), **changes})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with a head of its own, as peft counts heads among linear layers."""
    folder = tmp_path_factory.mktemp("base")
    make_model(folder, **{**STUDENT, "tie_word_embeddings": False})
    return folder


@pytest.fixture(scope="module")
def run(cache: Path, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("lora") / "s"
    return out, train(options(cache, base, out))


def test_adapters_learn(run: tuple[Path, dict[str, Any]], base: Path, cache: Path) -> None:
    heldout = run[1]["heldout"]
    assert heldout["after"]["kl"] < heldout["before"]["kl"]
    from kdcache.report.evaluate import evaluate

    figures = evaluate(str(run[0]), str(cache), heldout=0.1, device="cpu")
    assert figures["kl"] == pytest.approx(heldout["after"]["kl"], abs=1e-5)  # merged, and measured beside the weights


def test_what_is_saved_is_the_weights_and_the_scaled_update(run: tuple[Path, dict[str, Any]], base: Path) -> None:
    out, _ = run
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    adapter = load_file(out / "adapter/adapter_model.safetensors")
    assert before.keys() == after.keys()
    adapted = set()
    for name, weight in before.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        update = torch.zeros_like(weight)
        if f"{key}.lora_A.weight" in adapter:
            adapted.add(name.rpartition(".")[0].rpartition(".")[2])
            update = 2 * adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]  # alpha / rank
            assert adapter[f"{key}.lora_A.weight"].shape[0] == 4 and update.abs().max() > 0
        torch.testing.assert_close(after[name], weight + update, atol=1e-6, rtol=0)
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert type(plain).__name__ == "LlamaForCausalLM"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft's own
def test_the_adapter_is_one_for_peft(run: tuple[Path, dict[str, Any]], base: Path) -> None:
    from peft import PeftModel

    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run[0] / "adapter")
    tokens = torch.arange(30)[None]
    merged = AutoModelForCausalLM.from_pretrained(run[0])
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, merged(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_run_goes_on_from_a_checkpoint(
    run: tuple[Path, dict[str, Any]], base: Path, cache: Path, tmp_path: Path
) -> None:
    """Which holds the adapter alone."""
    stopped = tmp_path / "s"
    shutil.copytree(
        run[0], stopped, ignore=shutil.ignore_patterns("summary.json", "checkpoint-8", "model.*", "adapter")
    )
    assert train(options(cache, base, stopped, resume=True))["positions"] < run[1]["positions"]
    for name in ("model.safetensors", "adapter/adapter_model.safetensors"):
        whole, resumed = load_file(run[0] / name), load_file(stopped / name)
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole), name


def test_only_adapters_are_trained_and_they_start_at_nothing(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        before = model(tokens).logits
        model = with_adapters(model, 4, seed=0)
        assert torch.equal(model(tokens).logits, before)
    assert all(("lora_" in name) == p.requires_grad for name, p in model.named_parameters())


def test_with_gradient_checkpointing(run: tuple[Path, dict[str, Any]], base: Path, cache: Path, tmp_path: Path) -> None:
    """Where the inputs of a checkpointed layer ask for no gradient."""
    train(options(cache, base, tmp_path / "s", gradient_checkpointing=True))
    one, two = (load_file(folder / "model.safetensors") for folder in (run[0], tmp_path / "s"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-6, rtol=0)


def test_what_cannot_be_adapted_is_refused(
    base: Path, student_config: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"lora 4 needs weights that were trained, but the student .*json has none"):
        train(options(cache, student_config, tmp_path / "s"))
    with pytest.raises(ConfigError, match="lora and fsdp exclude each other"):
        options(cache, base, tmp_path / "s", fsdp=True)
    with pytest.raises(ConfigError, match="lora is -1, but must be at least 0"):
        options(cache, base, tmp_path / "s", lora=-1)
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^lora 4 needs the package peft, .*: pip install 'kdcache\[lora\]'$"):
        train(options(cache, base, tmp_path / "s"))
    assert not (tmp_path / "s").exists()
