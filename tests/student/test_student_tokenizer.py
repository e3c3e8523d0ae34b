"""Students keep their tokenizer where the cache's ids mean the same tokens in it; quantised ones are not trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcache import create_cache, open_cache
from kdcache.errors import ModelError
from kdcache.student.config import TrainConfig
from kdcache.student.model import load_student, save_student, with_adapters
from kdcache.student.own_tokenizer import read_own_tokenizer
from kdcache.student.train import train
from kdcache.teacher.dump import dump
from tests.making import STUDENT, dump_options, make_model, make_tokenizer

CPU = torch.device("cpu")
CHAT = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"


def make_student(folder: Path, template: str | None = None, more: tuple[str, ...] = (), **changes: Any) -> Path:
    """A checkpoint whose tokenizer is the teacher's, with a chat template or further tokens."""
    make_model(folder, **{**STUDENT, "tie_word_embeddings": False, **changes})
    tokenizer = make_tokenizer(folder)
    tokenizer.chat_template = template
    tokenizer.add_tokens(list(more))
    tokenizer.save_pretrained(folder)
    return folder


def saved(student: Path, cache: Path, out: Path) -> Any:
    """The tokenizer of a student that was loaded and saved."""
    opened = open_cache(cache)
    save_student(load_student(str(student), opened, CPU, 0), opened, out)
    return AutoTokenizer.from_pretrained(out)


def options(cache: Path, student: Path, out: Path, **changes: Any) -> TrainConfig:
    usual: dict[str, Any] = {"steps": 1, "batch_rows": 2, "heldout": 0.1, "device": "cpu"}
    return TrainConfig(**{**usual, "cache": str(cache), "student": str(student), "out": str(out), **changes})


