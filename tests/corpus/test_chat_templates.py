"""Answers are found in what any template shows: stock templates of many families, and templates that trip people."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kdcache.corpus.answer_spans import AnswerText, find_answers
from kdcache.corpus.chat_template import ChatTemplate
from kdcache.corpus.documents import BadDocument
from kdcache.corpus.messages import read_chat
from kdcache.corpus.tokenise import Tokeniser
from kdcache.store.manifest import today
from tests.corpus.tokenizers_of_kinds import make

DATE = "2026-01-31"


def says(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


TOOL = {
    "type": "function",
    "function": {
        "name": "weather", "description": "The weather of a town.",
        "parameters": {
            "type": "object", "properties": {"town": {"type": "string", "description": "Which."}}, "required": ["town"],
        },
    },
}  # fmt: skip
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"town": "Oslo by the sea"}}}
TALKS: dict[str, list[dict[str, Any]]] = {
    "one turn": [says("user", "Who is the tall man?"), says("assistant", "He is Tom, I think.")],
    "three turns": [
        says("user", "Who is the tall man?"), says("assistant", "He is Tom, I think."),
        says("user", "And the one beside him?"), says("assistant", "She is Lily, surely."),
        says("user", "Are both of them well?"), says("assistant", "They are, today."),
    ],
    "system": [
        says("system", "Be kind to everyone here."), says("user", "Who is the tall man?"),
        says("assistant", "He is Tom, I think."),
    ],
    "tools": [
        says("user", "How is the weather?"), says("assistant", None, tool_calls=[CALL]),
        says("tool", "It rains over there.", name="weather"), says("assistant", "It rains in Oslo."),
    ],
    "assistant first": [
        says("assistant", "Hello, I am Tom the cat."), says("user", "Who is the tall man?"),
        says("assistant", "He is Tom, I think."),
    ],
}  # fmt: skip


def stock(*, training: bool) -> list[Path]:
    trl = pytest.importorskip("trl", reason="the stock templates are those of trl")
    folder = Path(trl.__file__).parent / "chat_templates"
    return sorted(p for p in folder.glob("*.jinja") if p.stem.endswith("_training") == training)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make("qwen")


def answers(tokenizer: Any, template: str, messages: Any, **more: Any) -> list[AnswerText]:
    tokenizer.chat_template = template
    conversation = read_chat({"messages": messages, **more})
    assert conversation is not None
    return find_answers(ChatTemplate(tokenizer, DATE), conversation)


def spans(found: list[AnswerText]) -> list[str]:
    return [each.text[begin:end] for each in found for begin, end in each.spans]


@pytest.mark.slow
def test_stock_templates(tokenizer: Any) -> None:
    """Each answer stands in a span of its own and nothing that somebody else says; few conversations are refused."""
    refused, seen = [], 0
    for path in stock(training=False):
        for name, talk in TALKS.items():
            seen += 1
            try:
                found = answers(tokenizer, path.read_text(), talk, tools=[TOOL] if name == "tools" else None)
            except BadDocument as reason:
                assert "\n" not in str(reason) and len(str(reason)) < 200
                refused.append((path.stem, name, str(reason)))
                continue
            taught = spans(found)
            wanted = [m for m in talk if m["role"] == "assistant"]
            assert len(taught) == len(wanted), (path.stem, name, taught)
            for span, message in zip(taught, wanted, strict=True):
                words = [message["content"]] if message["content"] else ["weather", "Oslo by the sea"]
                assert all(word in span for word in words), (path.stem, name, span)
                others = [m["content"] for m in talk if m is not message and m["content"]]
                assert not any(word in span for word in others), (path.stem, name, span)
                heads = ("assistant\n", "<|assistant|>", "user\n", "system\n", "[INST]", "Assistant:", "ASSISTANT:")
                assert not any(head in span for head in heads), (path.stem, name, span)
            told = [m["content"] for m in talk if m["role"] != "assistant"]
            assert all(word in found[-1].text for word in told), (path.stem, name)
    assert seen >= 5 * 30
    assert len(refused) <= seen / 10, refused


@pytest.mark.slow
def test_templates_that_mark_answers_are_believed(tokenizer: Any) -> None:
    """The supervised tokens are those that transformers' own mask gives, wherever it gives any."""
    compared = 0
    for path in stock(training=True):
        for name, talk in TALKS.items():
            tools = [TOOL] if name == "tools" else None
            tokenizer.chat_template = path.read_text()
            try:
                own = tokenizer.apply_chat_template(
                    [{k: v for k, v in m.items() if v is not None} for m in talk], tools=tools, return_dict=True,
                    return_assistant_tokens_mask=True,
                )  # fmt: skip
            except Exception:
                continue
            conversation = read_chat({"messages": talk, "tools": tools})
            assert conversation is not None
            (found,) = Tokeniser(tokenizer, len(tokenizer), date=today()).tokenise([(0, conversation)])
            marked = tokenizer.decode(np.array(own["input_ids"])[np.array(own["assistant_masks"], bool)])
            if isinstance(found, BadDocument) or not all(
                m["content"] in marked for m in talk if m["role"] == "assistant" and m["content"]
            ):
                continue  # what it marks is not what the assistant says: rule 1 goes first
            (tokens,) = found
            assert tokens.ids.tolist() == own["input_ids"], (path.stem, name)
            assert tokens.supervised is not None
            assert tokens.supervised.astype(int).tolist() == own["assistant_masks"], (path.stem, name)
            compared += 1
    assert compared > 80


