"""Documents: what a record of a corpus says, whatever shape people gave it.

Four forms, chosen once for a corpus by its columns:

    text        a text
    chat        messages of roles: OpenAI's `messages`, ShareGPT's `conversations`, Alpaca's instruction and output, a
                prompt and a completion that are messages; as lists, or as JSON in a string
    completion  a prompt and a completion that are texts; only the completion is taught
    tokenised   token ids, with columns that say which of them count

A record becomes a `Text`, a `Conversation`, a `Completion` or `TokenIds`, or raises `BadDocument` with a reason. Nothing
that a record says is left out silently: what cannot be taken is named.
Cost: a few dictionary operations a message.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.corpus.records import Record, Unreadable
from kdcache.rows import IGNORE


class BadDocument(Exception):  # noqa: N818 - it is counted, and no error of the program
    """A record that cannot be used.

    Args:
        reason: a short one that many records may share, and after ": " more of it.
        weight: how much it says, where several attempts fail and one reason is told.
    """

    def __init__(self, reason: str, weight: int = 1) -> None:
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
    """

    messages: list[Message]
    taught: list[bool]
    tools: list[Any] | None = None
    documents: list[Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """What all messages say, for filters."""
        return "\n".join(text_of(message.get("content")) for message in self.messages)


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A prompt, and the text that follows it, which is what is taught."""

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """Both, for filters."""
        return self.prompt + self.completion


@dataclass(frozen=True, kw_only=True)
class TokenIds:
    """A document that is tokenised.

    Attributes:
        ids: `[n]` int64, padding cut off.
        supervised: `[n]` bool, whether each may be a label; None when all may.
    """

    ids: NDArray[np.int64]
    supervised: NDArray[np.bool_] | None = None


Document = str | Conversation | Completion | TokenIds

PICTURES = ("image", "images", "audio", "audios", "video", "videos")
"""Columns that hold what cannot be read as text."""

MASKS = ("attention_mask", "completion_mask", "assistant_masks", "assistant_mask", "loss_mask")
"""Columns of 0 and 1 that say which tokens count; the first says which are there at all."""

PACKED = ("position_ids", "seq_lengths", "segment_ids", "cu_seqlens", "document_ids")
"""Columns that say that several documents were put into one record."""

_SPEAKERS = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "bing": "assistant", "bard": "assistant", "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool", "function": "tool",
}  # fmt: skip
"""Roles of ShareGPT's `from`."""

_CALLS = ("function_call", "tool_call")
"""Values of `from` whose text is a call of a tool, as JSON."""

_WEIGHTS = ("weight", "train", "training", "trainable", "loss")
"""Keys of a message that say whether it is taught: OpenAI's, axolotl's, ms-swift's."""

_REFUSED_KEYS = ("train_detail", "training_detail", "loss_scale")
"""Keys that say which part of a message is taught, or how much."""


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the documents of a corpus are made of.

    Attributes:
        name: `text`, `chat`, `completion` or `tokenised`.
        columns: by role (`text`, `messages`, `prompt`, ...), the column that plays it.
        optional: further columns of the same kind that a record may have.
    """

    name: str
    columns: dict[str, str]
    optional: dict[str, str] = field(default_factory=dict)

    def document(self, record: Record) -> Document | None:
        """What a record says; None where it says nothing, as its column is null.

        Raises:
            BadDocument: it cannot be used.
        """
        if isinstance(record, Unreadable):
            raise BadDocument(record.reason)
        if isinstance(record, str):
            return _encodable(record)
        found = {role: record.get(name) for role, name in {**self.optional, **self.columns}.items()}
        return _READERS[self.name](found)


def text_of(content: Any) -> str:
    """The text of a message's content; its parts one behind the other, with nothing between."""
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content or ())


def _read_text(found: Mapping[str, Any]) -> str | None:
    text = found["text"]
    if text is None:
        return None
    if not isinstance(text, str):
        raise BadDocument(f"wrong type: the text is {_kind(text)}")
    return _encodable(text)


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadDocument("lone surrogate: the text holds half of a surrogate pair") from None
    return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def _read_chat(found: Mapping[str, Any]) -> Conversation | None:
    if "instruction" in found:
        return _read_alpaca(found)
    if "completion" in found:
        return _read_messages_to_complete(found)
    value = found["messages"]
    if value is None:
        return None
    messages = _from_json(value, "messages")
    if isinstance(messages, dict) and isinstance(messages.get("messages"), list):
        messages = messages["messages"]
    return _conversation(messages, found)


