"""Record form: how a record becomes a document, by the form of its corpus.

    text        a text
    chat        messages of roles: OpenAI's `messages`, ShareGPT's `conversations`, Alpaca's instruction and output, a
                prompt and a completion that are messages; as lists, or as JSON in a string
    completion  a prompt and a completion that are texts; only the completion is taught
    tokenised   token ids, with columns that say which of them count

Nothing that a record says is left out silently: what cannot be taken is a `BadDocument`, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kdcache.corpus.documents import BadDocument, Completion, Document, PromptedText, kind_of, require_encodable
from kdcache.corpus.messages import read_chat, read_completed_messages
from kdcache.corpus.records import Record, Unreadable
from kdcache.corpus.teacher_context import COLUMNS as TEACHER_COLUMNS
from kdcache.corpus.token_records import read_tokens


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the documents of a corpus are made of.

    Attributes:
        name: `text`, `chat`, `completion` or `tokenised`.
        columns: by role (`text`, `messages`, `prompt`, ...), the column that plays it.
        optional: further columns of the same kind that a record may have.
        late: columns that say what a teacher reads, and that the first records do not have: a record that has one is
            refused.
    """

    name: str
    columns: dict[str, str]
    optional: dict[str, str] = field(default_factory=dict)
    late: tuple[str, ...] = ()

    @property
    def wanted(self) -> tuple[str, ...]:
        """All columns that are read."""
        return (*self.columns.values(), *self.optional.values(), *self.late)

    @property
    def tells_teacher(self) -> bool:
        """Whether records may say what a teacher reads."""
        return any(name in self.optional for name in TEACHER_COLUMNS)

    def document(self, record: Record) -> Document | None:
        """What a record says; None where it says nothing, as its column is null.

        Raises:
            BadDocument: it cannot be used.
        """
        if isinstance(record, Unreadable):
            raise BadDocument(record.reason)
        if isinstance(record, str):
            return require_encodable(record)
        for name in self.late:
            if record.get(name) is not None:
                raise BadDocument(f"late teacher context: the first records have no {name}; let the first have one")
        found = {role: record.get(name) for role, name in {**self.optional, **self.columns}.items()}
        return _READERS[self.name](found)


def _read_text(found: Mapping[str, Any]) -> str | PromptedText | None:
    text, told = found["text"], _teacher_prompt(found)
    if text is None:
        return None
    if not isinstance(text, str):
        raise BadDocument(f"wrong type: the text is {kind_of(text)}")
    return require_encodable(text) if told is None else PromptedText(text=require_encodable(text), teacher_prompt=told)


def _teacher_prompt(found: Mapping[str, Any]) -> str | None:
    """What a record of texts says that the teacher reads."""
    told = found.get("teacher_prompt")
    if told is None:
        return None
    if not isinstance(told, str):
        raise BadDocument(f"wrong type: the teacher_prompt is {kind_of(told)}")
    return require_encodable(told)


def _read_completion(found: Mapping[str, Any]) -> Document | None:
    prompt, completion = found["prompt"], found["completion"]
    if isinstance(prompt, list | dict) or isinstance(completion, list | dict):
        return read_completed_messages(found)
    if prompt is None and completion is None:
        return None
    if completion is None:
        raise BadDocument("no answer: the completion is null")
    prompt = "" if prompt is None else prompt
    for what, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            raise BadDocument(f"wrong type: the {what} is {kind_of(value)}")
        require_encodable(value)
    if not completion:
        raise BadDocument("no answer: the completion is empty")
    for beside in ("system", "tools", "documents"):
        if found.get(beside):
            raise BadDocument(f"no place for {beside}: the prompt is a text, which no chat template sees")
    if found.get("teacher_messages") is not None:
        raise BadDocument("no place for teacher_messages: the prompt is a text, so give a teacher_prompt")
    return Completion(prompt=prompt, completion=completion, teacher_prompt=_teacher_prompt(found))


_READERS: dict[str, Callable[[Mapping[str, Any]], Document | None]] = {
    "text": _read_text,
    "chat": read_chat,
    "completion": _read_completion,
    "tokenised": read_tokens,
}
