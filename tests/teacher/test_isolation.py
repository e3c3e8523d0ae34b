"""The probe passes models that keep packed pieces apart and refuses those that do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from kdcache.errors import IsolationError
from kdcache.isolation import packed_forward, probe
from kdcache.prepared_mask import has_prepared_masks
from tests.making import ODD, TEACHER, dump_options

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
@pytest.mark.parametrize(("kind", "options"), [("mamba", STATE), ("lfm2", ODD["lfm2"]), ("jamba", JAMBA)])
def test_models_that_leak_are_refused(kind: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    model = build(kind, options, dtype)
    with pytest.raises(
        IsolationError, match=r'lets packed pieces see each other.* needs a cache dumped with pack="none"'
    ):
        probe(model, 384, 64, "cpu")
    assert not has_prepared_masks(model)


def forced_cache() -> Any:
    """A llama whose cache is always on, so that transformers makes no mask of its position ids."""
    model = build("llama", SHAPE)
    inner = model.forward
    model.forward = lambda **inputs: inner(**{**inputs, "use_cache": True})
    return model


@pytest.mark.parametrize(
    ("kind", "attention"),
    [("gpt_oss", "eager"), ("opt", "eager"), ("opt", "sdpa"), ("llama", "eager"), ("llama", "sdpa")],
)
def test_a_model_that_makes_no_mask_of_position_ids_is_given_one(kind: str, attention: str) -> None:
    model = forced_cache() if kind == "llama" else build(kind, {**ODD, "opt": OPT}[kind])
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for values in model.parameters():
            values.mul_(4 if values.ndim > 1 else 1)
    probe(model, 384, 64, "cpu")
    assert has_prepared_masks(model)
    tokens, lengths = torch.randint(384, (2, 40), generator=torch.Generator().manual_seed(0)), (5, 20, 12, 3)
    positions = torch.cat([torch.arange(n) for n in lengths]).expand(2, -1)
    with torch.no_grad():
        packed = packed_forward(model.eval(), tokens, positions).logits
        for piece, logits in zip(tokens.split(lengths, 1), packed.split(lengths, 1), strict=True):
            alone = model(input_ids=piece, use_cache=False).logits
            torch.testing.assert_close(logits, alone, atol=2e-6 * alone.abs().max().item(), rtol=0)


def test_masks_are_prepared_where_rows_hold_several_pieces_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = build("gpt_oss", ODD["gpt_oss"]), []
    probe(model, 384, 64, "cpu")
    model.model.register_forward_pre_hook(lambda _, args, given: seen.append(given["attention_mask"]), with_kwargs=True)
    for position in (torch.arange(6), torch.tensor([0, 1, 2, 0, 1, 0])):
        packed_forward(model, torch.zeros(1, 6, dtype=torch.long), position[None])
    assert seen[0] is None and seen[1].keys() == {"full_attention", "sliding_attention"}
    packed_forward(model, torch.zeros(1, 6, dtype=torch.long), position[None], output_hidden_states=True)
    assert len(seen) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", *ODD, "jamba", "mixtral"])
def test_rows_of_one_document_pass_with_any_causal_model(kind: str, dtype: torch.dtype) -> None:
    options = {**ODD, "llama": SHAPE, "jamba": JAMBA, "mixtral": {**SHAPE, "num_local_experts": 4}}[kind]
    model = build(kind, options, dtype)
    probe(model, 384, 64, "cpu", packed=False)
    assert not has_prepared_masks(model)


def moved_by(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A llama with something added to its logits `[R, L, V]`."""
    model = build("llama", SHAPE)

    def add(module: Any, given: Any, output: Any) -> None:
        output.logits = output.logits + 1e-3 * change(output.logits)

    model.register_forward_hook(add)
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits.mean(0, keepdim=True),  # other rows
        lambda logits: logits.flatten(0, 1).roll(1, 0).view_as(logits),  # the end of the row before
        lambda logits: torch.full_like(logits, logits.shape[1] / 64),  # the length of the padded batch
        lambda logits: torch.full_like(logits, logits.shape[0]),  # how many rows
    ],
)
def test_rows_of_one_document_must_not_depend_on_their_batch(change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(IsolationError, match="gives a row other logits in a batch than alone: they move by"):
        probe(moved_by(change), 384, 64, "cpu", packed=False)


def test_padding_behind_a_row_must_not_be_seen() -> None:
    model = moved_by(lambda logits: logits.roll(-1, 1))
    with pytest.raises(IsolationError, match="is not causal"):
        probe(model, 384, 64, "cpu", packed=False)


def test_the_length_of_other_rows_must_not_count() -> None:
    """Positions beyond a limit change how this model turns all of them."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            "original_max_position_embeddings": 100}  # fmt: skip
    own = {"rope_parameters": rope, "original_max_position_embeddings": 100, "eos_token_id": 1}
    model = build("phi3", {**SHAPE, **own})
    probe(model, 384, 100, "cpu", packed=False)
    with pytest.raises(IsolationError, match="the length of the longest of them, up to 128 tokens"):
        probe(model, 384, 128, "cpu", packed=False)


def test_positions_are_handed_to_who_takes_them() -> None:
    """Also inside a wrapper, which does not say what it takes."""

    class Wrapper(torch.nn.Module):
        def __init__(self, module: Any) -> None:
            super().__init__()
            self.module = module

        def forward(self, **inputs: Any) -> Any:
            return self.module(**inputs)

    for kind, takes in (("llama", True), ("mamba", False)):
        model, seen = build(kind, {"llama": SHAPE, **ODD}[kind]), []
        model.register_forward_pre_hook(lambda _, args, given: seen.append(given), with_kwargs=True)  # noqa: B023
        for called in (model, Wrapper(model)):
            packed_forward(called, torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None])
        assert ["position_ids" in given for given in seen] == [takes, takes]


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
