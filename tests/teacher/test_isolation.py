"""The probe passes models that keep packed pieces apart and refuses those that do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdcache.errors import IsolationError
from kdcache.isolation import packed_forward, probe
from tests.making import TEACHER, dump_options

SHAPE = {**TEACHER, "head_dim": 8, "pad_token_id": 0}
GPT = {"vocab_size": 384, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
STATE = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
OPT = {"vocab_size": 384, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
       "max_position_embeddings": 128, "word_embed_proj_dim": 32}  # fmt: skip

JAMBA = {**SHAPE, "num_experts": 2, "use_mamba_kernels": False}


def build(kind: str, options: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **options)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", SHAPE),
        ("qwen2", SHAPE),
        ("qwen3", SHAPE),
        ("mistral", SHAPE),
        ("gemma2", SHAPE),
        ("gemma3_text", SHAPE),
        ("phi3", SHAPE),
        ("gpt2", GPT),
        ("gpt_neox", SHAPE),
        ("mixtral", {**SHAPE, "num_local_experts": 4}),
    ],
)
def test_attention_models_pass(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    probe(build(kind, options, dtype), 384, 64, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "options"), [("mamba", STATE), ("opt", OPT), ("jamba", JAMBA)])
def test_models_that_leak_are_refused(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    with pytest.raises(IsolationError, match="lets packed pieces see each other"):
        probe(build(kind, options, dtype), 384, 64, "cpu")


def test_a_llama_whose_cache_is_forced_on_is_refused() -> None:
    model = build("llama", SHAPE)
    inner = model.forward
    model.forward = lambda **inputs: inner(**{**inputs, "use_cache": True})
    with pytest.raises(IsolationError):
        probe(model, 384, 64, "cpu")


def test_a_llama_given_a_mask_is_refused() -> None:
    model = build("llama", SHAPE)
    inner = model.forward
    model.forward = lambda **inputs: inner(**{**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])})
    with pytest.raises(IsolationError):
        probe(model, 384, 64, "cpu")


def test_a_model_that_sees_the_future_is_refused() -> None:
    bert = {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64, "is_decoder": False}  # fmt: skip
    model = build("bert", bert)
    for isolate in (True, False):
        with pytest.raises(IsolationError, match="is not causal"):
            probe(model, 384, 64, "cpu", isolate=isolate)


def test_without_isolation_only_causality_is_asked() -> None:
    probe(build("mamba", STATE), 384, 64, "cpu", isolate=False)


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = build("llama", SHAPE).train()
    probe(model, 384, 64, "cpu")
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_packed_piece_is_the_piece_alone() -> None:
    model = build("llama", SHAPE).eval()
    tokens = torch.randint(384, (1, 20))
    positions = torch.tensor([[*range(8), *range(12)]])
    with torch.no_grad():
        packed = packed_forward(model, tokens, positions).logits[0, 8:]
        alone = model(input_ids=tokens[:, 8:]).logits[0]
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("seq_len", [2, 3, 5])
def test_short_rows(seq_len: int) -> None:
    probe(build("llama", SHAPE), 384, seq_len, "cpu")


def test_a_leaking_teacher_is_refused_before_anything_is_written(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    from kdcache.teacher.dump import dump

    leaky = tmp_path / "mamba"
    build("mamba", STATE).save_pretrained(leaky)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (leaky / name).write_bytes((teacher / name).read_bytes())
    with pytest.raises(IsolationError):
        dump(dump_options(leaky, corpus, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert dump(dump_options(leaky, corpus, tmp_path / "out", isolate=False, limit_docs=4))["complete"]