AWKWARD = [
    "a", "1", "12", "<", "|>", "</s>", "{", "]", ":", "_", "te", "im", "end", "assistant", "user", "model", "final",
    "turn", "channel", "to=user", "yes", "Yes, it is.", "He is", "He is Tom.", "<|im_end|>", "[/INST]", "Assistant:",
    "漢字", "🙂", "The quick brown fox", "The quick brown fox jumps over it.", "\n", "\\n", "def f():\n    return 1",
]  # fmt: skip
"""Words of which templates, and other messages, are made."""


@pytest.mark.slow
def test_spans_do_not_depend_on_the_words(tokenizer: Any) -> None:
    """Wherever a template writes messages as they are, their spans are those of plain words in their places."""
    chance, same, refused = random.Random(0), 0, []
    for path in stock(training=False):
        for _ in range(3):
            roles = ["system"] * (chance.random() < 0.2) + ["user", "assistant"] * chance.choice([1, 2, 3])
            words = ["".join(chance.choices(AWKWARD, k=chance.choice([0, 1, 1, 2]))).strip() for _ in roles]
            plain = [f"plain{n}words" for n in range(len(roles))]
            try:
                wanted = answers(tokenizer, path.read_text(), list(map(says, roles, plain)))
            except BadDocument:
                continue
            try:
                found = answers(tokenizer, path.read_text(), list(map(says, roles, words)))
            except BadDocument as reason:
                refused.append((path.stem, words, str(reason)))
                continue

            def put_in(text: str, words: list[str] = words) -> str:
                return re.sub(r"plain(\d)words", lambda place: words[int(place[1])], text)

            if [each.text for each in found] == [put_in(each.text) for each in wanted]:
                for one, other in zip(found, wanted, strict=True):
                    moved = tuple((len(put_in(other.text[:a])), len(put_in(other.text[:b]))) for a, b in other.spans)
                    assert one.spans == moved, (path.stem, words, spans(found))
                same += 1
    assert same > 100 and len(refused) < 5, refused


