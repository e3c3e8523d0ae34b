"""What a student may be taught: all of a text, the answers of a chat, a completion, the unmasked part of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.corpus.documents import BadDocument, Completion
from kdcache.corpus.messages import read_chat
from kdcache.corpus.packing import Tokens
from kdcache.corpus.token_records import read_tokens
from kdcache.corpus.tokenise import Tokeniser
from kdcache.errors import ConfigError, CorpusError
from tests.making import make_tokenizer

PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}\n{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
)
TALK = [
    {"role": "user", "content": "how many foxes?", "tool": None},
    {"role": "assistant", "content": "four of them"},
    {"role": "user", "content": "and herons?"},
    {"role": "assistant", "content": "none today"},
]
VOCAB = 320


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def tokenise(tokenizer: Any, document: Any, **options: Any) -> list[Tokens]:
    """The sequences of a document, or its `BadDocument` raised."""
    (found,) = Tokeniser(tokenizer, VOCAB, **options).tokenise([(3, document)])
    if isinstance(found, BadDocument):
        raise found
    return found


def talk(messages: Any, **more: Any) -> Any:
    return read_chat({"messages": messages, **more})


def taught(tokenizer: Any, tokens: Tokens) -> str:
    assert tokens.supervised is not None
    return str(tokenizer.decode(tokens.ids[tokens.supervised]))


def test_texts_get_what_their_tokenizer_adds(tokenizer: Any) -> None:
    first, second = Tokeniser(tokenizer, VOCAB).texts([(4, "the fox"), (9, "")])
    assert (first.document, second.document) == (4, 9)
    assert first.ids.tolist() == tokenizer("the fox")["input_ids"]
    assert first.ids[0] == 0 and first.ids[-1] == 1 and second.ids.tolist() == [0, 1]
    assert first.supervised is None and not first.whole
    assert Tokeniser(tokenizer, VOCAB).tokenise([]) == []


@pytest.mark.parametrize(("text", "inner"), [("<s>the fox", "the fox"), ("the fox</s>", "the fox"), ("<s>x</s>", "x")])
def test_a_special_token_that_the_text_has_is_not_added_again(tokenizer: Any, text: str, inner: str) -> None:
    ((found,),) = Tokeniser(tokenizer, VOCAB).tokenise([(0, text)])
    assert found.ids.tolist() == tokenizer(inner)["input_ids"]


def test_two_that_the_text_has_are_left_as_they_are(tokenizer: Any) -> None:
    ((found,),) = Tokeniser(tokenizer, VOCAB).tokenise([(0, "<s><s>x</s></s>")])
    assert found.ids.tolist() == [0, 0, *tokenizer("x", add_special_tokens=False)["input_ids"], 1, 1]


def test_whether_a_text_is_closed(tokenizer: Any, tmp_path: Path) -> None:
    inner = tokenizer("the fox", add_special_tokens=False)["input_ids"]
    bare = make_tokenizer(tmp_path)
    bare.backend_tokenizer.post_processor = None
    for one, eos, wanted in (
        (tokenizer, "auto", [0, *inner, 1]), (tokenizer, "never", [0, *inner]), (tokenizer, "always", [0, *inner, 1]),
        (bare, "auto", inner), (bare, "always", [*inner, 1]), (bare, "never", inner),
    ):  # fmt: skip
        ((found,),) = Tokeniser(one, VOCAB, eos=eos).tokenise([(0, "the fox")])
        assert found.ids.tolist() == wanted, eos
    ((found,),) = Tokeniser(bare, VOCAB, eos="always").tokenise([(0, "the fox</s>")])
    assert found.ids.tolist() == [*inner, 1]
    bare.eos_token = None
    with pytest.raises(ConfigError, match="eos is always, but the tokenizer has no end-of-sequence token"):
        Tokeniser(bare, VOCAB, eos="always")


@pytest.mark.parametrize(("template", "closing"), [(PLAIN, "\n"), (MARKED, "\n")])
def test_only_answers_are_supervised(tokenizer: Any, template: str, closing: str) -> None:
    tokenizer.chat_template = template
    (found,) = tokenise(tokenizer, talk(TALK))
    assert found.document == 3 and found.whole
    assert tokenizer.decode(found.ids) == "".join(f"<{m['role']}>{m['content']}\n" for m in TALK)
    assert taught(tokenizer, found) == f"four of them{closing}none today{closing}"


def test_a_completion_is_taught_and_its_prompt_is_not(tokenizer: Any) -> None:
    (found,) = tokenise(tokenizer, Completion(prompt="how many foxes?", completion=" four of them"))
    assert found.whole and found.ids.tolist() == tokenizer("how many foxes? four of them")["input_ids"]
    assert taught(tokenizer, found) == " four of them</s>"
    (found,) = tokenise(tokenizer, Completion(prompt="", completion="four"), eos="never")
    assert taught(tokenizer, found) == "four" and found.ids[0] == 0


def test_a_template_that_refuses_is_a_bad_record(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(BadDocument, match=r"^refused by the chat template: roles must alternate$"):
        tokenise(tokenizer, talk(TALK))


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "no chat template"),
        ("{% for %}", "the chat template cannot be used"),
        ("{{ [1, 2] | random }}" + PLAIN, "draws random numbers"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(tokenizer: Any, template: str | None, words: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(CorpusError, match=words):
        tokenise(tokenizer, talk(TALK))


def test_tokens_are_taken_as_they_are(tokenizer: Any) -> None:
    (found,) = tokenise(tokenizer, read_tokens({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}))
    assert found.ids.tolist() == [5, 6, 7] and found.whole
    assert found.supervised is not None and found.supervised.tolist() == [False, True, True]
    (found,) = tokenise(tokenizer, read_tokens({"input_ids": [5, 6]}))
    assert found.supervised is None and not found.whole
    (found,) = tokenise(tokenizer, read_tokens({"input_ids": []}))
    assert found.ids.dtype == np.int32 and not len(found.ids)


def test_padding_is_cut_off_and_masks_are_honoured(tokenizer: Any) -> None:
    record = {
        "input_ids": [0, 0, 5, 6, 7, 8, 0], "attention_mask": [0, 0, 1, 1, 1, 1, 0],
        "completion_mask": [0, 0, 0, 1, 1, 1, 1], "assistant_masks": [1, 1, 1, 1, 0, 1, 1],
        "labels": [-100, -100, 5, 6, 7, 8, -100],
    }  # fmt: skip
    (found,) = tokenise(tokenizer, read_tokens(record))
    assert found.ids.tolist() == [5, 6, 7, 8]
    assert found.supervised is not None and found.supervised.tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"input_ids": [5, 320]}, "id out of range: token id 320, of a vocabulary of 320"),
        ({"input_ids": [5, -1]}, "token id -1"),
        ({"input_ids": [5, 6], "labels": [5]}, "unequal lengths: 2 input_ids, 1 in labels"),
        ({"input_ids": [5, 6, 7], "labels": [6, 7, -100]}, "look shifted by one already"),
        ({"input_ids": [5, 6, 7], "labels": [5, 9, 7]}, "labels that are not the tokens"),
        ({"input_ids": [5, 6], "labels": [-100, -100]}, "nothing taught"),
        ({"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, "attention_mask with a gap"),
        ({"input_ids": [5, 6], "completion_mask": [1]}, "unequal lengths: 2 input_ids, 1 in completion_mask"),
        ({"input_ids": [5, 6], "loss_mask": [0, 2]}, "loss_mask holds something else than 0 and 1"),
    ],
)
def test_tokens_that_make_no_sense(tokenizer: Any, record: dict[str, Any], words: str) -> None:
    with pytest.raises(BadDocument, match=words):
        tokenise(tokenizer, read_tokens(record))


def test_a_path_is_not_needed_twice(tmp_path: Path) -> None:
    """The fixtures' tokenizer is a pure function of its texts; the caches of two tests agree."""
    one, two = make_tokenizer(tmp_path / "a"), make_tokenizer(tmp_path / "b")
    assert one.get_vocab() == two.get_vocab()
