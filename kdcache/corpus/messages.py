"""Messages: conversations out of the shapes in which people keep them.

OpenAI's `messages` (role, content, tool calls), ShareGPT's `conversations` (from, value), Alpaca's instruction and
output, a prompt and a completion that are messages, and any of them as JSON in a string.
Cost: a few dictionary operations a message.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from kdcache.corpus.documents import BadDocument, Conversation, Message, kind_of, require_encodable, text_of
from kdcache.corpus.records import is_nested_too_deeply
from kdcache.corpus.teacher_context import told_teacher

_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "bing": "assistant", "bard": "assistant", "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool", "function": "tool",
}  # fmt: skip
"""Roles of ShareGPT's `from`; people write those of users and assistants into a `role`, too."""

_CALLS = ("function_call", "tool_call")
"""Values of `from` whose text is a call of a tool, as JSON."""

_WEIGHTS = ("weight", "train", "training", "trainable", "loss")
"""Keys of a message that say whether it is taught: OpenAI's, axolotl's, ms-swift's."""

_REFUSED_KEYS = ("train_detail", "training_detail", "loss_scale")
"""Keys that say which part of a message is taught, or how much."""


def read_chat(found: Mapping[str, Any]) -> Conversation | None:
    """A conversation, from the columns of a record; None where it says nothing."""
    if "instruction" in found:
        return _read_alpaca(found)
    if "completion" in found:
        return read_completed_messages(found)
    value = found["messages"]
    if value is None:
        return None
    messages = _from_json(value, "messages")
    if isinstance(messages, dict):
        messages = messages["messages"] if isinstance(messages.get("messages"), list) else _by_rows(messages)
    return _conversation(messages, found)


def _by_rows(columns: dict[str, Any]) -> Any:
    """Messages out of a list for each field, as `datasets` gives a sequence of objects; others as they are."""
    lists = list(columns.values())
    if not lists or not all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
        return columns
    return [dict(zip(columns, row, strict=True)) for row in zip(*lists, strict=True)]


def _conversation(messages: Any, found: Mapping[str, Any], only_after: int = 0) -> Conversation:
    """Args:
    only_after: answers before this message are not taught.
    """
    if not isinstance(messages, list) or not messages:
        raise BadDocument(f"not a conversation: it is {'an empty list' if messages == [] else kind_of(messages)}")
    taken = [_message(message, number) for number, message in enumerate(messages)]
    if system := found.get("system"):
        first = taken[0][0]
        if not isinstance(system, str):
            raise BadDocument(f"wrong type: system is {kind_of(system)}")
        if first["role"] != "system":
            taken.insert(0, ({"role": "system", "content": system}, False))
            only_after += 1
        elif text_of(first.get("content")) != system:
            raise BadDocument("two system prompts: the column system and the first message differ")
    settings = _from_json(found.get("settings") or {}, "chat_template_kwargs")
    if not isinstance(settings, dict):
        raise BadDocument(f"wrong type: chat_template_kwargs is {kind_of(settings)}")
    student = Conversation(
        messages=[message for message, _ in taken],
        taught=[taught and number >= only_after for number, (_, taught) in enumerate(taken)],
        tools=_listed(found.get("tools"), "tools") or _functions(found),
        documents=_listed(found.get("documents"), "documents"),
        settings=settings,
    )
    told = found.get("teacher_messages")
    return student if told is None else dataclasses.replace(student, teacher=_teacher(told, student))


def _teacher(told: Any, student: Conversation) -> Conversation:
    """What the teacher reads, out of a record's teacher_messages."""
    try:
        messages = [_message(message, number)[0] for number, message in enumerate(_messages(told, "value"))]
    except BadDocument as error:
        raise BadDocument(f"teacher_messages: {error}") from None
    if not messages:
        raise BadDocument("teacher_messages: it is an empty list")
    return told_teacher(messages, student)


def _functions(found: Mapping[str, Any]) -> list[Any] | None:
    """OpenAI's `functions`, in the form of tools."""
    functions = _listed(found.get("functions"), "functions")
    return functions and [{"type": "function", "function": function} for function in functions]


def _listed(value: Any, what: str) -> list[Any] | None:
    """A list of objects for the template, out of one or of JSON; None where it is null or empty."""
    value = _from_json(value, what) if value else None
    if not value:
        return None
    if not isinstance(value, list):
        raise BadDocument(f"wrong type: {what} is {kind_of(value)}, not a list")
    items = [_from_json(item, what) for item in value]
    if not all(isinstance(item, dict) for item in items):
        raise BadDocument(f"wrong type: {what} is not a list of objects")
    return items


def _from_json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except ValueError:
        raise BadDocument(f"not JSON: {what} is text that is not JSON") from None
    except RecursionError:
        raise BadDocument(f"nested too deeply: {what}") from None
    if is_nested_too_deeply(found):
        raise BadDocument(f"nested too deeply: {what}")
    if "\\ud" in value.lower():  # an escape that may be half of a pair
        require_encodable(json.dumps(found, ensure_ascii=False))
    return found


