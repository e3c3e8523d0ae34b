"""Tokenise: one document to token ids, and to the tokens that a student may be taught.

Text gets whatever its tokenizer adds by itself (BOS, EOS or nothing). Chat records go through
the tokenizer's chat template and only what the assistant says is supervised. Tokenised
records are taken as they are, labels in the Hugging Face convention: aligned with the
tokens, not shifted, -100 where masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.corpus.packing import Tokens
from kdcache.errors import CorpusError
from kdcache.rows import IGNORE


def tokenise_texts(tokenizer: Any, numbers: Sequence[int], texts: Sequence[str]) -> list[Tokens]:
    """Tokenise plain documents in one call, with the special tokens that the tokenizer adds itself."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), return_attention_mask=False, verbose=False)["input_ids"]
    return [Tokens(document=n, ids=np.asarray(ids, np.int32)) for n, ids in zip(numbers, encoded, strict=True)]


def tokenise_prompt(tokenizer: Any, text: str) -> list[int]:
    """The tokens with which a plain document begins that begins with a text: no special token follows it."""
    whole = [int(t) for t in tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]]
    inner = [int(t) for t in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return whole[: start + len(inner)]
    return whole


def tokenise_chat(tokenizer: Any, number: int, messages: Sequence[dict[str, Any]]) -> Tokens:
    """Tokenise one conversation; only what the assistant says is supervised.

    The template's own `{% generation %}` marks are used when it has them. Otherwise the
    conversation is rendered up to each assistant turn, with the prompt that invites it, and
    after it: what lies between is the assistant's.

    Raises:
        CorpusError: no chat template, a record that is not a conversation, or a template that
            rewrites earlier turns so that the assistant's words cannot be found.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise CorpusError("the corpus holds conversations, but the teacher's tokenizer has no chat template")
    if not messages or any(not isinstance(m, dict) or not m.get("role") or m.get("content") is None for m in messages):
        raise CorpusError(f"document {number} is not a list of messages with a role and content")
    # Arrow gives every message every key that any message has; a template must not see those.
    plain = [{key: value for key, value in m.items() if value is not None} for m in messages]
    try:
        return _render_chat(tokenizer, number, plain)
    except CorpusError:
        raise
    except Exception as error:  # a template is a program, and raises what it likes
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CorpusError(f"document {number}: the chat template refuses it: {reason}") from error


def _render_chat(tokenizer: Any, number: int, messages: list[dict[str, Any]]) -> Tokens:
    template = tokenizer.get_chat_template()
    if "generation %}" in template.replace("-%}", "%}"):
        out = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = out["input_ids"], np.asarray(out["assistant_masks"], bool)
        return Tokens(document=number, ids=np.asarray(ids, np.int32), supervised=mask)

    def render(count: int, invite: bool) -> str:
        text = tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=invite)
        return str(text)

    whole = render(len(messages), False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = render(i, True) if i else "", render(i + 1, False)
            if not (whole.startswith(before) and whole.startswith(after)):
                raise CorpusError(
                    f"document {number}: the chat template rewrites earlier turns, so the assistant's words cannot "
                    "be located; give the template {% generation %} marks"
                )
            spans.append((len(before), len(after)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.array([start for start, _ in encoded["offset_mapping"]], np.int64)
    ends = np.array([end for _, end in encoded["offset_mapping"]], np.int64)
    supervised = np.zeros(len(starts), bool)
    for begin, end in spans:
        supervised |= (starts >= begin) & (ends <= end) & (ends > starts)
    return Tokens(document=number, ids=np.asarray(encoded["input_ids"], np.int32), supervised=supervised)


def take_tokenised(number: int, ids: Sequence[int], labels: Sequence[int] | None, vocab_size: int) -> Tokens:
    """Check one document that is already tokenised.

    Raises:
        CorpusError: an id outside the vocabulary, or labels that are not the tokens themselves.
    """
    if any(value is None for value in (*ids, *(labels or ()))):
        raise CorpusError(f"document {number} holds a null among its input_ids or labels")
    tokens = np.asarray(ids, np.int64)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= vocab_size):
        bad = tokens[(tokens < 0) | (tokens >= vocab_size)][0]
        raise CorpusError(f"document {number} holds token id {bad}, outside the vocabulary of {vocab_size}")
    supervised: NDArray[np.bool_] | None = None
    if labels is not None:
        wanted = np.asarray(labels, np.int64)
        if wanted.shape != tokens.shape:
            raise CorpusError(f"document {number} has {len(tokens)} input_ids but {len(wanted)} labels")
        supervised = wanted != IGNORE
        if (wanted[supervised] != tokens[supervised]).any():
            shifted = wanted.size > 1 and ((wanted[:-1] == tokens[1:]) | ~supervised[:-1]).all()
            raise CorpusError(
                f"document {number}: labels must equal input_ids where they are not -100"
                + ("; these look shifted by one already, give them unshifted" if shifted else "")
            )
    return Tokens(document=number, ids=tokens.astype(np.int32), supervised=supervised)
