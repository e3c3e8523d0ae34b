"""Made-up corpora for hypothesis: documents in every shape in which people keep them, and what each of them says.

A document is drawn as what it says first (`Talk`, `Pair`, a text, `Ids`) or as what is wrong with it (`Bad`), and then
written down in one of its shapes. So whoever checks what became of it need not read the shape.
"""

from __future__ import annotations

import gzip
import io
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
from hypothesis import strategies as st


@dataclass(frozen=True)
class Said:
    """One message.

    Attributes:
        taught: what a weight says of it; None where none does.
        calls: name and arguments of each call of a tool.
    """

    role: str
    words: str
    thought: str = ""
    calls: tuple[tuple[str, str], ...] = ()
    taught: bool | None = None


@dataclass(frozen=True)
class Talk:
    """A conversation; answers before message `first` are not taught."""

    said: tuple[Said, ...]
    tools: str = ""
    first: int = 0


@dataclass(frozen=True)
class Pair:
    """A prompt and its completion."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Ids:
    """Token ids without padding, and which of them count; None where all do."""

    ids: tuple[int, ...]
    counts: tuple[bool, ...] | None


@dataclass(frozen=True)
class Bad:
    """A document that cannot be used; the reason that a person should read."""

    reason: str


Says = Talk | Pair | Ids | Bad | str | None
"""What a document says; None where it says nothing."""


@dataclass(frozen=True)
class Document:
    """A document as it is written.

    Attributes:
        record: an object; or the bytes of a line that is none.
        plain: whether it has the types that all others of its form have, so that a table can hold it.
        begins: whether a corpus may begin with it, and be known by it.
    """

    says: Says
    record: dict[str, Any] | bytes
    plain: bool = True
    begins: bool = False


@dataclass(frozen=True)
class Made:
    """A corpus: documents in a file."""

    form: str
    name: str
    data: bytes = field(repr=False)
    documents: tuple[Document, ...]

    def write(self, folder: Path) -> Path:
        """Write the file."""
        path = folder / self.name
        path.write_bytes(self.data)
        return path


LETTERS = st.sampled_from([
    "Tom", "He is Tom.", "  two  spaces ", "\n\nlines\n", "\tx", "naïve café", "東京は首都です。", "🦆🙂👩‍👩‍👧",
    "e\u0301 \u00a0", "def f(x):\n    return x + 1\n", "a", "1", "12", "<", "<b>&amp;\"'\\n{{ x }}", "assistant",
    "[user]", "\r\nx\ry", "</s>", "<|im_end|>", "It is a long day, and nobody can say why it is so long. ",
])  # fmt: skip
WORDS = st.lists(LETTERS, max_size=4).map("".join)
SURE = st.lists(LETTERS, min_size=1, max_size=3).map("".join).filter(str.strip)
"""Words that are not empty."""

ODD: list[Any] = [5, 1.5, True, {"a": 1}, ["x", 3]]


def _weight(draw: Any, taught: bool | None) -> dict[str, Any]:
    if taught is None:
        return {}
    return draw(st.sampled_from([{"weight": int(taught)}, {"train": taught}, {"weight": float(taught)}]))


@st.composite
def talks(draw: Any, tools: bool = True) -> Talk:
    said = [Said("system", draw(SURE))] if draw(st.integers(0, 3)) == 0 else []
    if draw(st.integers(0, 5)) == 0:
        said.append(Said("assistant", draw(SURE)))
    weighs = draw(st.integers(0, 3)) == 0
    for _ in range(draw(st.integers(1, 3))):
        said.append(Said("user", draw(WORDS)))
        taught = draw(st.booleans()) if weighs else None
        if tools and draw(st.integers(0, 5)) == 0:
            call = ("find", json.dumps({"town": draw(SURE)}, ensure_ascii=False))
            said.append(Said("assistant", "", calls=(call,), taught=taught))
            said.append(Said("tool", draw(SURE)))
        thought = draw(SURE).strip() if tools and draw(st.integers(0, 7)) == 0 else ""
        said.append(Said("assistant", draw(WORDS), thought=thought, taught=taught))
    if draw(st.integers(0, 7)) == 0:
        said.append(Said("user", draw(SURE)))
    about = json.dumps([{"name": "find"}]) if tools and draw(st.integers(0, 5)) == 0 else ""
    return Talk(tuple(said), tools=about)


def _message(draw: Any, said: Said, *, plain: bool) -> dict[str, Any]:
    message: dict[str, Any] = {"role": said.role, "content": said.words, **_weight(draw, said.taught)}
    if said.calls:
        as_text = plain or draw(st.booleans())
        message["content"] = draw(st.sampled_from([None, ""]))
        message["tool_calls"] = [
            {"type": "function", "function": {"name": name, "arguments": given if as_text else json.loads(given)}}
            for name, given in said.calls
        ]
        if message["content"] is None and draw(st.booleans()):
            del message["content"]
    elif not plain and draw(st.integers(0, 2)) == 0:
        cut = draw(st.integers(0, len(said.words)))
        parts = [said.words[:cut], said.words[cut:]]
        message["content"] = [part if draw(st.booleans()) else {"type": "text", "text": part} for part in parts]
    if said.thought:
        message[draw(st.sampled_from(["reasoning_content", "thinking"]))] = said.thought
    if draw(st.booleans()):
        message["name"] = None
    return message


def _spoil(draw: Any, messages: list[Any]) -> Bad:
    """Spoil one message."""
    at = draw(st.integers(0, len(messages) - 1))
    message = dict(messages[at])
    how = draw(st.integers(0, 7))
    if how == 0:
        message["content"], reason = draw(st.sampled_from([5, True])), "wrong type"
    elif how == 1:
        message, reason = draw(st.sampled_from([5, "he said so", ["x"]])), "not a message"
    elif how == 2:
        reason = "not a message"
        del message["role"]
    elif how == 3:
        message["content"], reason = [{"type": "image_url", "image_url": {"url": "x"}}], "not text"
    elif how == 4:
        message["train_detail"], reason = [{"begin": 0}], "part of a message is taught"
    elif how == 5:
        message["weight"], reason = 0.5, "weight of a message"
        message.pop("train", None)
    elif how == 6:
        message = {"role": "user", "content": None}
        reason = "no content"
    else:
        message = {"role": "user", "content": "hi", "loss": True}
        reason = "weight of a message"
    messages[at] = message
    return Bad(reason)


@st.composite
def messages(draw: Any) -> Document:
    """OpenAI's messages, as a list or as JSON in a text."""
    kind = draw(st.integers(0, 11))
    if kind == 0:
        value, says = draw(st.sampled_from([
            ([], Bad("not a conversation")), (5, Bad("not a conversation")), ("{not JSON", Bad("not JSON")),
            (None, None), ("3", Bad("not a conversation")),
        ]))  # fmt: skip
        return Document(says, {"messages": value}, plain=False)
    talk = draw(talks())
    as_text = draw(st.integers(0, 5)) == 0
    plain = not as_text and draw(st.booleans())
    told: Any = [_message(draw, said, plain=plain) for said in talk.said]
    says: Says = talk
    if kind == 1:
        says, plain = _spoil(draw, told), False
    if kind == 2:
        told[0] = {"role": "user", "content": "half a pair: \ud83d", "note": 1}
        says, plain = Bad("lone surrogate"), False
    record: dict[str, Any] = {"messages": json.dumps(told) if as_text else told, "n": draw(st.integers(0, 9))}
    if talk.tools:
        record["tools"] = talk.tools if plain or draw(st.booleans()) else json.loads(talk.tools)
    return Document(says, record, plain=plain, begins=True)


