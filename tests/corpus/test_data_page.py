"""Each example of docs/data.md becomes what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kdcache.corpus.sources import open_corpus
from kdcache.corpus.tokenise import Tokeniser

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"### (.+?)\n\n```jsonl\n(.*?)```\n\n```text\n(.*?)```", PAGE, flags=re.S)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

pytestmark = pytest.mark.assets


@pytest.fixture(scope="module")
def tokenizer(assets: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(assets / "tokenizers" / "gpt2"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer


def shown(tokenizer: Any, tokens: Any) -> str:
    """The tokens of a document, with marks around those that are supervised."""
    text, inside = "", False
    for number, token in enumerate(tokens.ids):
        taught = tokens.supervised is None or bool(tokens.supervised[number])
        if inside and not taught:
            text += "«"
        text += ("·" if number else "") + ("»" if taught and not inside else "")
        text += tokenizer.decode([token]).replace("\n", "⏎")
        inside = taught
    return text + ("«" if inside else "")


def test_every_form_has_an_example() -> None:
    assert [name for name, _, _ in EXAMPLES] == [
        "Text", "Messages", "ShareGPT", "Alpaca", "Prompt and completion", "Tokens",
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "records", "wanted"), EXAMPLES, ids=[name for name, _, _ in EXAMPLES])
def test_the_page_says_what_becomes_of_a_record(
    tokenizer: Any, tmp_path: Path, name: str, records: str, wanted: str
) -> None:
    (tmp_path / "c.jsonl").write_text(records, encoding="utf-8")
    corpus = open_corpus(str(tmp_path / "c.jsonl"))
    documents = [corpus.document(record) for part in corpus.parts() for record in corpus.read(part)[0]]
    found = Tokeniser(tokenizer, len(tokenizer)).tokenise([(n, d) for n, d in enumerate(documents) if d is not None])
    assert [shown(tokenizer, tokens) for sequences in found for tokens in sequences] == wanted.splitlines()
