"""Answers: a conversation to the texts that a teacher reads, and where in them each answer stands.

Guarantee: the content of every message stands in the text; that of each answer that is taught stands inside a span of
its own; no header, no system prompt and no other message's words stand in any span. A conversation for which this does
not hold is a `BadDocument`, with the reason.

What is taught is an answer as the template shows it while it is the last one, for that is what a model is asked to say.
A span begins where the prompt that invites an answer ends, and ends with what closes the answer: the end-of-turn token,
or what the template writes in its place.

    one text       the answers stand in the whole conversation as they stood while each was the last
    several texts  the template shows earlier answers otherwise (Qwen3 leaves their thoughts out; gpt-oss closes the
                   last one with another token): an answer that is not the same later has a text of its own, at whose
                   end it is taught

A template that marks answers by `{% generation %}` is believed, and the same is checked.

Templates differ in what they take. These shapes of a conversation are tried in order: text as a string or as a list of
parts; the arguments of calls as they are, as objects or as JSON; an absent content as absent, null or empty; and last
all of these again with a developer as the system, and each name of a tool's role as `tool`. The first that keeps the
guarantee is taken.

Cost: four calls of the template for each answer.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.corpus.chat_template import ChatTemplate, Rendering, Span
from kdcache.corpus.documents import BadDocument, Conversation, Message, text_of
from kdcache.corpus.records import is_nested_too_deeply

_MARKER = "kdcachemarker"
"""Stands for an answer, to see where a template puts one."""

_OLDER_ROLES = {"developer": "system", "function": "tool", "ipython": "tool", "observation": "tool"}
"""Roles that some templates know, and what the others call them."""

_LEAST_FOREIGN = 12
"""Characters of another message that are looked for in a span: fewer may stand there by chance."""


@dataclass(frozen=True)
class AnswerText:
    """A text that a teacher reads, and the spans of it that are taught, in order and apart."""

    text: str
    spans: tuple[Span, ...]


def find_answers(template: ChatTemplate, conversation: Conversation) -> list[AnswerText]:
    """The texts of a conversation, with the spans of its answers.

    Raises:
        BadDocument: there is no answer to teach, the template refuses the conversation, or what it says is not what
            the template shows.
    """
    if not any(conversation.taught):
        raise BadDocument("no answer: nothing that an assistant says is to be taught")
    refusals: list[BadDocument] = []
    for messages in _ways(conversation.messages):
        try:
            return _Shown(template, conversation, messages).answers()
        except BadDocument as error:
            refusals.append(error)
    raise max(refusals, key=lambda error: error.weight)  # the first of those


def find_prompt(template: ChatTemplate, conversation: Conversation) -> str:
    """The text after which a model is to answer: all messages up to the last that is no answer, and the invitation.

    The content of every message stands in it. What an assistant says at the end is left out: a new answer is wanted.

    Raises:
        BadDocument: nobody asks anything, the template refuses the messages, or it does not show one of them.
    """
    asked = list(conversation.messages)
    while asked and asked[-1]["role"] == "assistant":
        asked.pop()
    if not any(text_of(message.get("content")).strip() for message in asked):
        raise BadDocument("no text: the conversation asks nothing")
    refusals: list[BadDocument] = []
    for messages in _ways(asked):
        try:
            return _Shown(template, conversation, messages).prompt()
        except BadDocument as error:
            refusals.append(error)
    raise max(refusals, key=lambda error: error.weight)  # the first of those


def _ways(messages: list[Message]) -> Iterator[list[Message]]:
    """The same messages in the shapes that templates expect, each once."""
    tried: list[list[Message]] = []
    renamed = [{**message, "role": _OLDER_ROLES.get(message["role"], message["role"])} for message in messages]
    for named, parts, arguments, empty in itertools.product(
        (messages, renamed), (False, True), ("given", dict, str), ("absent", None, "")
    ):
        found = [_shaped(message, parts, arguments, empty) for message in named]
        if found not in tried:
            tried.append(found)
            yield found


def _shaped(message: Message, parts: bool, arguments: Any, empty: Any) -> Message:
    found = dict(message)
    if "content" in found:
        text = text_of(found["content"])
        found["content"] = [{"type": "text", "text": text}] if parts else text
        if not text and "tool_calls" in found:
            del found["content"]
    if "content" not in found and empty != "absent":
        found["content"] = [{"type": "text", "text": ""}] if parts and empty == "" else empty
    if "tool_calls" in found and arguments != "given":
        found["tool_calls"] = [_with_arguments(call, arguments) for call in found["tool_calls"]]
    return found


def _with_arguments(call: dict[str, Any], kind: type) -> dict[str, Any]:
    """A call whose arguments are an object, or JSON in a text."""
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_arguments(call["function"], kind)}
    given = call.get("arguments")
    if kind is str and isinstance(given, dict):
        return {**call, "arguments": json.dumps(given, ensure_ascii=False)}
    if kind is dict and isinstance(given, str):
        parsed = _object_in(given)
        return call if parsed is None else {**call, "arguments": parsed}
    return call


def _object_in(text: str) -> dict[str, Any] | None:
    """The object that a text is as JSON; None where it is none that can be walked through."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and not is_nested_too_deeply(found) else None


