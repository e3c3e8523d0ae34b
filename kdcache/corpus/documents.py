"""Documents: what a record of a corpus says: a text, a conversation, a prompt with its completion, or token ids.

Each may say, too, what a teacher reads that is told more than its student.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


class BadDocument(Exception):  # noqa: N818 - it is counted, and no error of the program
    """A record that cannot be used.

    Args:
        reason: a short one that many records may share, and after ": " more of it.
        weight: how much it says, where several attempts fail and one reason is told.
    """

    def __init__(self, reason: str, weight: int = 2) -> None:
        super().__init__(reason)
        self.weight = weight


Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Messages, as a chat template is given them.

    Attributes:
        messages: each with a `role`; a `content` that is a text, a list of text parts, or absent.
        taught: for each message, whether it is an answer that a student is taught.
        tools, documents: for the template; None where there are none.
        settings: further variables of the template, such as `enable_thinking`.
        teacher: what the teacher reads in its place; None where that is the same.
    """

    messages: list[Message]
    taught: list[bool]
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    teacher: Conversation | None = None

    @property
    def text(self) -> str:
        """What all messages say, for filters."""
        return "\n".join(text_of(message.get("content")) for message in self.messages)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A prompt, and the text that follows it, which is what is taught.

    Attributes:
        teacher_prompt: what the teacher reads in place of the prompt; None where that is the same.
    """

    prompt: str
    completion: str
    teacher_prompt: str | None = None

    @property
    def text(self) -> str:
        """Both, for filters."""
        return self.prompt + self.completion


@dataclass(frozen=True, kw_only=True)
class PromptedText:
    """A text, and what the teacher reads before it."""

    text: str
    teacher_prompt: str


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """A document that is tokenised.

    Attributes:
        ids: `[n]` int64, padding cut off.
        supervised: `[n]` bool, whether each may be a label; None when all may.
        writer_logp: `[n]` float32, the log-probability that each had when it was drawn, in nats, NaN where that is not
            known; None where the corpus does not say.
    """

    ids: NDArray[np.int64]
    supervised: NDArray[np.bool_] | None = None
    writer_logp: NDArray[np.float32] | None = None


Document = str | PromptedText | Conversation | Completion | TokenIds


def text_of(content: Any) -> str:
    """The text of a message's content; its parts one behind the other, with nothing between."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or ())


def require_encodable(text: str) -> str:
    """A text, if UTF-8 can write it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadDocument("lone surrogate: the text holds half of a surrogate pair") from None
    return text


def kind_of(value: Any) -> str:
    """What a value is, for people."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)