def _message(message: Any, number: int) -> tuple[Message, bool]:
    """A message for the template, and whether it is taught."""
    if not isinstance(message, dict):
        raise BadDocument(f"not a message: message {number} is {kind_of(message)}")
    found = {key: value for key, value in message.items() if value is not None}  # absent and null are one
    if "role" not in found and "from" in found:
        found = _from_sharegpt(found, number)
    role = found.get("role")
    if not isinstance(role, str) or not role:
        raise BadDocument(f"not a message: message {number} has no role")
    if _SPEAKERS.get(role.lower()) in ("user", "assistant", "system"):
        role = found["role"] = _SPEAKERS[role.lower()]
    for key in _REFUSED_KEYS:
        if key in found:
            raise BadDocument(f"part of a message is taught: message {number} has {key}, which cannot be honoured")
    taught = _taught(found, number, role)
    if isinstance(call := found.get("function_call"), dict):  # OpenAI's older name
        found.setdefault("tool_calls", [{"type": "function", "function": call}])
        del found["function_call"]
    calls = _from_json(found.get("tool_calls"), "tool_calls")
    if calls is not None:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise BadDocument(f"wrong type: tool_calls of message {number} is not a list of objects")
        found["tool_calls"] = calls
        if not calls:
            del found["tool_calls"]
    if "content" in found:
        found["content"] = _content(found["content"], number, role)
    elif not any(key in found for key in ("tool_calls", "reasoning_content", "thinking", "reasoning")):
        raise BadDocument(f"no content: message {number}, of role {role}")
    return found, taught


def _from_sharegpt(message: Message, number: int) -> Message:
    speaker, value = str(message.pop("from")), message.pop("value", None)
    if value is None:
        raise BadDocument(f"no content: message {number}, from {speaker}")
    if speaker in _CALLS:
        call = _from_json(value, f"the call in message {number}")
        calls = call if isinstance(call, list) else [call]
        if not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in calls):
            raise BadDocument(f"not a message: message {number} is a call without a name")
        return {**message, "role": "assistant", "tool_calls": [{"type": "function", "function": one} for one in calls]}
    if speaker.lower() not in _SPEAKERS:
        raise BadDocument(f"unknown speaker: message {number} is from {speaker[:40]!r}")
    return {**message, "role": _SPEAKERS[speaker.lower()], "content": value}


def _taught(message: Message, number: int, role: str) -> bool:
    """Whether a message is taught; what says so is taken out of it."""
    taught = role == "assistant"
    for key in _WEIGHTS:
        if key not in message:
            continue
        value = message.pop(key)
        if value not in (0, 1):  # True and False are 1 and 0
            raise BadDocument(f"weight of a message: {key} of message {number} is {str(value)[:20]}, not 0 or 1")
        if value and role != "assistant":
            raise BadDocument(f"weight of a message: {key} of message {number} asks to teach what a {role} says")
        taught = taught and bool(value)
    return taught


def _content(content: Any, number: int, role: str) -> str | list[Any]:
    """A text, or text parts in one form."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        raise BadDocument(f"wrong type: the content of message {number} is {kind_of(content)}")
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        if not isinstance(part, dict):
            raise BadDocument(f"wrong type: a part of message {number} is {kind_of(part)}")
        kind, text = part.get("type"), part.get("text")
        if not isinstance(text, str) or kind not in (None, "text", "input_text", "output_text"):
            named = "without text" if kind in (None, "text") else f"of type {str(kind)[:40]}"
            raise BadDocument(f"not text: message {number}, of role {role}, has a part {named}")
        parts.append({"type": "text", "text": text})
    return parts


def _read_alpaca(found: Mapping[str, Any]) -> Conversation | None:
    instruction, more, output = found["instruction"], found.get("input"), found["output"]
    if instruction is None and output is None:
        return None
    if output is None:
        raise BadDocument("no answer: the output is null")
    for what, value in (("instruction", instruction), ("input", more), ("output", output)):
        if not isinstance(value, str) and not (what == "input" and value is None):
            raise BadDocument(f"wrong type: the {what} is {kind_of(value)}")
    question = f"{instruction}\n{more}" if more else instruction
    messages: list[Message] = []
    for turn in _from_json(found.get("history") or [], "history"):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise BadDocument("wrong type: history is not a list of questions and answers")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return _conversation(messages, found)


def read_completed_messages(found: Mapping[str, Any]) -> Conversation | None:
    """A prompt and a completion that are messages; only answers of the completion are taught."""
    prompt, completion = found["prompt"], found["completion"]
    if prompt is None and completion is None:
        return None
    if completion is None:
        raise BadDocument("no answer: the completion is null")
    prompt, completion = ([] if value is None else _messages(value, what) for what, value in (
        ("prompt", prompt), ("completion", completion),
    ))  # fmt: skip
    told = found.get("teacher_prompt")
    if told is not None:
        if found.get("teacher_messages") is not None:
            raise BadDocument("two teacher contexts: teacher_prompt and teacher_messages")
        found = {**found, "teacher_messages": [*_messages(told, "teacher_prompt"), *completion]}
    return _conversation(prompt + completion, found, only_after=len(prompt))


def _messages(value: Any, what: str) -> list[Any]:
    value = _from_json(value, what)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadDocument(f"wrong type: the {what} is {kind_of(value)}, not a list of messages")
    return value