def _conversation(messages: Any, found: Mapping[str, Any], only_after: int = 0) -> Conversation:
    """Args:
    only_after: answers before this message are not taught.
    """
    if not isinstance(messages, list) or not messages:
        raise BadDocument(f"not a conversation: it is {'an empty list' if messages == [] else _kind(messages)}")
    taken = [_message(message, number) for number, message in enumerate(messages)]
    if isinstance(system := found.get("system"), str) and system and taken[0][0]["role"] != "system":
        taken.insert(0, ({"role": "system", "content": system}, False))
        only_after += 1
    settings = _from_json(found.get("settings") or {}, "chat_template_kwargs")
    if not isinstance(settings, dict):
        raise BadDocument(f"wrong type: chat_template_kwargs is {_kind(settings)}")
    return Conversation(
        messages=[message for message, _ in taken],
        taught=[taught and number >= only_after for number, (_, taught) in enumerate(taken)],
        tools=_listed(found.get("tools"), "tools"),
        documents=_listed(found.get("documents"), "documents"),
        settings=settings,
    )


def _listed(value: Any, what: str) -> list[Any] | None:
    """A list of objects for the template, out of one or of JSON; None where it is null or empty."""
    value = _from_json(value, what) if value else None
    if not value:
        return None
    if not isinstance(value, list):
        raise BadDocument(f"wrong type: {what} is {_kind(value)}, not a list")
    items = [_from_json(item, what) for item in value]
    if not all(isinstance(item, dict) for item in items):
        raise BadDocument(f"wrong type: {what} is not a list of objects")
    return items


def _from_json(value: Any, what: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise BadDocument(f"not JSON: {what} is text that is not JSON") from None


def _message(message: Any, number: int) -> tuple[Message, bool]:
    """A message for the template, and whether it is taught."""
    if not isinstance(message, dict):
        raise BadDocument(f"not a message: message {number} is {_kind(message)}")
    found = {key: value for key, value in message.items() if value is not None}  # absent and null are one
    if "role" not in found and "from" in found:
        found = _from_sharegpt(found, number)
    role = found.get("role")
    if not isinstance(role, str) or not role:
        raise BadDocument(f"not a message: message {number} has no role")
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
    speaker, value = message.pop("from"), message.pop("value", None)
    if value is None:
        raise BadDocument(f"no content: message {number}, from {speaker}")
    if speaker in _CALLS:
        call = _from_json(value, f"the call in message {number}")
        calls = call if isinstance(call, list) else [call]
        if not all(isinstance(one, dict) and isinstance(one.get("name"), str) for one in calls):
            raise BadDocument(f"not a message: message {number} is a call without a name")
        return {**message, "role": "assistant", "tool_calls": [{"type": "function", "function": one} for one in calls]}
    if speaker not in _SPEAKERS:
        raise BadDocument(f"unknown speaker: message {number} is from {str(speaker)[:40]!r}")
    return {**message, "role": _SPEAKERS[speaker], "content": value}


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
        raise BadDocument(f"wrong type: the content of message {number} is {_kind(content)}")
    parts = []
    for part in content:
        if isinstance(part, str):
            parts.append({"type": "text", "text": part})
            continue
        if not isinstance(part, dict):
            raise BadDocument(f"wrong type: a part of message {number} is {_kind(part)}")
        kind, text = part.get("type", "text"), part.get("text")
        if not isinstance(text, str) or kind not in ("text", "input_text", "output_text"):
            raise BadDocument(f"not text: message {number}, of role {role}, has a part of type {str(kind)[:40]}")
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
            raise BadDocument(f"wrong type: the {what} is {_kind(value)}")
    question = f"{instruction}\n{more}" if more else instruction
    messages: list[Message] = []
    for turn in _from_json(found.get("history") or [], "history"):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise BadDocument("wrong type: history is not a list of questions and answers")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    messages += [{"role": "user", "content": question}, {"role": "assistant", "content": output}]
    return _conversation(messages, found)


def _read_messages_to_complete(found: Mapping[str, Any]) -> Conversation | None:
    prompt, completion = found["prompt"], found["completion"]
    if prompt is None and completion is None:
        return None
    if completion is None:
        raise BadDocument("no answer: the completion is null")
    prompt, completion = ([] if value is None else _messages(value, what) for what, value in (
        ("prompt", prompt), ("completion", completion),
    ))  # fmt: skip
    return _conversation(prompt + completion, found, only_after=len(prompt))


def _messages(value: Any, what: str) -> list[Any]:
    value = _from_json(value, what)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise BadDocument(f"wrong type: the {what} is {_kind(value)}, not a list of messages")
    return value


def _read_completion(found: Mapping[str, Any]) -> Document | None:
    prompt, completion = found["prompt"], found["completion"]
    if isinstance(prompt, list | dict) or isinstance(completion, list | dict):
        return _read_messages_to_complete(found)
    if prompt is None and completion is None:
        return None
    if completion is None:
        raise BadDocument("no answer: the completion is null")
    prompt = "" if prompt is None else prompt
    for what, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, str):
            raise BadDocument(f"wrong type: the {what} is {_kind(value)}")
        _encodable(value)
    if not completion:
        raise BadDocument("no answer: the completion is empty")
    return Completion(prompt=prompt, completion=completion)


