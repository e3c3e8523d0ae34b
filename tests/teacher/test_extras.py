"""Hidden states of a teacher in its cache: the ones that its output head is given, token by token."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from kdcache import open_cache, verify_cache
from kdcache.convert import convert
from kdcache.errors import ConfigError
from kdcache.extras import ExtraSpec
from kdcache.pretrained.blocks import find_blocks
from kdcache.teacher.dump import dump
from tests.making import dump_options, make_model, make_tokenizer
from tests.processes import kdcache

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "qwen2": {},
    "gemma3_text": {"head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "mixtral": {"num_local_experts": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16},
}


@torch.inference_mode()
def own_states(folder: Path, tokens: Tensor) -> Tensor:
    """`[n, D]` what the output head of a model is given for one piece, run alone in the plainest way."""
    model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][0]))
    model(tokens[None])
    return seen[0]


def relative_errors(cache: Path, folder: Path, rows: int) -> Tensor:
    """`[tokens]` how far each stored vector is from the model's own, as a part of its length."""
    found = []
    for row in (open_cache(cache)[i] for i in range(rows)):
        for piece in range(int(row.segments.max()) + 1):
            own, stored = own_states(folder, row.tokens[row.segments == piece]), row.extras["hidden:-1"]
            found.append((stored[row.segments == piece] - own).norm(dim=-1) / own.norm(dim=-1))
        assert stored[row.segments < 0].isnan().all()
    return torch.cat(found)


@pytest.mark.parametrize("store", ["arrow", "zarr"])
@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.01), ("float32", 1e-5)])
def test_they_are_the_models_own(
    teacher: Path, corpus: Path, tmp_path: Path, store: str, precision: str, bound: float
) -> None:
    summary = dump(
        dump_options(
            teacher, corpus, tmp_path / "c", store=store, extra=("hidden:-1",), extra_precision=precision, limit_docs=20
        )
    )
    assert summary["extras"] == {"hidden:-1": ExtraSpec(width=32, precision=precision).to_fields()}
    assert verify_cache(tmp_path / "c").ok
    errors = relative_errors(tmp_path / "c", teacher, rows=3)
    assert len(errors) > 100 and errors.mean() < bound
    other = {"arrow": "zarr", "zarr": "arrow"}[store]
    convert(tmp_path / "c", tmp_path / "d", store=other)
    for one, two in zip(open_cache(tmp_path / "c"), open_cache(tmp_path / "d"), strict=True):
        torch.testing.assert_close(one.extras["hidden:-1"], two.extras["hidden:-1"], rtol=0, atol=0, equal_nan=True)


@torch.inference_mode()
def states_between(model: Any, tokens: Tensor) -> list[Tensor]:
    """`[n, D]` what each layer of a model is given, and what the last one gives, for one piece run alone."""
    seen: list[Any] = []
    layers = find_blocks(model).layers
    handle = layers[-1].register_forward_hook(
        lambda _m, _i, out: seen.append(out[0] if isinstance(out, tuple) else out)
    )
    given = model(tokens[None], output_hidden_states=True).hidden_states
    handle.remove()
    last = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    return [state.reshape(len(tokens), -1) for state in (*given[: len(layers)], last)]


@pytest.mark.parametrize("kind", FAMILIES)
def test_states_between_layers(kind: str, teacher: Path, corpus: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "t")
    make_model(tmp_path / "t", kind, **FAMILIES[kind])
    options = dump_options(tmp_path / "t", corpus, tmp_path / "c", limit_docs=12, extra=("hidden:0,1", "hidden:2,-1"))
    dump(dataclasses.replace(options, extra_precision="float32"))
    dump(dataclasses.replace(options, out=str(tmp_path / "d"), extra_precision="int8"))
    exact, packed = open_cache(tmp_path / "c"), open_cache(tmp_path / "d")
    assert list(exact.manifest.extras) == ["hidden:-1", "hidden:0", "hidden:1", "hidden:2"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "t", dtype=torch.float32).eval()
    row, small = exact[0], packed[0]
    assert row.segments.max() > 0
    for piece in range(int(row.segments.max()) + 1):
        slots = row.segments == piece
        own = states_between(model, row.tokens[slots])
        for number, state in enumerate(own):
            size = state.norm(dim=-1).clamp(min=1e-6)  # the embedding of padding is 0
            off = (row.extras[f"hidden:{number}"][slots] - state).norm(dim=-1) / size
            assert off.max() < 1e-5
            off = (small.extras[f"hidden:{number}"][slots] - state).norm(dim=-1) / size
            assert off.max() < packed.manifest.extra_specs["hidden:1"].error_bound + 1e-5


@pytest.mark.assets
def test_of_a_trained_teacher(assets: Path, tmp_path: Path) -> None:
    teacher = assets / "models/stories260K"
    dump(
        dump_options(
            teacher,
            assets / "text/tinystories.txt",
            tmp_path / "c",
            extra=("hidden:-1",),
            extra_precision="int8",
            limit_docs=30,
            seq_len=256,
        )
    )
    errors = relative_errors(tmp_path / "c", teacher, rows=2)
    assert len(errors) > 300 and errors.mean() < 0.01


def test_targets_and_workers_are_as_without(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"extra": ("hidden:-1",), "limit_docs": 70}
    dump(dump_options(teacher, corpus, tmp_path / "plain", limit_docs=70))
    for worker in ("1/2", "0/2"):
        dump(dump_options(teacher, corpus, tmp_path / "c", worker=worker, **options))
    for one, two in zip(open_cache(tmp_path / "plain"), open_cache(tmp_path / "c"), strict=True):
        assert torch.equal(one.targets.weights, two.targets.weights) and "hidden:-1" in two.extras


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"extra": ("hidden:3",)},
            "but the engine transformers offers hidden:-1, hidden:0, hidden:1, hidden:2",
        ),
        ({"extra": ("hidden:1,x",)}, "extra is hidden:x, but the engine"),
        ({"extra": ("attention",)}, "extra is attention, but the engine transformers offers hidden:-1"),
        ({"extra": ("hidden:-1", "hidden:-1")}, "extra names one array twice"),
        ({"extra": ("hidden:-1",), "extra_precision": "int4"}, "extra_precision int4 is not one of float32, float16"),
        ({"extra": ("hidden:-1",), "tile_head": False}, "is caught where the output head runs in tiles"),
    ],
)
def test_what_there_is_not(teacher: Path, corpus: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        dump(dump_options(teacher, corpus, tmp_path / "c", **changes))
    assert not (tmp_path / "c").exists()


def test_the_command(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    done = kdcache(
        "dump-teacher", "--teacher", teacher, "--corpus", corpus, "--out", tmp_path / "c", "--seq-len", "64",
        "--k", "8", "--limit-docs", "10", "--extra", "hidden:-1", "--extra-precision", "bfloat16", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["extras"]["hidden:-1"]["precision"] == "bfloat16"
