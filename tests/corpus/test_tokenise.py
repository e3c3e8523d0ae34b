"""What a student may be taught: all of a text, the assistant's part of a chat, the unmasked part of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.corpus.tokenise import take_tokenised, tokenise_chat, tokenise_texts
from kdcache.errors import CorpusError
from tests.making import make_tokenizer

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}\n{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
REWRITING = "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
TALK = [
    {"role": "user", "content": "how many foxes?", "tool": None},
    {"role": "assistant", "content": "four of them"},
    {"role": "user", "content": "and herons?"},
    {"role": "assistant", "content": "none today"},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_texts_get_what_their_tokenizer_adds(tokenizer: Any) -> None:
    first, second = tokenise_texts(tokenizer, [4, 9], ["the fox", ""])
    assert (first.document, second.document) == (4, 9)
    assert first.ids.tolist() == tokenizer("the fox")["input_ids"]
    assert first.ids[0] == 0 and first.ids[-1] == 1 and second.ids.tolist() == [0, 1]
    assert first.supervised is None
    assert tokenise_texts(tokenizer, [], []) == []


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_only_the_assistant_is_supervised(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    talk = tokenise_chat(tokenizer, 3, TALK)
    assert tokenizer.decode(talk.ids) == "".join(f"<{m['role']}>{m['content']}\n" for m in TALK)
    assert talk.supervised is not None
    assert tokenizer.decode(talk.ids[talk.supervised]) == "four of them\nnone today\n"


def test_a_template_that_rewrites_the_past_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = REWRITING
    with pytest.raises(CorpusError, match="document 3: the chat template rewrites earlier turns"):
        tokenise_chat(tokenizer, 3, TALK)


def test_a_template_that_refuses_is_one_sentence(tokenizer: Any) -> None:
    for template in ("{{ raise_exception('roles must alternate') }}", "{% for %}"):
        tokenizer.chat_template = template
        with pytest.raises(CorpusError, match="document 3: the chat template refuses it"):
            tokenise_chat(tokenizer, 3, TALK)


def test_bad_conversations(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(CorpusError, match="no chat template"):
        tokenise_chat(tokenizer, 0, TALK)
    tokenizer.chat_template = PLAIN
    with pytest.raises(CorpusError, match="document 1 is not a list of messages"):
        tokenise_chat(tokenizer, 1, [{"role": "user"}])


def test_tokens_are_taken_as_they_are() -> None:
    taken = take_tokenised(0, [5, 6, 7], [-100, 6, 7], 10)
    assert taken.ids.tolist() == [5, 6, 7]
    assert taken.supervised is not None and taken.supervised.tolist() == [False, True, True]
    assert take_tokenised(0, [5, 6], None, 10).supervised is None
    assert take_tokenised(0, [], [], 10).ids.dtype == np.int32


@pytest.mark.parametrize(
    ("ids", "labels", "words"),
    [
        ([5, 10], None, "document 2 holds token id 10, outside the vocabulary of 10"),
        ([5, -1], None, "token id -1"),
        ([5, 6], [5], "2 input_ids but 1 labels"),
        ([5, 6, 7], [6, 7, -100], "look shifted by one already"),
        ([5, 6, 7], [5, 9, 7], "labels must equal input_ids"),
    ],
)
def test_tokens_that_make_no_sense(ids: list[int], labels: list[int] | None, words: str) -> None:
    with pytest.raises(CorpusError, match=words):
        take_tokenised(2, ids, labels, 10)


def test_a_path_is_not_needed_twice(tmp_path: Path) -> None:
    """The fixtures' tokenizer is a pure function of its texts; the caches of two tests agree."""
    one, two = make_tokenizer(tmp_path / "a"), make_tokenizer(tmp_path / "b")
    assert one.get_vocab() == two.get_vocab()
