"""Supervised tokens decode to exactly what was said, whatever tokenizer there is."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
import pytest

from kdcache.corpus.documents import Completion
from kdcache.corpus.exact_tokens import ExactTokens
from kdcache.corpus.messages import read_chat
from kdcache.corpus.packing import Tokens
from kdcache.corpus.tokenise import Tokeniser
from tests.corpus.tokenizers_of_kinds import KINDS, make

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BRACKETS = (  # its prompt ends with a space, which a tokenizer takes for the beginning of the answer
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
ANSWERS = {
    "code": "def f(x):\n    return x + 1\n\n\nfor i in range(10):\n\tprint(i)\n",
    "spaces": "  two before and two behind  ",
    "lines": "\n\n  He is Tom.\n\n\n",
    "tabs": "\t\tx\t",
    "only spaces": "    ",
    "cjk": "東京は日本の首都です。",
    "emoji": "🦆🙂 yes 👩‍👩‍👧",
    "accents": "naïve café",
    "plain": "He is Tom.",
    "empty": "",
}


@pytest.fixture(scope="module", params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return make(request.param)


def taught(tokenizer: Any, tokens: Tokens) -> list[str]:
    """The text of each run of supervised tokens, read behind the token before it: a decoder may strip a first space."""
    assert tokens.supervised is not None
    edges = np.flatnonzero(np.diff(tokens.supervised.astype(int), prepend=0, append=0))
    found = []
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        before, whole = (tokenizer.decode(tokens.ids[:end], skip_special_tokens=False) for end in (start, stop))
        found.append(whole[len(before) :])
    return found


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("template", [CHATML, BRACKETS], ids=["chatml", "brackets"])
def test_an_answer_is_taught_with_its_closing_token_and_nothing_else(tokenizer: Any, template: str, name: str) -> None:
    tokenizer.chat_template = template
    answer, closing = ANSWERS[name], "<|im_end|>" if template is CHATML else "</s>"
    talk = [{"role": "user", "content": "Who is he?"}, {"role": "assistant", "content": answer}] * 2
    ((tokens,),) = Tokeniser(tokenizer, len(tokenizer)).tokenise([(0, read_chat({"messages": talk}))])
    assert taught(tokenizer, tokens) == [answer + closing] * 2


@pytest.mark.parametrize(
    "answer", ["cafe\u0301 nai\u0308ve", "tie\u0302\u0301ng Vie\u0323\u0302t", "\u1112\u1161\u11ab\u1100\u116e\u11a8"]
)
def test_an_accent_written_by_itself_is_a_part_of_its_letter(tokenizer: Any, answer: str) -> None:
    """A tokenizer may compose both into one character, whose place is that of the letter."""
    tokenizer.chat_template = CHATML
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": answer}]
    ((tokens,),) = Tokeniser(tokenizer, len(tokenizer)).tokenise([(0, read_chat({"messages": talk}))])
    (found,) = taught(tokenizer, tokens)
    assert unicodedata.normalize("NFC", found) == unicodedata.normalize("NFC", answer) + "<|im_end|>"


@pytest.mark.parametrize("name", [name for name in ANSWERS if name != "empty"])
def test_a_completion_is_taught_and_nothing_else(tokenizer: Any, name: str) -> None:
    for prompt in ("Who is he?", "Who is he? ", "Who is he?\n", ""):
        document = Completion(prompt=prompt, completion=ANSWERS[name])
        ((tokens,),) = Tokeniser(tokenizer, len(tokenizer), eos="always").tokenise([(0, document)])
        found, wanted = "".join(taught(tokenizer, tokens)), ANSWERS[name] + "</s>"
        if not prompt:  # at the start of a text a tokenizer may put a space, and a decoder take one away
            found, wanted = found.lstrip(" "), wanted.lstrip(" ")
        assert found == wanted, prompt


def test_where_no_token_reaches_over_an_edge_the_ids_are_those_of_the_whole_text(tokenizer: Any) -> None:
    text = "<|im_start|>user\nWho is he?<|im_end|>\n<|im_start|>assistant\nHe is Tom.<|im_end|>\n"
    begin = text.index("He is")
    ids, supervised = ExactTokens(tokenizer).encode(text, [(begin, len(text) - 1)])
    assert ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert supervised.any() and not supervised[-1]
