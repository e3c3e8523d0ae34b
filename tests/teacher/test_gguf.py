"""A .gguf file as teacher: its weights, its tokenizer, its positions; what transformers leaves out is not left out."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdcache.cache import open_cache
from kdcache.errors import ModelError
from kdcache.pretrained import fingerprint, gguf_file, load_model, load_tokenizer, model_folder, read_config
from kdcache.teacher.dump import dump
from tests.making import TEACHER, dump_options, make_model

pytestmark = pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")

CPU = torch.device("cpu")
TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
NAMES = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write_gguf(
    path: Path,
    model: Any,
    tokenizer: Any,
    rule: str = "gpt-2",
    more: dict[str, np.ndarray] | None = None,
    eos: int | None = None,
    scaling: str | None = None,
) -> None:
    """A Llama and a byte-level tokenizer as llama.cpp's converter writes them, in float32."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling))
    words = {number: word for word, number in tokenizer.get_vocab().items()}
    tokens = [words.get(number, f"[PAD{number}]") for number in range(len(tokenizer))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule)
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL if t in ("<s>", "</s>") else gguf.TokenType.NORMAL for t in tokens])
    writer.add_token_merges([" ".join(m) for m in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1 if eos is None else eos)
    writer.add_chat_template(TEMPLATE)
    for name, weight in model.state_dict().items():
        part = name.removeprefix("model.").removesuffix(".weight")
        if part.startswith("layers."):
            _, layer, inner = part.split(".", 2)
            stored = f"blk.{layer}.{NAMES[inner]}.weight"
            heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(inner[10:11])
            if heads and inner.startswith("self_attn"):  # llama.cpp rotates neighbours, not halves
                weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        else:
            stored = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[part] + ".weight"
        writer.add_tensor(stored, np.ascontiguousarray(weight.float().numpy()))
    for name, values in (more or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def parts(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A model without padded ids, and its tokenizer."""
    folder = tmp_path_factory.mktemp("parts")
    make_model(folder, vocab_size=320)
    return load_model(folder, "teacher", "float32"), load_tokenizer(teacher)


@pytest.fixture(scope="module")
def file(parts: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, *parts)
    return path


def load(path: Path) -> Any:
    return load_model(model_folder(str(path), "teacher"), "teacher", "float32", CPU).eval()


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def test_weights_and_tokenizer_of_a_file(parts: tuple[Any, Any], file: Path, teacher: Path) -> None:
    model, tokens = load(file), torch.arange(40)[None]
    torch.testing.assert_close(logits(model, tokens), logits(parts[0], tokens), atol=1e-4, rtol=1e-4)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    tokenizer, own = load_tokenizer(file), load_tokenizer(teacher)
    for text in ("The old dog  jumped 1000 times.\n\n  Sad.", "caf\u00e9 \u4f60\u597d"):
        assert tokenizer.encode(text, add_special_tokens=False) == own.encode(text, add_special_tokens=False)
    assert tokenizer.chat_template == TEMPLATE
    assert read_config(file)["max_position_embeddings"] == TEACHER["max_position_embeddings"]


def test_a_dump_of_a_file_is_that_of_its_model(file: Path, corpus: Path, tmp_path: Path) -> None:
    assert dump(dump_options(file.parent, corpus, tmp_path / "c", limit_docs=20, docs_per_shard=20))["complete"]
    cache = open_cache(tmp_path / "c")
    assert cache.manifest.teacher_sha256 == fingerprint(file)
    row = cache[0]
    labelled = row.labels != -100
    first = row.segments == 0
    own = logits(load(file), row.tokens[first][None])[0, :, :320].log_softmax(-1)
    own = own.gather(1, row.labels[first].clamp_min(0)[:, None])[:, 0]
    both = labelled & first
    torch.testing.assert_close(row.targets.label_logprob[both], own[labelled[first]], atol=1e-3, rtol=0)


def test_a_fingerprint_is_of_content(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other.gguf").write_bytes(file.read_bytes())
    assert fingerprint(tmp_path / "other.gguf") == fingerprint(file)
    (tmp_path / "other.gguf").write_bytes(file.read_bytes()[:-4] + b"\0\0\0\0")
    assert fingerprint(tmp_path / "other.gguf") != fingerprint(file)


def test_rotary_positions_are_stretched_as_the_file_says(parts: tuple[Any, Any], file: Path, tmp_path: Path) -> None:
    """As files of Llama 3.1 say; transformers reads nothing of it."""
    factors = np.linspace(1, 8, 4, dtype=np.float32)
    write_gguf(tmp_path / "t.gguf", *parts, more={"rope_freqs.weight": factors})
    model, tokens = load(tmp_path / "t.gguf"), torch.arange(40)[None]
    wanted = 10000.0 ** (-np.arange(0, 8, 2) / 8) / factors
    np.testing.assert_allclose(model.model.rotary_emb.inv_freq.numpy(), wanted, rtol=1e-6)
    assert (logits(model, tokens) - logits(load(file), tokens)).abs().max() > 1e-3
    write_gguf(tmp_path / "ones.gguf", *parts, more={"rope_freqs.weight": np.ones(4, np.float32)})
    assert torch.equal(logits(load(tmp_path / "ones.gguf"), tokens), logits(load(file), tokens))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"more": {"blk.0.attn_q.bias": np.ones(32, np.float32)}},
            r"holds \d+ weights, but transformers made a model of",
        ),
        ({"more": {"rope_freqs.weight": np.full(3, 2, np.float32)}}, "stretches its rotary positions"),
        ({"scaling": "yarn"}, r"scales its positions \(yarn\), which transformers does not take up"),
    ],
)
def test_what_is_in_the_file_and_not_in_the_model(
    parts: tuple[Any, Any], tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    write_gguf(tmp_path / "t.gguf", *parts, **changes)
    with pytest.raises(ModelError, match=why):
        load(tmp_path / "t.gguf")


def test_text_is_split_by_the_rule_of_the_file(parts: tuple[Any, Any], tmp_path: Path) -> None:
    """SmolLM's tokenizer takes each digit by itself, and first of all: a space before it belongs to no digit."""
    write_gguf(tmp_path / "t.gguf", *parts, rule="smollm")
    split = load_tokenizer(tmp_path / "t.gguf").backend_tokenizer.pre_tokenizer.pre_tokenize_str
    assert [part for part, _ in split("a  2024\n\n7")] == ["a", "\u0120\u0120", *"2024", "\u010a\u010a", "7"]
    write_gguf(tmp_path / "u.gguf", *parts, rule="viking")
    with pytest.raises(ModelError, match=r"^the tokenizer in .*u\.gguf splits text by the rule 'viking', which"):
        load_tokenizer(tmp_path / "u.gguf")


def test_special_tokens_are_those_of_the_file(parts: tuple[Any, Any], file: Path, tmp_path: Path) -> None:
    """transformers adds an end-of-text token to a vocabulary that has none, and the model would not know it."""
    tokenizer = load_tokenizer(file)
    assert len(tokenizer) == 320
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, None)
    write_gguf(tmp_path / "t.gguf", *parts, eos=5)
    assert load_tokenizer(tmp_path / "t.gguf").eos_token_id == 5


def test_a_tokenizer_that_changes_text(file: Path) -> None:
    from tokenizers import normalizers

    tokenizer = load_tokenizer(file)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ModelError, match="does not give back what it was given: 'Text' becomes 'text'"):
        gguf_file.require_round_trip(file, tokenizer, "a Text")


def test_files_that_are_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"^the teacher file .*none\.gguf does not exist$"):
        model_folder(str(tmp_path / "none.gguf"), "teacher")
    for name in ("a.gguf", "b.GGUF"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"has 2 \.gguf files; name one of them, such as .*a\.gguf$"):
        model_folder(str(tmp_path), "teacher")
    with pytest.raises(ModelError, match=r"a\.gguf is not a (configuration|GGUF file)"):
        load(tmp_path / "a.gguf")
    (tmp_path / "m-00001-of-00002.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="is one of 2 files of a model, which cannot be read; merge them"):
        model_folder(str(tmp_path / "m-00001-of-00002.gguf"), "teacher")
    monkeypatch.setattr(gguf_file, "find_spec", lambda name: None)
    for read in (load, load_tokenizer, read_config):
        with pytest.raises(ModelError, match=r"tiny\.gguf needs the package gguf, .*: pip install 'kdcache\[gguf\]'$"):
            read(file)


@pytest.mark.long
@pytest.mark.assets
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the package gguf
def test_smollm2(smollm2_file: Path, assets: Path, tmp_path: Path) -> None:
    """A real one: the likeliest token at each position of a page, as for transformers. The demo asks it of France."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    page = (assets / "text/tinystories.txt").read_text()[:2000].replace("\n\n", "\n")
    (tmp_path / "page.txt").write_text(f"The capital of France is\n\n{page}\n")
    dump(
        dump_options(
            smollm2_file, tmp_path / "page.txt", tmp_path / "c", seq_len=512, k=4, limit_docs=2, docs_per_shard=2
        )
    )
    cache = open_cache(tmp_path / "c")
    where, name = str(smollm2_file.parent), smollm2_file.name
    own = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(where, gguf_file=name)
    seen = 0
    for row in cache:
        for segment in range(int(row.segments.max()) + 1):
            inside = row.segments == segment
            tokens = row.tokens[inside]
            likeliest = logits(own, tokens[None])[0].argmax(-1)
            targets = row.targets[inside]
            for slot in range(len(tokens)):
                if targets.count[slot]:
                    best = int(targets.logprobs[slot, : targets.count[slot]].argmax())
                    assert int(targets.ids[slot, best]) == int(likeliest[slot])
                    seen += 1
    assert seen > 400
    assert cache.load_tokenizer().chat_template == tokenizer.chat_template
