"""What is loaded is what the files hold: weights, dtypes, quantised forms, multimodal checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kdcache.errors import ConfigError, ModelError
from kdcache.pretrained import load_model, model_folder, quantised
from kdcache.rows import RowSpec
from kdcache.teacher.config import DumpConfig
from kdcache.teacher.engines.base import TeacherSpec
from kdcache.teacher.open_teacher import open_teacher
from tests.making import make_model, make_tokenizer

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 60)[None] * 5 % 320
BLOCK = 16
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def changed(source: Path, out: Path, weights: dict[str, Tensor] | None = None, **config: Any) -> Path:
    """A copy of a checkpoint with other weights, or another configuration (None takes a field out)."""
    shutil.copytree(source, out)
    if weights is not None:
        save_file({n: w.contiguous() for n, w in weights.items()}, out / "model.safetensors", metadata={"format": "pt"})
    fields = {**json.loads((out / "config.json").read_text()), **config}
    (out / "config.json").write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return out


def load(folder: Path, dtype: str = "float32", **more: Any) -> Any:
    return load_model(model_folder(str(folder), "teacher"), "teacher", dtype, CPU, **more).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=TOKENS, use_cache=False).logits
    return found


def to_fp8(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Projections in float8 with a scale for each block, and the weights that these stand for."""
    stored, meant = {}, {}
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            stored[name] = meant[name] = weight.bfloat16()
            continue
        blocks = weight.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))  # [rows, BLOCK, columns, BLOCK]
        scale = blocks.abs().amax((1, 3)) / 448
        spread = scale[:, None, :, None]
        stored[name] = (blocks / spread).flatten(2).flatten(0, 1).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        meant[name] = (stored[name].float().unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK)) * spread).reshape(
            weight.shape
        )
    return stored, meant