class _Shown:
    """A conversation in one shape, shown by a template."""

    def __init__(self, template: ChatTemplate, conversation: Conversation, messages: list[Message]) -> None:
        self._template, self._conversation, self._messages = template, conversation, messages
        self._known: dict[tuple[int, bool], Rendering] = {}

    def answers(self) -> list[AnswerText]:
        """The texts, in the order of their last answers."""
        self._require_tools()
        whole = self._render(len(self._messages))
        if whole.marks:
            return [self._marked(whole)]
        turns = [n for n, taught in enumerate(self._conversation.taught) if taught]
        texts: list[tuple[str, list[Span], set[int]]] = []
        for n in reversed(turns):
            try:
                text = self._render(n + 1).text
                begin = self._begin(n, text)
            except BadDocument as error:  # some templates refuse a conversation that ends, or begins, so early
                try:
                    text, span = self._span_in_whole(n)
                except BadDocument:
                    raise error from None
            else:
                span = begin, self._end_of_answer(n, text, begin)
            self._require_own(n, text[slice(*span)])
            if not texts and whole.text.startswith(text[: span[1]]):
                texts.append((whole.text, [], set()))
            carrier = next((found for found in texts if found[0].startswith(text[: span[1]])), None)
            if carrier is None:
                carrier = (text, [], set())
                texts.append(carrier)
            carrier[1].insert(0, span)
            carrier[2].add(n)
        for text, spans, answers in texts:
            last = len(self._messages) if text == whole.text else max(answers) + 1
            self._require_contents(text, spans, range(last), answers)
        return [AnswerText(text, tuple(spans)) for text, spans, _ in reversed(texts)]

    def prompt(self) -> str:
        """The text of all messages, and what invites an answer behind them."""
        self._require_tools()
        text = self._render(len(self._messages), invite=True).text
        self._require_contents(text, [], range(len(self._messages)), set())
        return text

    def _render(self, count: int, invite: bool = False) -> Rendering:
        """The first messages."""
        if (count, invite) not in self._known:
            self._known[count, invite] = self._show(self._messages[:count], invite)
        return self._known[count, invite]

    def _show(self, messages: Sequence[Message], invite: bool = False) -> Rendering:
        told = self._conversation
        return self._template.render(
            messages, invite=invite, tools=told.tools, documents=told.documents, settings=told.settings
        )

    def _end_of_answer(self, n: int, text: str, begin: int) -> int:
        """Where the answer of message n ends in the text that ends with it, its closing token included."""
        past = begin
        for what, words in _said(self._messages[n], answer=True):
            at = _find(text, words, begin)
            if at is None:
                raise BadDocument(f"{what} not shown: message {n}, by the chat template")
            past = max(past, at[1])
        content = text_of(self._messages[n].get("content"))
        if len(content) < _LEAST_FOREIGN and not self._messages[n].get("tool_calls"):
            past = max(begin, self._end_of_content(n, text, content) or past)
        return self._end(n, text, past)

    def _end_of_content(self, n: int, text: str, content: str) -> int | None:
        """Where few words end, which may stand by chance in what is written around them; None where that is unknown."""
        try:
            shown = self._show([*self._messages[:n], {**self._messages[n], "content": self._marker(n)}]).text
        except BadDocument:
            return None  # a template that looks into the words
        before, marker, after = shown.partition(_MARKER)
        if not marker and content.strip():
            raise BadDocument(f"content not shown: message {n}, by the chat template")
        end = len(text) - len(after)
        fits = marker and text.startswith(before) and text.endswith(after)
        return end if fits and text[len(before) : end].strip() == content.strip() else None

    def _span_in_whole(self, n: int) -> tuple[str, Span]:
        """The whole text, and where in it the answer of message n stands: between what a marker in its place stands."""
        whole, marked = self._render(len(self._messages)).text, self._show(self._with_marker(n)).text
        at = marked.find(_MARKER)
        before, after = marked[:at], marked[at + len(_MARKER) :]
        content = text_of(self._messages[n].get("content"))
        fits = at >= 0 and whole.startswith(before) and whole.endswith(after) and len(whole) >= len(before + after)
        if not fits or not content or whole[at : len(whole) - len(after)].strip() != content.strip():
            raise BadDocument(f"answer not found: message {n} cannot be told apart from what stands around it")
        if list(_said(self._messages[n], answer=True)) != [("content", content.strip())]:
            raise BadDocument(f"answer not found: message {n} says more than a text, and may not end a conversation")
        tokens = "|".join([*map(re.escape, self._template.special), r"<[^<>\s]+>|\S*"])
        closing = re.match(rf"\s*({tokens})", after)
        assert closing is not None
        invitation = self._invitation()
        found = before.rfind(invitation) if invitation.strip() else -1
        begin = found + len(invitation) if found >= 0 else at
        return whole, (begin, len(whole) - len(after) + closing.end())

    def _begin(self, n: int, text: str) -> int:
        """Where the prompt ends that invites the answer."""
        if n:
            before, invited = self._render(n).text, self._render(n, invite=True).text
            common = _common(invited, text)
            if invited != before and common >= _common(invited, before):
                return common if common == len(invited) else self._parting(n, text, _common(before, text), common)
            if invited == before and text.startswith(before):
                header = self._header(n)
                if header is not None and not header[0][len(before) :].strip():
                    return len(before)
        header = self._header(n)
        if header is None or not text.startswith(header[0]):
            raise BadDocument(f"answer not found: message {n} cannot be told apart from what precedes it")
        return len(header[0])

    def _parting(self, n: int, text: str, start: int, common: int) -> int:
        """Where the answer begins, if the text goes on as the prompt does up to a place inside the invitation.

        A prompt that invites a thought may go on as an answer without one does: both with a "<", it may be.
        """
        begins = [self._whole_tokens(text, common)]
        for _, words in _said(self._messages[n], answer=True):
            for spelled in _spellings(words):
                at = text.find(spelled, max(start, common - len(spelled) + 1))
                begins += [at] if 0 <= at < common else []
        return max(start, min(begins))

    def _header(self, n: int) -> tuple[str] | None:
        """What stands before an answer at message n, up to the end of the prompt that invites it."""
        shown = self._show([*self._messages[:n], {"role": "assistant", "content": self._marker(n)}]).text
        at = shown.find(_MARKER)
        if at < 0:
            return None
        invitation = self._invitation()
        found = shown.rfind(invitation, 0, at) if invitation.strip() else -1
        return (shown[: found + len(invitation) if found >= 0 else at],)

    def _marker(self, n: int) -> str | list[Any]:
        """The marker, in the shape of a message's content."""
        parts = isinstance(self._messages[n].get("content"), list)
        return [{"type": "text", "text": _MARKER}] if parts else _MARKER

    def _invitation(self) -> str:
        """The prompt that invites an answer, as it follows a question; "" where the template has none."""
        asked = [{"role": "user", "content": self._marker(0)}]
        try:
            before, invited = self._template.render(asked).text, self._template.render(asked, invite=True).text
        except BadDocument:
            return ""
        return invited[_common(before, invited) :]

    def _end(self, n: int, text: str, past: int) -> int:
        """Where the answer ends, its closing token included.

        Args:
            n: its message.
            text: that ends with it.
            past: behind the last of its words.
        """
        tail = text[past:]
        closing = tail
        with_invite = self._render(n + 1, invite=True).text
        if with_invite.startswith(text[:past]):
            more = with_invite[past:]
            common = _common(tail, more)
            if common < min(len(tail), len(more)):  # both go on, differently: whole tokens only
                common = self._whole_tokens(tail, common)
            closing = tail[:common] if tail[:common].strip() else tail
        closing = closing.rstrip() or closing
        return past + len(closing)

    def _whole_tokens(self, text: str, stop: int) -> int:
        """The last place up to `stop` that cuts no added token and no markup."""
        special = self._template.special  # there may be thousands
        lengths = {len(token) for token in special}
        for start in range(max(0, stop - max(lengths, default=0) + 1), stop):
            if any(start + length > stop and text[start : start + length] in special for length in lengths):
                return start
        edge = max((match.end() for match in re.finditer(r"[>\]\}\s]", text[:stop])), default=0)
        return edge if re.match(r"\w|<|\[|\{", text[edge : edge + 1]) else stop

    def _require_own(self, n: int, span: str, friends: Sequence[int] = ()) -> None:
        """Refuse a span that holds what another message says, but for those that may share it."""
        rest = span
        for _, words in _said(self._messages[n], answer=True):
            rest = rest.replace(words, "\0")
        for other, message in enumerate(self._messages):
            words = text_of(message.get("content")).strip()
            if other != n and other not in friends and len(words) >= _LEAST_FOREIGN and words in rest:
                raise BadDocument(f"other words in an answer: the template shows message {other} inside message {n}")

    def _require_contents(self, text: str, spans: list[Span], shown: range, answers: set[int]) -> None:
        """Refuse a text that leaves out what a message says."""
        outside, at = [], 0
        for begin, end in spans:
            outside.append(text[at:begin])
            at = end
        context = "\n".join([*outside, text[at:]])
        for n in shown:
            if n in answers:
                continue
            for what, words in _said(self._messages[n], answer=False):
                if _find(context, words, 0) is None:
                    role = self._messages[n]["role"]
                    raise BadDocument(f"{what} not shown: message {n}, of role {role}, by the chat template")
                if len(words) < _LEAST_FOREIGN:
                    self._require_short(n, what)

    def _require_short(self, n: int, what: str) -> None:
        """The same for few words, which may stand in a text by chance: longer ones in their place must be shown."""
        message = self._messages[n]
        if what != "content" or not message.get("content"):
            return
        try:
            shown = self._show(self._with_marker(n)).text
        except BadDocument:
            return  # a template that looks into the words: what it shows of the true ones has been found
        if _MARKER not in shown:
            raise BadDocument(f"{what} not shown: message {n}, of role {message['role']}, by the chat template")

    def _with_marker(self, n: int) -> list[Message]:
        """All messages, the marker in the place of what one says."""
        return [*self._messages[:n], {**self._messages[n], "content": self._marker(n)}, *self._messages[n + 1 :]]

    def _require_tools(self) -> None:
        """Refuse a template that does not show the tools or the documents."""
        told = self._conversation
        for what, items in (("tools", told.tools), ("documents", told.documents)):
            if items is None:
                continue
            without = self._template.render(
                self._messages, tools=None if what == "tools" else told.tools,
                documents=None if what == "documents" else told.documents, settings=told.settings,
            )  # fmt: skip
            if without.text == self._render(len(self._messages)).text:
                raise BadDocument(f"{what} not shown: the chat template has no place for them")

    def _marked(self, whole: Rendering) -> AnswerText:
        """The answers where the template itself marks them."""
        taught, messages = self._conversation.taught, self._messages
        marks = _joined(whole.marks)
        answers = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if not all(taught[n] for n in answers):
            if len(marks) != len(answers):
                raise BadDocument(
                    f"marks that do not match: the template marks {len(marks)} places for {len(answers)} answers, of "
                    "which some are not to be taught"
                )
            marks = [mark for mark, n in zip(marks, answers, strict=True) if taught[n]]
            answers = [n for n in answers if taught[n]]
        first, past = 0, 0  # the mark, and the place, from which on an answer may stand
        for n in answers:
            found = [self._place_in_marks(n, what, words, whole.text, marks[first:], past)
                     for what, words in _said(messages[n], answer=False)]  # fmt: skip
            for begin, end, mark in found:
                self._require_own(n, whole.text[slice(*mark)], answers)
                first, past = max(first, marks.index(mark)), max(past, end, begin)
        self._require_contents(whole.text, marks, range(len(messages)), set(answers))
        return AnswerText(whole.text, tuple(marks))

    def _place_in_marks(
        self, n: int, what: str, words: str, text: str, marks: Sequence[Span], past: int
    ) -> tuple[int, int, Span]:
        """Where some words of an answer stand inside a mark, and the mark."""
        for mark in marks:
            found = _find(text, words, max(mark[0], past), mark[1])
            if found:
                return *found, mark
        raise BadDocument(f"{what} not shown: message {n}, in no place that the template marks as an answer")


