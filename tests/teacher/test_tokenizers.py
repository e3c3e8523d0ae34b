"""A tokenizer gives the ids of its own tokenizer.json, or is refused; a chat template may come from a file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from kdcache.cache import open_cache
from kdcache.errors import ConfigError, ModelError
from kdcache.pretrained import load_tokenizer, tokenizer_fingerprint
from kdcache.teacher.dump import dump
from tests.making import dump_options

SHOUTING = "{% for m in messages %}{{ m['role'] | upper }}: {{ m['content'] }}\n{% endfor %}"
TEXTS = [
    "  two  spaces",
    "\ttab\n\n  and lines \n",
    "in 2024, 1000000",
    "cafe\u0301 caf\u00e9",
    "\u4f60\u597d \U0001f600",
]


def named(source: Path, out: Path, **settings: Any) -> Path:
    """A copy of a tokenizer whose configuration says something else."""
    out.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, out / name)
    fields = {**json.loads((out / "tokenizer_config.json").read_text()), **settings}
    (out / "tokenizer_config.json").write_text(json.dumps(fields))
    return out


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"tokenizer_class": "LlamaTokenizer"},
        {"tokenizer_class": "Qwen2Tokenizer"},  # which composes accents, whatever tokenizer.json says
        {"tokenizer_class": "GPTNeoXTokenizer"},
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
        {"tokenizer_class": "GemmaTokenizer"},  # which needs a token that is not there
    ],
    ids=lambda settings: "-".join(map(str, settings.values())) or "its own",
)
def test_ids_are_those_of_tokenizer_json(teacher: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    folder = named(teacher, tmp_path / "t", **settings)
    found, own = load_tokenizer(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in TEXTS:
        assert found.encode(text, add_special_tokens=False) == own.encode(text, add_special_tokens=False).ids
        assert found.decode(found.encode(text, add_special_tokens=False)) == text
    assert (found.bos_token, found.eos_token) == ("<s>", "</s>")


def test_the_class_that_is_named_is_used_where_it_agrees(assets: Path, tmp_path: Path) -> None:
    found = load_tokenizer(named(assets / "models/lab32k", tmp_path / "t", tokenizer_class="LlamaTokenizer"))
    assert type(found).__name__ == "LlamaTokenizer"


def test_other_ids_are_refused(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no class of transformers gives those of the file."""

    class Reversing(PreTrainedTokenizerFast):  # type: ignore[misc]
        def encode(self, *values: Any, **named: Any) -> Any:
            return super().encode(*values, **named)[::-1]

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast", Reversing)
    folder = named(teacher, tmp_path / "t", tokenizer_class="Qwen2Tokenizer")
    with pytest.raises(
        ModelError,
        match=r"^the tokenizer in .* cannot be used: Qwen2Tokenizer gives id \d+ and not id \d+ as number \d+ of",
    ):
        load_tokenizer(folder)


@pytest.mark.parametrize("content", ["{", "{}", "null"])
def test_a_damaged_tokenizer(teacher: Path, tmp_path: Path, content: str) -> None:
    folder = named(teacher, tmp_path / "t")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json cannot be read: "):
        load_tokenizer(folder)


def test_a_chat_template_of_a_file(teacher: Path, tmp_path: Path) -> None:
    file = tmp_path / "shouting.jinja"
    file.write_text(SHOUTING)
    found = load_tokenizer(teacher, str(file))
    chat = [{"role": "user", "content": "Ja?"}, {"role": "assistant", "content": "Ja."}]
    assert found.apply_chat_template(chat, tokenize=False) == "USER: Ja?\nASSISTANT: Ja.\n"
    assert tokenizer_fingerprint(found) != tokenizer_fingerprint(load_tokenizer(teacher))


def test_a_cache_keeps_the_chat_template_of_its_file(teacher: Path, corpus: Path, tmp_path: Path) -> None:
    file = tmp_path / "shouting.jinja"
    file.write_text(SHOUTING)
    dump(dump_options(teacher, corpus, tmp_path / "c", chat_template=str(file), limit_docs=4, docs_per_shard=4))
    assert open_cache(tmp_path / "c").load_tokenizer().chat_template == SHOUTING


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\xff\xfe", "is not a text in UTF-8"),
        (b" \n", "is empty"),
        (b"{% for m in messages %}", "is not a Jinja template: "),
    ],
)
def test_bad_chat_templates(teacher: Path, tmp_path: Path, content: bytes | None, why: str) -> None:
    file = tmp_path / "t.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=f"^chat_template .*t.jinja {why}"):
        load_tokenizer(teacher, str(file))


def test_a_template_that_refuses_a_conversation_is_one(teacher: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{{ raise_exception('system first') }}")
    assert load_tokenizer(teacher, str(file)).chat_template