@st.composite
def conversations(draw: Any) -> Document:
    """ShareGPT."""
    talk = draw(talks(tools=False))
    said = talk.said
    record: dict[str, Any] = {"id": "x"}
    if said[0].role == "system" and draw(st.booleans()):
        record["system"], said = said[0].words, said[1:]
    names = {"user": ["human", "user"], "assistant": ["gpt", "assistant", "chatgpt"], "system": ["system"]}
    record["conversations"] = [
        {"from": draw(st.sampled_from(names[one.role])), "value": one.words, **_weight(draw, one.taught)}
        for one in said
    ]
    says: Says = talk
    if draw(st.integers(0, 9)) == 0:
        record["conversations"][-1]["from"], says = "narrator", Bad("unknown speaker")
    elif draw(st.integers(0, 9)) == 0:
        record["conversations"][0]["value"], says = None, Bad("no content")
    return Document(says, record, begins=True)


@st.composite
def instructions(draw: Any) -> Document:
    """Alpaca."""
    question, more, answer = draw(WORDS), draw(WORDS), draw(WORDS)
    said = [Said("user", f"{question}\n{more}" if more else question), Said("assistant", answer)]
    record: dict[str, Any] = {"instruction": question, "input": more, "output": answer}
    if not more and draw(st.booleans()):
        record["input"] = None
    if draw(st.integers(0, 3)) == 0:
        record["system"] = draw(SURE)
        said.insert(0, Said("system", record["system"]))
    says, plain = Talk(tuple(said)), True
    if draw(st.integers(0, 9)) == 0:
        record["output"], says = None, Bad("no answer")
    elif draw(st.integers(0, 9)) == 0:
        record["instruction"], says, plain = draw(st.sampled_from(ODD)), Bad("wrong type"), False
    return Document(says, record, plain=plain, begins=True)


