"""A chat template: messages in, the text that a teacher reads out.

Templates are compiled and run by transformers, in its sandbox. The template is called here and not through
`apply_chat_template`, for two reasons: what a template asks for as today's date is the day of the manifest, so the
clock decides no token; and the places that `{% generation %}` marks are kept as places in the text.
Cost: compiling, once; about 0.1 ms a call.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kdcache.corpus.documents import BadDocument, Message
from kdcache.errors import CorpusError

Span = tuple[int, int]
"""Characters of a text, from one to before another."""

_MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Rendering:
    """What a template makes of messages.

    Attributes:
        text: what the teacher reads.
        marks: where the template itself says that an answer stands, in order.
    """

    text: str
    marks: tuple[Span, ...] = ()


class ChatTemplate:
    """The template of a tokenizer.

    Args:
        tokenizer: of transformers.
        date: the day, `YYYY-MM-DD`, that a template may ask for.

    Attributes:
        special: texts of the tokenizer's added tokens, longest first; the values mean nothing.

    Raises:
        CorpusError: the tokenizer has no template, or the template draws random numbers.
    """

    def __init__(self, tokenizer: Any, date: str) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise CorpusError(
                "the corpus holds conversations, but the teacher's tokenizer has no chat template; give one as "
                "chat_template"
            )
        self._tokenizer, self._day = tokenizer, datetime.date.fromisoformat(date)
        self._compiled: dict[bool, tuple[Any, bool]] = {}
        self.special = dict.fromkeys(sorted(tokenizer.get_added_vocab(), key=len, reverse=True))
        self._variables = {**tokenizer.special_tokens_map, "strftime_now": self._strftime}

    def _strftime(self, form: str) -> str:
        return datetime.datetime.combine(self._day, datetime.time()).strftime(form)

    def _template(self, tools: bool) -> tuple[Any, bool]:
        """The compiled template, and whether it marks answers; a tokenizer may have another one for tools."""
        if tools not in self._compiled:
            from transformers.utils.chat_template_utils import _compile_jinja_template

            try:
                source = self._tokenizer.get_chat_template(None, [{}] if tools else None)
                compiled = _compile_jinja_template(source)
            except Exception as error:  # whatever a template's author may have written
                raise CorpusError(f"the chat template cannot be used: {_first_line(error)}") from error
            if _draws(compiled.environment.parse(source)):
                raise CorpusError("the chat template draws random numbers, so a shard would not be the same twice")
            self._compiled[tools] = compiled, bool(_MARKED.search(source))
        return self._compiled[tools]

    def render(
        self,
        messages: Sequence[Message],
        *,
        invite: bool = False,
        tools: list[Any] | None = None,
        documents: list[Any] | None = None,
        settings: dict[str, Any] | None = None,
    ) -> Rendering:
        """Run the template.

        Args:
            messages: of a conversation.
            invite: end with the prompt that invites an answer.
            tools, documents: for the template.
            settings: further variables.

        Raises:
            BadDocument: the template refuses the messages.
        """
        compiled, marked = self._template(bool(tools))
        variables = {
            **self._variables, **(settings or {}), "messages": [_with_reasoning(m) for m in messages], "tools": tools,
            "documents": documents, "add_generation_prompt": invite,
        }  # fmt: skip
        try:
            if not marked:
                return Rendering(compiled.render(**variables))
            blocks: list[str] = []
            marks: list[Span] = []
            with compiled.environment.activate_tracker(blocks, marks):
                for block in compiled.generate(**variables):
                    blocks.append(block)  # noqa: PERF402 - one by one: a mark counts what is there so far
            return Rendering("".join(blocks), tuple(marks))
        except Exception as error:  # a template is a program, and raises what it likes
            meant = type(error).__name__ == "TemplateError"  # `raise_exception`, and no slip on an unexpected type
            raise BadDocument(f"refused by the chat template: {_first_line(error)}", 1 if meant else 0) from error


def _with_reasoning(message: Message) -> Message:
    """A message whose reasoning has every name under which templates look for it."""
    reasoning = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    return message if reasoning is None else {**dict.fromkeys(_REASONING[:2], reasoning), **message}


def _draws(source: Any) -> bool:
    """Whether a parsed template uses what jinja has of chance: a filter, which `map` may call too, and a text."""
    from jinja2 import nodes

    filters = list(source.find_all(nodes.Filter))
    called = {filter_.name for filter_ in filters}
    called |= {value.value for filter_ in filters for value in filter_.args if isinstance(value, nodes.Const)}
    return "random" in called or any(name.name == "lipsum" for name in source.find_all(nodes.Name))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