def _joined(marks: Sequence[Span]) -> list[Span]:
    """Marks that are not empty, those that touch as one: a template may mark an answer and its closing token apart."""
    found: list[Span] = []
    for begin, end in marks:
        if found and found[-1][1] == begin:
            found[-1] = found[-1][0], end
        elif begin < end:
            found.append((begin, end))
    return found


def _common(a: str, b: str) -> int:
    """Characters with which both begin."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection: comparing slices is much faster than comparing characters
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _last_words(content: str) -> str:
    """What a content says behind its thoughts."""
    return content.rpartition("</think>")[2].strip()


def _said(message: Message, *, answer: bool) -> Iterator[tuple[str, str]]:
    """What a message says, piece by piece.

    Args:
        message: of a conversation.
        answer: with its thoughts; templates leave those of earlier answers out.
    """
    content = text_of(message.get("content"))
    reasoning = next((message[key] for key in ("reasoning_content", "thinking", "reasoning") if message.get(key)), None)
    if message["role"] != "assistant":
        pieces = [("content", content.strip())]
    else:
        pieces = [("content", _last_words(content))]
        if answer and "</think>" in content:
            pieces.insert(0, ("reasoning", content.rpartition("</think>")[0].rpartition("<think>")[2].strip()))
    if answer and isinstance(reasoning, str):
        pieces.insert(0, ("reasoning", reasoning.strip()))
    for call in message.get("tool_calls") or ():
        function = call.get("function", call)
        pieces.append(("tool call", str(function.get("name", "")).strip()))
        pieces += [("tool call", words) for words in _leaves(function.get("arguments"))]
    return ((what, words) for what, words in pieces if words)


def _leaves(value: Any) -> Iterator[str]:
    """The texts in the arguments of a call."""
    if isinstance(value, str):
        parsed = _object_in(value)
        if parsed is not None:
            yield from _leaves(parsed)
        else:
            yield value.strip()
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)


def _find(text: str, words: str, start: int, stop: int | None = None) -> Span | None:
    """Where some words stand: as they are, or as JSON writes them."""
    for spelled in _spellings(words):
        at = text.find(spelled, start, stop)
        if at >= 0:
            return at, at + len(spelled)
    return None


def _spellings(words: str) -> tuple[str, ...]:
    return words, json.dumps(words, ensure_ascii=False)[1:-1], json.dumps(words)[1:-1]