PLAIN = (
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
TWO = TALKS["three turns"][:4]


def test_an_answer_that_is_shown_in_two_ways_is_taught_as_it_was_when_it_was_the_last(tokenizer: Any) -> None:
    thinks = PLAIN.replace(
        "m['content']", "('<t></t>' if m['role'] == 'assistant' and loop.last else '') + m['content']"
    )
    first, second = answers(tokenizer, thinks, TWO)
    assert spans([first]) == ["<t></t>He is Tom, I think.</s>"]
    assert spans([second]) == ["<t></t>She is Lily, surely.</s>"]
    assert "He is Tom, I think." in second.text and "<t></t>He" not in second.text


def test_what_only_the_end_of_a_conversation_has_is_not_taught(tokenizer: Any) -> None:
    """Phi-3 writes one more token behind the last answer, which no model is asked for there."""
    ends = PLAIN + "{% if not add_generation_prompt %}<|im_end|>{% endif %}"
    (found,) = answers(tokenizer, ends, TWO)
    assert spans([found]) == ["He is Tom, I think.</s>", "She is Lily, surely.</s>"]


def test_a_greeting_is_taught_without_what_stands_before_it(tokenizer: Any) -> None:
    (found,) = answers(tokenizer, "{{ bos_token + '[system] Be kind.' + eos_token }}" + PLAIN, TALKS["assistant first"])
    assert spans([found]) == ["Hello, I am Tom the cat.</s>", "He is Tom, I think.</s>"]


def test_a_template_without_an_invitation(tokenizer: Any) -> None:
    for header in ("<{{ m.role }}>", "<{{ m.role }}> "):
        template = "{% for m in messages %}" + header + "{{ m.content }}</s>{% endfor %}"
        (found,) = answers(tokenizer, template, TWO)
        assert spans([found]) == ["He is Tom, I think.</s>", "She is Lily, surely.</s>"]


@pytest.mark.parametrize(
    ("template", "talk", "more", "words"),
    [
        (PLAIN.replace("m['content']", "m['content'][:5]"), TWO, {}, "content not shown: message 3"),
        (PLAIN.replace("messages", "messages[-2:]"), TWO, {}, "not"),
        (PLAIN.replace("m['content']", "('' if m.role == 'system' else m['content'])"), TALKS["system"], {},
         "content not shown: message 0, of role system"),
        (PLAIN.replace("m['content']", "('' if m.role == 'system' else m['content'])"),
         [says("system", "a"), *TALKS["one turn"]], {}, "content not shown: message 0, of role system"),
        (PLAIN, TALKS["one turn"], {"tools": [TOOL]}, "tools not shown"),
        (PLAIN, TALKS["one turn"], {"documents": [{"text": "x"}]}, "documents not shown"),
        (PLAIN, [*TALKS["one turn"][:1], says("assistant", "Tom.", reasoning_content="He is tall.")], {},
         "reasoning not shown: message 1"),
        (PLAIN, [*TALKS["one turn"][:1], says("assistant", "", tool_calls=[CALL])], {}, "tool call not shown"),
        (PLAIN.replace("eos_token", "(messages[0]['content'] if m['role'] == 'assistant' else '') + eos_token"),
         TALKS["one turn"], {}, "other words in an answer: the template shows message 0 inside message 1"),
        (PLAIN, TALKS["one turn"][:1], {}, "no answer"),
    ],
)  # fmt: skip
def test_what_the_template_does_not_show_rightly_is_a_bad_record(
    tokenizer: Any, template: str, talk: Any, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(BadDocument, match=words):
        answers(tokenizer, template, talk, **more)


PARTS = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}</s>{% endfor %}"


@pytest.mark.parametrize("template", [PLAIN, PARTS], ids=["strings", "parts"])
@pytest.mark.parametrize(
    "content", ["He is Tom.", [{"type": "text", "text": "He is "}, {"type": "text", "text": "Tom."}]]
)
def test_text_and_parts_of_text_suit_any_template(tokenizer: Any, template: str, content: Any) -> None:
    (found,) = answers(tokenizer, template, [says("user", content), says("assistant", content)])
    assert spans([found]) == ["He is Tom.</s>"]
    assert "[{" not in found.text


CALLS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is none %}{% for c in m.tool_calls %}"
    "{{ '<call>' + c.function.name + ' ' + c.function.arguments }}{% endfor %}{% else %}{{ m.content }}{% endif %}"
    "</s>{% endfor %}"
)


