"""Forms: which columns of a corpus its documents are made of.

A column that a person names wins. Otherwise the first of these that is there: `input_ids`, `text`, `messages`,
`conversations`, `prompt` with `completion`, `instruction` with `output`. What stands beside them and says something of
the documents (tools, masks, a system prompt, what the teacher reads) is taken along, or refused by name; other columns
are not read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from kdcache.corpus.record_form import Form
from kdcache.corpus.teacher_context import COLUMNS
from kdcache.corpus.token_records import MASKS
from kdcache.errors import ConfigError, CorpusError
from kdcache.extras import WRITER_LOGP

PICTURES = ("image", "images", "audio", "audios", "video", "videos")
"""Columns that hold what cannot be read as text."""

PACKED = ("position_ids", "seq_lengths", "segment_ids", "cu_seqlens", "document_ids")
"""Columns that say that several documents were put into one record."""


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns that a person gives; None for the usual one.

    Raises:
        ConfigError: names that exclude each other.
    """

    text: str | None = None
    messages: str | None = None
    prompt: str | None = None
    completion: str | None = None
    tools: str | None = None
    documents: str | None = None
    ignored: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        given = [name for name in ("text", "messages", "prompt") if getattr(self, name)]
        if self.completion and "prompt" not in given:
            given.append("completion")
        if len(given) > 1:
            raise ConfigError(f"{given[0]}_column and {given[1]}_column exclude each other")


def choose_form(corpus: str, names: Sequence[str], columns: Columns) -> Form:
    """The form of a corpus that has these columns.

    Args:
        corpus: its name, for messages.
        names: columns of its first records.
        columns: what a person said of them.

    Raises:
        CorpusError: no column that can be read, one that was named and is not there, or one that says which tokens
            count and cannot be honoured.
    """
    for name in columns.ignored:
        _require(corpus, names, name)
    there = [name for name in names if name not in columns.ignored]
    form = _named(corpus, there, columns) or _usual(there, columns)
    if form is None:
        raise CorpusError(
            f"the corpus {corpus} has no column 'text', 'messages', 'conversations', 'input_ids', 'prompt' with "
            f"'completion', or 'instruction' with 'output'; it has {', '.join(names)} (name one as text_column, "
            "messages_column, or prompt_column with completion_column)"
        )
    form = _with_teacher(corpus, form, there, columns.ignored)
    _require_honoured(corpus, form, there)
    return form


_TOLD = {"text": ("teacher_prompt",), "chat": ("teacher_messages",), "completion": COLUMNS, "tokenised": ()}
"""Columns that say what the teacher reads, by the form of a corpus."""


def _with_teacher(corpus: str, form: Form, names: Sequence[str], ignored: Sequence[str]) -> Form:
    """A form with the columns that say what the teacher reads, if any are there."""
    told = _TOLD[form.name]
    for name in COLUMNS:
        if name in names and name not in told:
            instead = f"give {told[0]}" if told else "only teacher_system can put something before its tokens"
            raise CorpusError(
                f"the corpus {corpus} has a column {name!r}, which does not go with documents of the form {form.name}; "
                f"{instead}, or name it in ignore_columns if it does not count"
            )
    there = {name: name for name in told if name in names}
    late = tuple(name for name in COLUMNS if name not in (*names, *ignored))
    return dataclasses.replace(form, optional={**form.optional, **there}, late=late)


def _require(corpus: str, names: Sequence[str], wanted: str) -> None:
    if wanted not in names:
        raise CorpusError(f"the corpus {corpus} has no column {wanted!r}; it has {', '.join(names)}")


def _named(corpus: str, names: Sequence[str], columns: Columns) -> Form | None:
    if columns.text:
        _require(corpus, names, columns.text)
        return Form(name="text", columns={"text": columns.text})
    if columns.messages:
        _require(corpus, names, columns.messages)
        return _chat({"messages": columns.messages}, columns)
    if columns.prompt or columns.completion:
        pair = {"prompt": columns.prompt or "prompt", "completion": columns.completion or "completion"}
        for name in pair.values():
            _require(corpus, names, name)
        return _chat(pair, columns, "completion")
    return None


def _usual(names: Sequence[str], columns: Columns) -> Form | None:
    if "input_ids" in names:
        masks = {name: name for name in ("labels", *MASKS)}
        masks |= {WRITER_LOGP: WRITER_LOGP} if WRITER_LOGP in names else {}
        return Form(name="tokenised", columns={"input_ids": "input_ids"}, optional=_but(masks, columns))
    if "text" in names:
        return Form(name="text", columns={"text": "text"})
    for name in ("messages", "conversations", "conversation"):
        if name in names:
            return _chat({"messages": name}, columns)
    if {"prompt", "completion"} <= set(names):
        return _chat({"prompt": "prompt", "completion": "completion"}, columns, "completion")
    if {"instruction", "output"} <= set(names):
        return _chat({"instruction": "instruction", "output": "output"}, columns)
    return None


def _chat(wanted: dict[str, str], columns: Columns, form: str = "chat") -> Form:
    """A form of messages, with what may stand beside them."""
    beside = {
        "tools": columns.tools or "tools", "documents": columns.documents or "documents",
        "functions": "functions", "settings": "chat_template_kwargs", "system": "system",
    }  # fmt: skip
    if "instruction" in wanted:
        beside |= {"input": "input", "history": "history"}
    return Form(name=form, columns=wanted, optional=_but(beside, columns))


def _but(optional: dict[str, str], columns: Columns) -> dict[str, str]:
    return {role: name for role, name in optional.items() if name not in columns.ignored}


def _require_honoured(corpus: str, form: Form, names: Sequence[str]) -> None:
    """Refuse columns beside those of a form that change what its documents are."""
    others = [name for name in names if name not in {*form.columns.values(), *form.optional.values()}]
    remedy = "leave it out of the corpus, or name it in ignore_columns if it does not count"
    for name in others:
        counts = re.search(r"(^|_)(mask|masks|weight|weights)$", name) and name != "special_tokens_mask"
        counts = counts or (form.name == "completion" and name in ("label", "labels"))  # whether it is a good one
        if form.name != "text" and counts:
            raise CorpusError(
                f"the corpus {corpus} has a column {name!r}, which seems to say what counts and cannot be honoured; "
                f"{remedy}"
            )
        if form.name == "tokenised" and name in PACKED:
            raise CorpusError(
                f"the corpus {corpus} has a column {name!r}, so its records seem to hold several documents each; give "
                f"one record for each document, or name it in ignore_columns if it does not count"
            )
        if form.name in ("chat", "completion") and name in PICTURES:
            raise CorpusError(f"the corpus {corpus} has a column {name!r}, and only text can be read; {remedy}")