@st.composite
def completions(draw: Any) -> Document:
    """A prompt and a completion, as texts or as messages."""
    kind = draw(st.integers(0, 9))
    if kind < 6:
        prompt, completion = draw(WORDS), draw(SURE)
        return Document(Pair(prompt, completion), {"prompt": prompt, "completion": completion}, begins=True)
    if kind == 6:
        record, says = draw(st.sampled_from([
            ({"prompt": None, "completion": "Tom"}, Pair("", "Tom")),
            ({"prompt": "Tom", "completion": ""}, Bad("no answer")),
            ({"prompt": "Tom", "completion": None}, Bad("no answer")), ({"prompt": None, "completion": None}, None),
        ]))  # fmt: skip
        return Document(says, record)
    if kind == 7:
        record = {"prompt": "Tom", "completion": draw(st.sampled_from([5, True]))}
        return Document(Bad("wrong type"), record, plain=False)
    talk = draw(talks())
    cut = draw(st.integers(0, len(talk.said) - 1))
    told = [_message(draw, said, plain=False) for said in talk.said]
    record = {"prompt": told[:cut], "completion": told[cut:]}
    if talk.tools:
        record["tools"] = talk.tools
    return Document(Talk(talk.said, talk.tools, first=cut), record, plain=False, begins=True)


@st.composite
def texts(draw: Any) -> Document:
    """A text."""
    if draw(st.integers(0, 7)) == 0:
        value, says, plain = draw(st.sampled_from([
            (None, None, True), (5, Bad("wrong type"), False), (["x"], Bad("wrong type"), False),
            ("half \udc80", Bad("lone surrogate"), False),
        ]))  # fmt: skip
        return Document(says, {"text": value}, plain=plain)
    text = draw(st.one_of(WORDS, WORDS.map("<s>".__add__)))
    return Document(text, {"text": text, "url": draw(st.sampled_from([None, "x"]))}, begins=True)


VOCABULARY = 260
"""Ids of the made tokenizer of bytes."""


@st.composite
def token_ids(draw: Any) -> Document:
    """Token ids, with padding, masks and labels."""
    ids = draw(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=40))
    n = len(ids)
    record: dict[str, Any] = {"input_ids": ids}
    counts = None
    masks = st.sampled_from(["labels", "completion_mask", "assistant_masks"])
    for name in draw(st.lists(masks, max_size=2, unique=True)):
        mask = draw(st.lists(st.booleans(), min_size=n, max_size=n))
        counts = mask if counts is None else [a and b for a, b in zip(counts, mask, strict=True)]
        record[name] = [token if m else -100 for token, m in zip(ids, mask, strict=True)] if name == "labels" else (
            [int(m) for m in mask])  # fmt: skip
    start, stop = 0, n
    if draw(st.booleans()):
        start = draw(st.integers(0, n))
        stop = draw(st.integers(start, n))
        record["attention_mask"] = [int(start <= i < stop) for i in range(n)]
    counts = None if counts is None else counts[start:stop]
    says: Says = Ids(tuple(ids[start:stop]), None if counts is None else tuple(counts))
    if counts is not None and not any(counts[1:]):
        says = Bad("nothing taught")
    how, plain = draw(st.integers(0, 19)), True
    if how == 0:
        record = {"input_ids": [5, draw(st.sampled_from([VOCABULARY, 10**6, -1])), 7]}
        says = Bad("id out of range")
    elif how == 1:
        record, says = {"input_ids": [5, 6], "labels": [5]}, Bad("unequal lengths")
    elif how == 2:
        record, says = {"input_ids": [5, 6, 7], "labels": [5, 9, 7]}, Bad("labels that are not the tokens")
    elif how == 3:
        record, says = {"input_ids": [5, 6, 7], "attention_mask": [1, 0, 1]}, Bad("attention_mask with a gap")
    elif how == 4:
        record, says, plain = {"input_ids": draw(st.sampled_from(["x", [5, None], [[5]], 3]))}, Bad("wrong type"), False
    elif how == 5:
        record, says = {"input_ids": None}, None
    return Document(says, record, plain=plain, begins=how > 5)


