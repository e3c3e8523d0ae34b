"""Conversations out of the shapes in which people keep them, and columns beside them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from kdcache.corpus.documents import BadDocument
from kdcache.corpus.forms import Columns, choose_form
from kdcache.corpus.messages import read_chat
from kdcache.errors import CorpusError

WANTED = [{"role": "user", "content": "Who is he?"}, {"role": "assistant", "content": "He is Tom."}]


@pytest.mark.parametrize("messages", [
    {"role": ["user", "assistant"], "content": ["Who is he?", "He is Tom."]},
    {"from": ["human", "gpt"], "value": ["Who is he?", "He is Tom."]},
    {"messages": WANTED},
    [{"from": "Human", "value": "Who is he?"}, {"from": "GPT", "value": "He is Tom."}],
    [{"role": "User", "content": "Who is he?"}, {"role": "ASSISTANT", "content": "He is Tom."}],
    [{"role": "human", "content": "Who is he?"}, {"role": "model", "content": "He is Tom."}],
], ids=["fields", "ShareGPT fields", "in an object", "from, capitals", "role, capitals", "other names"])  # fmt: skip
def test_messages_in_other_shapes(messages: Any) -> None:
    found = read_chat({"messages": messages})
    assert found is not None and (found.messages, found.taught) == (WANTED, [False, True])


def test_half_of_a_pair_is_found_in_messages_that_are_json_in_a_text() -> None:
    told = [{"role": "user", "content": "\ud83d"}, WANTED[1]]
    with pytest.raises(BadDocument, match=r"^lone surrogate"):
        read_chat({"messages": json.dumps(told)})
    told[0]["content"] = "🙂"
    assert read_chat({"messages": json.dumps(told)}).messages[0] == told[0]  # type: ignore[union-attr]


def test_lists_of_fields_of_unequal_length_are_no_conversation() -> None:
    with pytest.raises(BadDocument, match="not a conversation"):
        read_chat({"messages": {"role": ["user", "assistant"], "content": ["Who is he?"]}})


def test_functions_are_tools_by_their_older_name() -> None:
    function = {"name": "weather", "parameters": {"type": "object"}}
    form = choose_form("it", ["messages", "functions"], Columns())
    found = form.document({"messages": WANTED, "functions": [function]})
    assert found.tools == [{"type": "function", "function": function}]  # type: ignore[union-attr]
    assert form.document({"messages": WANTED}).tools is None  # type: ignore[union-attr]


@pytest.mark.parametrize(("part", "words"), [
    ({"r": 1}, "without text"), ({"type": "text"}, "without text"), ({"type": "image", "text": "x"}, "of type image"),
])  # fmt: skip
def test_a_part_that_is_no_text_is_named(part: Any, words: str) -> None:
    with pytest.raises(BadDocument, match=f"not text: message 0, of role user, has a part {words}"):
        read_chat({"messages": [{"role": "user", "content": [part]}, WANTED[1]]})


@pytest.mark.parametrize(("names", "column"), [
    (["prompt", "completion", "label"], "label"), (["prompt", "completion", "weight"], "weight"),
    (["messages", "loss_mask"], "loss_mask"), (["messages", "sample_weight"], "sample_weight"),
])  # fmt: skip
def test_a_column_that_says_what_counts_is_refused_beside_messages_too(names: list[str], column: str) -> None:
    with pytest.raises(CorpusError, match=f"a column '{column}', which seems to say what counts"):
        choose_form("it", names, Columns())
    assert choose_form("it", names, Columns(ignored=(column,)))
    assert choose_form("it", ["text", column], Columns()).name == "text"


def test_a_system_prompt_beside_the_messages_is_the_first_message() -> None:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    found = read_chat({"messages": talk, "system": "Be kind."})
    assert found is not None
    assert found.messages == [{"role": "system", "content": "Be kind."}, *talk] and found.taught == [False, False, True]
    same = read_chat({"messages": found.messages, "system": "Be kind."})
    assert same is not None and same.messages == found.messages
    with pytest.raises(BadDocument, match="two system prompts"):
        read_chat({"messages": found.messages, "system": "Be quick."})
    with pytest.raises(BadDocument, match="wrong type: system is a number"):
        read_chat({"messages": talk, "system": 3})


@pytest.mark.parametrize("beside", [{"system": "Be kind."}, {"tools": [{"name": "x"}]}, {"documents": [{"text": "x"}]}])
def test_a_prompt_that_is_a_text_has_no_place_for_what_a_template_shows(beside: dict[str, Any]) -> None:
    form = choose_form("c", ["prompt", "completion", *beside], Columns())
    with pytest.raises(BadDocument, match=f"no place for {next(iter(beside))}"):
        form.document({"prompt": "a", "completion": "b", **beside})