@pytest.fixture(scope="module")
def fp8(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint in FP8, and one with the weights that it stands for."""
    folder = tmp_path_factory.mktemp("fp8")
    stored, meant = to_fp8(weights_of(teacher))
    return (
        changed(teacher, folder / "fp8", stored, quantization_config=FP8, dtype="bfloat16"),
        changed(teacher, folder / "meant", {n: w.float() for n, w in meant.items()}),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_fp8_has_the_logits_of_its_dequantised_weights_in_one_dtype(fp8: tuple[Path, Path], dtype: str) -> None:
    model, meant = (load(folder, "bfloat16" if dtype == "auto" else dtype) for folder in fp8)
    model = load(fp8[0], dtype)
    assert {p.dtype for p in model.parameters()} == {next(meant.parameters()).dtype}
    assert torch.equal(logits(model), logits(meant))


def test_float32_weights_of_an_fp8_checkpoint_follow_the_dtype_that_is_asked_for(teacher: Path, tmp_path: Path) -> None:
    stored = {n: w.float() if w.dtype == torch.bfloat16 else w for n, w in to_fp8(weights_of(teacher))[0].items()}
    model = load(changed(teacher, tmp_path / "t", stored, quantization_config=FP8), "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_scales_that_are_dropped(fp8: tuple[Path, Path], teacher: Path, tmp_path: Path) -> None:
    scaled = weights_of(fp8[0])
    without = changed(fp8[0], tmp_path / "no-name", quantization_config=None)
    with pytest.raises(
        ModelError, match=r"^the teacher .* has 14 weights that transformers does not take up, .*_scale"
    ):
        load(without)
    unknown = changed(fp8[0], tmp_path / "unknown", quantization_config={"quant_method": "modelopt"})
    with pytest.raises(ModelError, match=r"is quantised by modelopt, which transformers [\d.]+ does not know$"):
        load(unknown)
    name = "model.layers.1.mlp.up_proj.weight"
    bare = {n: w for n, w in scaled.items() if n != f"{name}_scale_inv"}
    for config in ({"quantization_config": None}, {}):
        folder = changed(fp8[0], tmp_path / f"bare{len(config)}", bare, **config)
        with pytest.raises(ModelError, match=f"lacks the scales of 1 of its quantised weights, {name} among them$"):
            load(folder)
    nameless = changed(teacher, tmp_path / "nameless", quantization_config={"bits": 4})
    with pytest.raises(ModelError, match="has a quantization_config without a quant_method"):
        load(nameless)


def mtp(layers: int) -> dict[str, Tensor]:
    return {
        f"model.layers.{layers}.eh_proj.weight": torch.ones(2, 4),
        f"model.layers.{layers}.mlp.up_proj.weight_scale_inv": torch.ones(1),
    }


@pytest.mark.parametrize(
    ("more", "config"),
    [
        ({"model.mtp.0.norm.weight": torch.ones(2), "mtp.fc.weight_scale_inv": torch.ones(2)}, {}),
        (mtp(2), {}),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}, {"num_nextn_predict_layers": 1}),
        ({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, {}),
        ({"model.embed_positions.position_ids": torch.arange(4)}, {}),
        ({"model.layers.0.attn.bias": torch.ones(1, 1, 4, 4).tril(), "h.attn.masked_bias": torch.tensor(-1e4)}, {}),
        ({"vision_tower.encoder.weight": torch.ones(2)}, {"vision_config": {"hidden_size": 2}}),
    ],
    ids=["mtp", "layer with eh_proj", "announced layer", "inv_freq", "position_ids", "masks", "tower"],
)
def test_harmless_weights(teacher: Path, tmp_path: Path, more: dict[str, Tensor], config: dict[str, Any]) -> None:
    model = load(changed(teacher, tmp_path / "t", {**weights_of(teacher), **more}, **config))
    assert torch.equal(logits(model), logits(load(teacher)))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(64, 32)}, "model.layers.2.mlp.up_proj.weight"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, "model.layers.0.self_attn.q_proj.bias"),
        ({"model.layers.0.attn.bias": torch.ones(32)}, "model.layers.0.attn.bias"),
        ({"vision_tower.encoder.weight": torch.ones(2)}, "vision_tower.encoder.weight"),
        ({"model.layers.0.self_attn.q_proj.input_scale": torch.ones(1)}, "q_proj.input_scale"),
    ],
    ids=["half a model", "bias", "real bias", "tower of a text model", "input scale"],
)
def test_weights_that_are_not_taken_up(teacher: Path, tmp_path: Path, more: dict[str, Tensor], named: str) -> None:
    folder = changed(teacher, tmp_path / "t", {**weights_of(teacher), **more})
    with pytest.raises(ModelError, match=rf"has 1 weight that transformers does not take up, .*{named} among them"):
        load(folder)


def test_weights_that_transformers_hides(tmp_path: Path) -> None:
    """GPT-NeoX keeps quiet about any weight with `attention.bias` in its name, also where it is one."""
    make_model(tmp_path / "m", "gpt_neox", max_position_embeddings=64)
    weights = weights_of(tmp_path / "m")
    mask = {"gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)}
    load(changed(tmp_path / "m", tmp_path / "mask", {**weights, **mask}))
    bias = {"gpt_neox.layers.0.attention.bias": torch.ones(32)}
    with pytest.raises(ModelError, match=r"does not take up, gpt_neox\.layers\.0\.attention\.bias among them"):
        load(changed(tmp_path / "m", tmp_path / "bias", {**weights, **bias}))


def test_weights_of_another_size_and_missing_ones(teacher: Path, tmp_path: Path) -> None:
    narrow = changed(teacher, tmp_path / "narrow", intermediate_size=48)
    with pytest.raises(
        ModelError,
        match=r"holds 6 of its weights in another size .*: .*down_proj.weight is \[32, 64\], not \[32, 48\]$",
    ):
        load(narrow)
    weights = weights_of(teacher)
    del weights["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ModelError, match=r"lacks 1 of its weights, model\.layers\.1\.mlp\.up_proj\.weight among them"):
        load(changed(teacher, tmp_path / "lacking", weights))


def test_sharded_checkpoints(teacher: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(folder, max_shard_size="40KB")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) > 2
    assert torch.equal(logits(load(folder)), logits(load(teacher)))
    index = folder / "model.safetensors.index.json"
    kept = index.read_text()
    files[1].unlink()
    for make in (lambda: None, index.unlink):  # named by the index, or by the names of the others
        make()
        with pytest.raises(
            ModelError, match=f"^the teacher folder .* lacks {files[1].name} of the {len(files)} files that hold"
        ):
            model_folder(str(folder), "teacher")
    for text in ("{", "[]", '{"weight_map": {"a": 1}}', '{"weight_map": {}}'):
        index.write_text(text)
        with pytest.raises(ModelError, match=r"index\.json is not an index of weight files$"):
            model_folder(str(folder), "teacher")
    index.write_text(kept)
    files[0].unlink()
    with pytest.raises(ModelError, match=f"lacks {files[0].name} and 1 more of the {len(files)} files"):
        model_folder(str(folder), "teacher")


def test_folders_that_hold_no_model(teacher: Path, tmp_path: Path) -> None:
    adapter = changed(teacher, tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has an adapter .*; merge the adapter into its base model and save that$"):
        model_folder(str(adapter), "teacher")
    odd = changed(teacher, tmp_path / "odd")
    (odd / "model.safetensors").rename(odd / "weights.safetensors")
    with pytest.raises(ModelError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        model_folder(str(odd), "teacher")
    (odd / "weights.safetensors").rename(odd / "model.safetensors")
    (odd / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ModelError, match=r"model\.safetensors is not a safetensors file that can be read"):
        load(odd)


@pytest.mark.parametrize(
    ("form", "packages"), [("bitsandbytes", "bitsandbytes"), ("gptq", "gptqmodel optimum"), ("awq", "gptqmodel"),
                          ("compressed-tensors", "compressed-tensors")],
)  # fmt: skip
def test_a_form_whose_package_is_not_installed(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, packages: str
) -> None:
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    folder = changed(teacher, tmp_path / "t", quantization_config={"quant_method": form, "bits": 4})
    with pytest.raises(
        ModelError, match=f"by {form}, .* needs the package {packages.split()[0]}, .*: pip install {packages}$"
    ):
        load(folder)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # bitsandbytes' own
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(tmp_path: Path, bits: int) -> None:
    """Packed weights stay packed; the others have the dtype that is asked for."""
    pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    make_model(tmp_path / "m", hidden_size=64, intermediate_size=128)  # whole blocks of 64: its AVX-512 kernel's rule
    config = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    options = {"quantization_config": config, "device_map": "cpu", "dtype": "float32"}
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "m", **options)
    made.save_pretrained(tmp_path / "t")
    model = load(tmp_path / "t")
    packed = {p.dtype for p in model.parameters() if not p.is_floating_point()}
    assert packed == {torch.uint8 if bits == 4 else torch.int8}
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    assert torch.equal(logits(model), logits(made))
    assert 0 < (logits(model) - logits(load(tmp_path / "m"))).abs().max() < 10


_FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_mxfp4_is_dequantised_on_a_cpu(tmp_path: Path) -> None:
    """As gpt-oss is published: experts of 4 bits, 32 with one scale, two to a byte."""
    experts = {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    make_model(tmp_path / "m", "gpt_oss", head_dim=16, sliding_window=32, **experts)
    torch.manual_seed(0)
    stored, meant = {}, {}
    for name, weight in weights_of(tmp_path / "m").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = meant[name] = weight
            continue
        number, inputs, outputs = weight.shape
        blocks = torch.randint(0, 256, (number, outputs, inputs // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 122, blocks.shape[:3], dtype=torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        values = torch.stack([_FP4[(blocks & 15).long()], _FP4[(blocks >> 4).long()]], -1).flatten(-2)
        meant[name] = (values * torch.exp2(scales.float() - 127)[..., None]).flatten(-2).transpose(1, 2)
    form = {"quant_method": "mxfp4", "modules_to_not_convert": ["self_attn", "router", "embed_tokens", "lm_head"]}
    packed = changed(tmp_path / "m", tmp_path / "packed", stored, quantization_config=form)
    model = load(packed)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(logits(model), logits(load(changed(tmp_path / "m", tmp_path / "meant", meant))))
    name = "model.layers.0.mlp.experts.down_proj"
    bare = {n: w for n, w in stored.items() if n != f"{name}_scales"}
    with pytest.raises(ModelError, match=f"lacks the scales of 1 of its quantised weights, {name}_blocks among them$"):
        load(changed(packed, tmp_path / "bare", bare))


TEXT = {
    "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def gemma3() -> dict[str, Any]:
    return {
        "text_config": {**TEXT, "head_dim": 8, "sliding_window": 32, "query_pre_attn_scalar": 8},
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14}, "mm_tokens_per_image": 4,
        "image_token_index": 383, "boi_token_index": 382, "eoi_token_index": 381,
    }  # fmt: skip


def qwen2_5_vl() -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    special = {"image_token_id": 383, "video_token_id": 382, "vision_start_token_id": 381, "vision_end_token_id": 380}
    return {"text_config": {**TEXT, "rope_parameters": rope}, "vision_config": vision, **special}


def llava() -> dict[str, Any]:
    vision = {**VISION, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14, "projection_dim": 16}
    return {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**vision, "model_type": "clip_vision_model"}, "image_token_index": 383,
    }  # fmt: skip


@pytest.mark.parametrize("made", [gemma3, qwen2_5_vl, llava], ids=lambda made: made.__name__)
def test_the_text_of_multimodal_checkpoints(tmp_path: Path, made: Callable[[], dict[str, Any]]) -> None:
    from transformers import AutoConfig, AutoModelForImageTextToText

    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(AutoConfig.for_model(made.__name__, **made())).eval()
    whole.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(whole))
    spec = TeacherSpec(model=str(tmp_path), device="cpu")
    with open_teacher(spec, RowSpec(vocab_size=320, seq_len=64, isolate=True)) as opened:  # probed, its head in tiles
        assert opened.compute["attention"] == "sdpa"


def test_attention_by_name(teacher: Path, tmp_path: Path) -> None:
    config = DumpConfig(teacher=str(teacher), corpus="c.txt", out="o", device="cpu", attn_implementation="eager")
    with open_teacher(config.teacher_spec, RowSpec(vocab_size=320, seq_len=64, isolate=True)) as opened:
        assert opened.compute["attention"] == "eager"
    with pytest.raises(ModelError, match=r"^the teacher .* with attn_implementation flash_attention_2: "):
        load(teacher, attn_implementation="flash_attention_2")
    with pytest.raises(ModelError, match=r"^the teacher .* with attn_implementation quick: "):
        load(teacher, attn_implementation="quick")
    with pytest.raises(ConfigError, match="attn_implementation org/kernel names code of the hub, which is never run"):
        load(teacher, attn_implementation="org/kernel")
    make_model(tmp_path / "capped", "gemma2", head_dim=8, attn_logit_softcapping=2.0)
    assert load(tmp_path / "capped").config._attn_implementation != "sdpa"


def test_a_dump_of_an_fp8_teacher_on_a_cpu(fp8: tuple[Path, Path], corpus: Path, tmp_path: Path) -> None:
    from kdcache.cache import open_cache
    from kdcache.teacher.dump import dump
    from tests.making import dump_options

    for name, folder in zip("ab", fp8, strict=True):
        make_tokenizer(folder)
        assert dump(dump_options(folder, corpus, tmp_path / name, docs_per_shard=40))["complete"]
    one, other = (open_cache(tmp_path / name) for name in "ab")
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine.targets.label_logprob, theirs.targets.label_logprob)
