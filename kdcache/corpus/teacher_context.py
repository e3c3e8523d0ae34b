"""Teacher context: what a teacher reads where it is told more than its student.

Both must end alike: from the first token that is taught on they read the same tokens, or the document is left out. What
stands before that may differ in any way. The longest common end of the two is what the teacher reads of the student's
tokens; everything of the teacher's before it is a prefix (`kdcache.prefixes`).
Cost: one comparison of the tokens of each document.

Shapes: n tokens of the student, t of the teacher.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.corpus.documents import BadDocument, Conversation, Message, text_of
from kdcache.prefixes import Prefix
from kdcache.rows import Ints

COLUMNS = ("teacher_messages", "teacher_prompt")
"""Columns that say what the teacher reads, for messages and for texts."""


def prefix_of(student: Ints, supervised: NDArray[np.bool_] | None, teacher: Ints) -> Prefix:
    """What a teacher reads before the tokens that it has in common with its student.

    Args:
        student: `[n]` what the student reads.
        supervised: `[n]` which of its tokens are taught; None for all but the first.
        teacher: `[t]` what the teacher reads.

    Raises:
        BadDocument: a token that is taught does not stand in the common end, or has nothing before it there.
    """
    most = min(len(student), len(teacher))
    unequal = np.flatnonzero(student[len(student) - most :] != teacher[len(teacher) - most :])
    common = most - 1 - int(unequal[-1]) if len(unequal) else most
    replaced, before = len(student) - common, len(teacher) - common
    taught = np.arange(1, len(student)) if supervised is None else np.flatnonzero(supervised[1:]) + 1
    if len(taught) and taught[0] < replaced:
        raise BadDocument(
            f"teacher reads other answers: what it reads ends like what is taught from token {replaced} on only, but "
            f"token {taught[0]} is taught, too"
        )
    if len(taught) and taught[0] == replaced and not before:
        raise BadDocument("teacher reads nothing: no token stands before the first that is taught")
    return Prefix(tokens=teacher[:before].astype(np.int32), replaced=replaced)


def told_teacher(messages: list[Message], student: Conversation) -> Conversation:
    """The conversation that a teacher reads.

    Args:
        messages: what a record says of it. If they do not end with an answer, the student's messages from the first
            that is taught follow.
        student: what its student reads.

    Raises:
        BadDocument: they do not end with the answers that are taught.
    """
    first = student.taught.index(True) if any(student.taught) else len(student.messages)
    if messages[-1]["role"] != "assistant":
        messages = [*messages, *student.messages[first:]]
    earlier = len(messages) - len(student.messages)
    taught = [number >= earlier and student.taught[number - earlier] for number in range(len(messages))]
    if sum(taught) < sum(student.taught) or any(
        mark and message["role"] != "assistant" for mark, message in zip(taught, messages, strict=True)
    ):
        raise BadDocument("teacher_messages: they end otherwise than with the answers that are taught")
    return Conversation(
        messages=messages, taught=taught, tools=student.tools, documents=student.documents, settings=student.settings
    )


def with_system(conversation: Conversation, system: str) -> Conversation:
    """A conversation with a system prompt, which stands before the one that it has."""
    messages, taught = list(conversation.messages), list(conversation.taught)
    if messages and messages[0]["role"] == "system":
        messages[0] = {**messages[0], "content": f"{system}\n\n{text_of(messages[0].get('content'))}"}
    else:
        message: dict[str, Any] = {"role": "system", "content": system}
        messages, taught = [message, *messages], [False, *taught]
    return Conversation(
        messages=messages, taught=taught, tools=conversation.tools, documents=conversation.documents,
        settings=conversation.settings,
    )  # fmt: skip