@pytest.fixture(scope="module")
def teacher_of_more(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same teacher with two more tokens, of which texts may have one."""
    folder = tmp_path_factory.mktemp("more") / "t"
    shutil.copytree(teacher, folder)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(folder)
    return folder


def dump_texts(teacher: Path, texts: list[str], folder: Path) -> Path:
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    dump(dump_options(teacher, folder / "texts.jsonl", folder / "c", docs_per_shard=4))
    return folder / "c"


@pytest.mark.slow
def test_a_trained_student_has_its_own_template_and_tokens(cache: Path, tmp_path: Path) -> None:
    student = make_student(tmp_path / "s", CHAT, ("<think>",))
    train(options(cache, student, tmp_path / "out"))
    found = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert found.chat_template == CHAT
    assert found.get_vocab()["<think>"] == 320
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (student / name).read_bytes()


def test_so_has_one_with_adapters(cache: Path, tmp_path: Path) -> None:
    opened = open_cache(cache)
    model = load_student(str(make_student(tmp_path / "s", CHAT)), opened, CPU, 0)
    save_student(with_adapters(model, 2, 0), opened, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHAT


def test_a_student_without_a_template_gets_that_of_the_cache(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHAT)
    changes: dict[str, Any] = {"limit_docs": 4, "docs_per_shard": 4, "chat_template": str(tmp_path / "chat.jinja")}
    dump(dump_options(teacher, corpus, tmp_path / "c", **changes))
    student = make_student(tmp_path / "s", None, ("<own>",))
    found = saved(student, tmp_path / "c", tmp_path / "out")
    assert found.chat_template == CHAT and "<own>" in found.get_vocab()
    other = make_student(tmp_path / "other", "{{ messages[0]['content'] }}")
    assert saved(other, tmp_path / "c", tmp_path / "out2").chat_template == "{{ messages[0]['content'] }}"


def test_a_fresh_student_gets_the_tokenizer_of_the_cache(cache: Path, student_config: Path, tmp_path: Path) -> None:
    found = saved(student_config, cache, tmp_path / "out")
    assert found.get_vocab() == open_cache(cache).load_tokenizer().get_vocab()


def test_ids_of_another_meaning_are_refused(cache: Path, teacher_of_more: Path, corpus: Path, tmp_path: Path) -> None:
    student = make_student(tmp_path / "s")
    tokens = json.loads((student / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    one, other = sorted(vocabulary, key=vocabulary.get)[10:12]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (student / "tokenizer.json").write_text(json.dumps(tokens))
    with pytest.raises(
        ModelError, match=r"has another tokenizer than the cache: '.' is id 1\d in the cache and 1\d in"
    ):
        load_student(str(student), open_cache(cache), CPU, 0)
    dump(dump_options(teacher_of_more, corpus, tmp_path / "c", limit_docs=4, docs_per_shard=4))
    taken = make_student(tmp_path / "taken", None, ("<other>",))  # id 320 is <think> in the cache
    with pytest.raises(ModelError, match=r"'<think>' is id 320 in the cache and absent in the student$"):
        load_student(str(taken), open_cache(tmp_path / "c"), CPU, 0)


def test_tokens_that_only_the_teacher_has_and_no_row(teacher_of_more: Path, tmp_path: Path) -> None:
    cache = dump_texts(teacher_of_more, ["The fox jumped over the wall.", "The cat sang."], tmp_path)
    student = make_student(tmp_path / "s", CHAT)
    opened = open_cache(cache)
    assert opened.manifest.vocab_size == 322
    own = read_own_tokenizer(student, opened)
    assert own is not None and own.absent == {320: "<think>", 321: "</think>"}
    with pytest.warns(
        UserWarning, match=r"lacks 2 tokens of the cache, '</think>' among them; none of the \d+ rows has"
    ):
        found = saved(student, cache, tmp_path / "out")
    assert found.chat_template == CHAT and len(found) == 320


@pytest.mark.filterwarnings("ignore:the tokenizer of the student:UserWarning")
@pytest.mark.parametrize("tied", [False, True])
def test_a_vocabulary_without_room_for_them_is_padded(teacher_of_more: Path, tmp_path: Path, tied: bool) -> None:
    """Their mass is taught as that of any other id; what the student says of its own tokens is as before."""
    cache = dump_texts(teacher_of_more, ["The fox jumped over the wall.", "The cat sang."] * 8, tmp_path)
    student = make_student(tmp_path / "s", vocab_size=320, tie_word_embeddings=tied)
    before, model = AutoModelForCausalLM.from_pretrained(student), load_student(str(student), open_cache(cache), CPU, 0)
    tokens = torch.arange(30)[None]
    with torch.no_grad():
        own, padded = before(tokens).logits, model(tokens).logits
    assert padded.shape[-1] == model.config.vocab_size == 322
    assert torch.equal(padded[..., :320], own)
    torch.testing.assert_close(padded[..., 320:], own.mean(-1, keepdim=True).expand(-1, -1, 2), atol=1e-5, rtol=0)
    if tied:
        return
    heldout = train(options(cache, student, tmp_path / "out", steps=8, lr=1e-2))["heldout"]
    assert heldout["after"]["kl"] < heldout["before"]["kl"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 320


def test_a_row_with_a_token_that_the_student_lacks(teacher_of_more: Path, tmp_path: Path) -> None:
    texts = ["The fox jumped over the wall. It was a long day."] * 3 + ["The cat <think>sang</think> over the river."]
    cache = open_cache(dump_texts(teacher_of_more, texts, tmp_path))
    student = make_student(tmp_path / "s")
    with pytest.raises(ModelError, match=r"^the tokenizer of the student .* has no token '<think>', which row \d+ of"):
        load_student(str(student), cache, CPU, 0)
    (tmp_path / "plain").mkdir()
    plain = open_cache(dump_texts(teacher_of_more, texts[:2], tmp_path / "plain"))
    with pytest.raises(ModelError, match="has no token '<think>'"):  # in the second cache of a mixture
        load_student(str(student), plain, CPU, 0, mixed=[cache])


def test_a_cache_without_a_tokenizer_leaves_the_student_its_own(cache: Path, tmp_path: Path) -> None:
    source = open_cache(cache)
    rule, temperatures = source.manifest.rule, source.manifest.temperatures
    made = create_cache(
        tmp_path / "c", vocab_size=320, seq_len=64, selection=rule, shards=1, teacher="t", temperatures=temperatures
    )
    with made.shard(0) as shard:
        row, targets = source.read_packed(0)
        shard.write(row.tokens, targets, piece_lengths=row.piece_lengths)
    made.finish()
    assert saved(make_student(tmp_path / "s", CHAT), tmp_path / "c", tmp_path / "out").chat_template == CHAT


def test_quantised_students_are_measured_and_not_trained(cache: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from kdcache.report.evaluate import evaluate

    student = make_student(tmp_path / "s")
    nll = evaluate(str(student), str(cache), rows=4, device="cpu")["nll"]
    weights = load_file(student / "model.safetensors")
    for name in [name for name in weights if name.endswith("_proj.weight")]:
        scale = weights[name].abs().max() / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((student / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "fp8", "weight_block_size": None}
    (student / "config.json").write_text(json.dumps(fields))
    for lora in (0, 4):
        with pytest.raises(ModelError, match=r"^the student .* is quantised \(fp8\), and quantised weights cannot be"):
            train(options(cache, student, tmp_path / "out", lora=lora))
    assert not (tmp_path / "out").exists()
    assert evaluate(str(student), str(cache), rows=4, device="cpu")["nll"] == pytest.approx(nll, abs=0.05)