@pytest.mark.parametrize("arguments", [{"town": "Oslo by the sea"}, '{"town": "Oslo by the sea"}'])
@pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
def test_calls_suit_a_template_that_takes_them_in_one_shape(tokenizer: Any, arguments: Any, content: Any) -> None:
    call = {"role": "assistant", **content, "tool_calls": [{"function": {"name": "weather", "arguments": arguments}}]}
    (found,) = answers(tokenizer, CALLS, [says("user", "How is it?"), call])
    assert spans([found]) == ['<call>weather {"town": "Oslo by the sea"}</s>']


def test_weights_choose_among_marked_answers(tokenizer: Any) -> None:
    marked = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
        "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
    )
    for template in (PLAIN, marked):
        (found,) = answers(tokenizer, template, [*TWO[:3], {**TWO[3], "weight": 0}])
        assert spans([found]) == ["He is Tom, I think.</s>"]


def test_today_is_the_day_of_the_manifest(tokenizer: Any) -> None:
    dated = "{{ strftime_now('%d %b %Y') }}" + PLAIN
    (found,) = answers(tokenizer, dated, TALKS["one turn"])
    assert found.text.startswith("31 Jan 2026[user]")


def test_what_the_template_is_run_by_has_not_changed() -> None:
    """The private function of transformers that compiles a template."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    compiled = _compile_jinja_template("{{ strftime_now('%Y') }}{% generation %}x{% endgeneration %}")
    blocks: list[str] = []
    marks: list[tuple[int, int]] = []
    with compiled.environment.activate_tracker(blocks, marks):
        for block in compiled.generate(strftime_now=lambda form: "then"):
            blocks.append(block)  # noqa: PERF402
    assert ("".join(blocks), marks) == ("thenx", [(4, 5)])


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("words", ["assistant", "user", "im", "<", "a", "1", "<|im_start|>assistant\nassistant"])
def test_an_answer_of_the_words_of_its_header_is_taught_without_the_header(tokenizer: Any, words: str) -> None:
    invites_a_thought = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    for template in (CHATML, invites_a_thought):
        (found,) = answers(tokenizer, template, [says("user", words), says("assistant", words)] * 2)
        assert spans([found]) == [words + "<|im_end|>"] * 2


def test_an_answer_that_begins_as_the_invited_thought_does_is_taught_from_its_first_letter(tokenizer: Any) -> None:
    invites_a_thought = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    for words in ("<b>He is Tom.</b>", "<thin>", "", "<thinking>\nHe is Tom."):
        (found,) = answers(tokenizer, invites_a_thought, [says("user", "Who?"), says("assistant", words)])
        assert spans([found]) == [words + "<|im_end|>"], words


def marking(end: str = "", before: str = "") -> str:
    """A template that marks an answer, and what ends it, apart."""
    return (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}" + before + "{% generation %}"
        "{% if m.tool_calls %}{{ m.tool_calls[0].function.name + '(' + m.tool_calls[0].function.arguments.town + ')' }}"
        "{% endif %}{{ m.content or '' }}{% endgeneration %}" + end + "{% else %}{{ m.content }}</s>{% endif %}"
        "{% endfor %}{{ tools | length if tools else '' }}"
    )


def test_marks_that_touch_are_of_one_answer(tokenizer: Any) -> None:
    template = marking("{% generation %}</s>{% endgeneration %}")
    (found,) = answers(tokenizer, template, [*TWO[:1], {**TWO[1], "weight": 0}, *TWO[2:]])
    assert spans([found]) == ["She is Lily, surely.</s>"]


def test_a_call_between_marked_answers_has_a_mark_of_its_own(tokenizer: Any) -> None:
    talk = [*TALKS["one turn"], *TALKS["tools"]]
    (found,) = answers(tokenizer, marking("</s>"), talk, tools=[TOOL])
    assert spans([found]) == ["He is Tom, I think.", "weather(Oslo by the sea)", "It rains in Oslo."]
    without = marking("</s>").replace("m.tool_calls[0].function.name", "''")
    with pytest.raises(BadDocument, match="tool call not shown: message 3, in no place that the template marks"):
        answers(tokenizer, without, talk, tools=[TOOL])


def test_the_same_words_earlier_do_not_stand_for_an_answer_that_is_not_marked(tokenizer: Any) -> None:
    once = marking("</s>").replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.first %}")
    talk = [says("assistant", "Yes, it is so."), says("user", "Yes?"), says("assistant", "Yes, it is so.")]
    with pytest.raises(BadDocument, match="content not shown: message 2, in no place that the template marks"):
        answers(tokenizer, once, talk)


def test_a_developer_is_the_system_of_a_template_that_knows_none(tokenizer: Any) -> None:
    knows = "{% for m in messages %}{% if m.role in ('system', 'user', 'assistant', 'tool') %}<{{ m.role }}>"
    knows += "{{ m.content }}</s>{% endif %}{% endfor %}"
    talk = [says("developer", "Be kind to everyone here."), *TALKS["one turn"], says("ipython", "It is 4."), TWO[3]]
    (found,) = answers(tokenizer, knows, talk)
    assert found.text.startswith("<system>Be kind") and "<tool>It is 4." in found.text
    (found,) = answers(tokenizer, PLAIN, talk)  # which shows whatever there is
    assert found.text.startswith("[developer] Be kind")


def test_people_of_other_names(tokenizer: Any) -> None:
    for user, assistant in (("human", "gpt"), ("user", "model"), ("human", "bot")):
        (found,) = answers(tokenizer, PLAIN, [says(user, "Who is he?"), says(assistant, "He is Tom.")])
        assert found.text == "[user] Who is he?</s>\n[assistant] He is Tom.</s>\n"


def test_what_a_template_lacks_is_told_before_what_it_says_of_shapes_that_nobody_gave(tokenizer: Any) -> None:
    picky = PLAIN.replace("{% for", "{% if messages[0].content is not string %}{{ raise_exception('No parts.') }}"
                          "{% endif %}{% for", 1)  # fmt: skip
    with pytest.raises(BadDocument, match="tools not shown"):
        answers(tokenizer, picky, TALKS["one turn"], tools=[TOOL])


def test_few_words_that_stand_by_chance_in_what_a_template_writes_are_no_answer(tokenizer: Any) -> None:
    hides = CHATML.replace("m['content']", "(m['content'] if m.role == 'user' else '')")
    for words in ("<", "end", "|"):
        with pytest.raises(BadDocument, match="content not shown: message 1"):
            answers(tokenizer, hides, [says("user", "Who?"), says("assistant", words)])


def test_few_words_that_stand_in_the_header_too_end_where_they_stand_as_words(tokenizer: Any) -> None:
    channels = CHATML.replace("m['content'] + '<|im_end|>\n'", (
        "('<|channel|>final<|message|>' if m.role == 'assistant' else '') + m['content'] + "
        "('<|return|>' if loop.last and not add_generation_prompt else '<|end|>')"
    )).replace("assistant\n' }}{% endif", "assistant' }}{% endif").replace("m['role'] + '\n'", "m['role']")  # fmt: skip
    for words in ("final", "channel", "|", ""):
        (found,) = answers(tokenizer, channels, [says("user", "Who?"), says("assistant", words)])
        assert spans([found]) == [f"<|channel|>final<|message|>{words}<|return|>"], words