FORMS: dict[str, Any] = {
    "messages": messages(), "conversations": conversations(), "instructions": instructions(),
    "completions": completions(), "texts": texts(), "token_ids": token_ids(),
}  # fmt: skip
BROKEN = [
    Document(Bad("not JSON"), b'{"text": "x", "messages": ['), Document(Bad("not JSON"), b"he said"),
    Document(Bad("not an object"), b'"a text"'), Document(Bad("not an object"), b"17"),
    Document(Bad("not UTF-8"), b'{"text": "\xff\xfe", "messages": "\xc3"}'),
    Document(None, b'{"other": 1}'), Document(None, b"{}"),
]  # fmt: skip


def _line(record: dict[str, Any] | bytes) -> bytes:
    if isinstance(record, bytes):
        return record
    try:
        return json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return json.dumps(record).encode()


def _table(records: list[dict[str, Any]]) -> bytes:
    names = list(dict.fromkeys(name for record in records for name in record))
    table = pa.table({name: pa.array([record.get(name) for record in records]) for name in names})
    out = io.BytesIO()
    parquet.write_table(table, out, row_group_size=3)
    return out.getvalue()


@st.composite
def corpora(draw: Any) -> Made:
    """A corpus of one form, in some file."""
    form = draw(st.sampled_from([*FORMS, "messages", "messages", "completions", "paragraphs"]))
    if form == "paragraphs":
        return _paragraphs(draw)
    kind = draw(st.sampled_from(["jsonl", "jsonl", "json", "jsonl.gz", "NDJSON", "parquet"]))
    one = FORMS[form]
    if kind == "parquet":
        one = one.filter(lambda document: document.plain)
    documents = [draw(one.filter(lambda document: document.begins)), *draw(st.lists(one, min_size=2, max_size=10))]
    if kind != "parquet":
        broken = st.sampled_from(BROKEN if kind != "json" else [one for one in BROKEN if one.says != Bad("not JSON")])
        for _ in range(draw(st.sampled_from([0, 0, 1, 2 if kind != "json" else 1]))):  # two in an array may be one
            documents.insert(draw(st.integers(0, len(documents))), draw(broken))
    lines = [_line(document.record) for document in documents] if kind != "parquet" else []
    if kind == "parquet":
        data = _table([document.record for document in documents if isinstance(document.record, dict)])
    elif kind == "json":
        data = draw(st.sampled_from([b"[%s]", b"[\n  %s\n]\n", b"\xef\xbb\xbf[%s]"])) % b",\n ".join(lines)
    else:
        end = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n"]))
        data = end.join(lines) + draw(st.sampled_from([b"", b"\n", b"\n\n"]))
        data = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + data
    return Made(form, f"made.{kind}", gzip.compress(data) if kind.endswith("gz") else data, tuple(documents))


def _paragraphs(draw: Any) -> Made:
    paragraph = SURE.map(lambda text: "\n".join(line for line in text.splitlines() if line.strip()))
    found = [Document(text, text.encode()) for text in draw(st.lists(paragraph, min_size=1, max_size=8))]
    if draw(st.integers(0, 3)) == 0:
        found.insert(draw(st.integers(0, len(found))), Document(Bad("not UTF-8"), b"x\xff\xfey"))
    between = draw(st.sampled_from([b"\n\n", b"\r\n\r\n", b"\n \t\n\n"]))
    data = between.join(one.record for one in found if isinstance(one.record, bytes))
    return Made("texts", "made.txt", data + draw(st.sampled_from([b"", b"\n"])), tuple(found))