def _read_tokens(found: Mapping[str, Any]) -> TokenIds | None:
    if found["input_ids"] is None:
        return None
    ids = _integers(found["input_ids"], "input_ids")
    supervised: NDArray[np.bool_] | None = None
    for name in MASKS[1:]:
        if found.get(name) is not None:
            mask = _mask(found[name], name, len(ids))
            supervised = mask if supervised is None else supervised & mask
    if found.get("labels") is not None:
        marked = _labelled(_integers(found["labels"], "labels"), ids)
        supervised = marked if supervised is None else supervised & marked
    if found.get(MASKS[0]) is not None:
        there = np.flatnonzero(_mask(found[MASKS[0]], MASKS[0], len(ids)))
        first, last = (int(there[0]), int(there[-1]) + 1) if len(there) else (0, 0)
        if last - first != len(there):
            raise BadDocument(f"{MASKS[0]} with a gap: it is 0 between tokens that are there")
        ids = ids[first:last]
        supervised = None if supervised is None else supervised[first:last]
    return TokenIds(ids=ids, supervised=supervised)


def _integers(value: Any, what: str) -> NDArray[np.int64]:
    try:
        found = np.asarray(value)
    except ValueError:
        raise BadDocument(f"wrong type: {what} is a list of lists") from None
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iub"):
        null = isinstance(value, list) and any(one is None for one in value)
        raise BadDocument(f"wrong type: {what} holds {'a null' if null else 'something else than integers'}")
    return found.astype(np.int64)


def _mask(value: Any, what: str, length: int) -> NDArray[np.bool_]:
    mask = _integers(value, what)
    if len(mask) != length:
        raise BadDocument(f"unequal lengths: {length} input_ids, {len(mask)} in {what}")
    if ((mask != 0) & (mask != 1)).any():
        raise BadDocument(f"wrong type: {what} holds something else than 0 and 1")
    return mask.astype(bool)


def _labelled(labels: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which tokens are labels. Labels are aligned with the tokens, not shifted, and -100 where masked."""
    if labels.shape != ids.shape:
        raise BadDocument(f"unequal lengths: {len(ids)} input_ids, {len(labels)} in labels")
    supervised = labels != IGNORE
    if (labels[supervised] != ids[supervised]).any():
        shifted = labels.size > 1 and ((labels[:-1] == ids[1:]) | ~supervised[:-1]).all()
        raise BadDocument(
            "labels that are not the tokens: they must equal input_ids where they are not -100"
            + ("; these look shifted by one already, give them unshifted" if shifted else "")
        )
    return supervised


_READERS: dict[str, Callable[[Mapping[str, Any]], Document | None]] = {
    "text": _read_text,
    "chat": _read_chat,
    "completion": _read_completion,
    "tokenised": _read_tokens,
}
