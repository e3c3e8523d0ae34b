"""Exact tokens: a text and spans of it to token ids, and which of them lie in the spans.

Guarantee: the tokens of a span decode to the span, and to nothing else. Where a token of the whole text would reach
over the edge of a span (an answer that begins with a line break, behind a prompt that ends with one), the text is
tokenised in two parts at that edge: these are the ids that a model has read when it begins to answer.

Places come from the tokenizer's own alignment, with trimming off: a tokenizer that trims offsets says of a token of
nothing but spaces that it stands nowhere.
Cost: the tokenizer's, and a pass of numpy over the offsets.

Shapes: n tokens of a text.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.corpus.chat_template import Span
from kdcache.corpus.documents import BadDocument

_PLAIN = "A line, and\n\tanother  one: naïve 漢字 🙂 </x>"


class ExactTokens:
    """Tokenises texts with spans.

    Args:
        tokenizer: of transformers.
        parse_special: whether a special token that is written in a text is one; else it is text like any other.
    """

    def __init__(self, tokenizer: Any, *, parse_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._whole: Any = None
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is not None:
            described = json.loads(backend.to_str())
            whole = _from_json({**described, "post_processor": None, "padding": None, "truncation": None})
            if whole.encode(_PLAIN, add_special_tokens=False).ids == self._plain(_PLAIN):
                self._whole, self._continued = whole, _from_json(_without_prefix(described))
                self._whole.encode_special_tokens = self._continued.encode_special_tokens = not parse_special

    def encode(self, text: str, spans: Sequence[Span]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """The ids of a text, without special tokens that it does not hold, and which of them lie in a span.

        Args:
            text: to tokenise.
            spans: of characters, in order and apart.

        Returns:
            `[n]` ids and `[n]` bool.

        Raises:
            BadDocument: a span is not made of whole tokens, however the text is cut.
        """
        if self._whole is None:
            return self._by_prefixes(text, spans)
        edges = sorted({edge for span in spans for edge in span} - {0, len(text)})
        ids, starts, ends = self.encode_plain(text)
        cuts = [edge for edge in edges if _straddled(starts, ends, edge)]
        if cuts:
            bounds = [0, *cuts, len(text)]
            parts = [self.encode_plain(text[a:b], a) for a, b in itertools.pairwise(bounds)]
            ids, starts, ends = (np.concatenate([part[i] for part in parts]) for i in range(3))
        supervised = np.zeros(len(ids), bool)
        for begin, end in spans:
            inside = (starts >= begin) & (ends <= end) & (ends > begin)
            if begin < end and not _covers(starts[inside], ends[inside], text, begin, end):
                raise BadDocument("answer not tokenised exactly: its tokens do not cover it")
            supervised |= inside
        return ids, supervised

    def encode_plain(self, text: str, at: int = 0) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
        """Ids, and where each token begins and ends in characters, of a text that stands at some place of a longer one.

        Without a place for any token (two arrays of none) where the tokenizer has no offsets.
        """
        if self._whole is None:
            none = np.zeros(0, np.int64)
            return np.array(self._plain(text), np.int32), none, none
        tokenizer = self._continued if at else self._whole
        found = tokenizer.encode(text, add_special_tokens=False)
        offsets = np.array(found.offsets, np.int64).reshape(-1, 2)
        return np.array(found.ids, np.int32), offsets[:, 0] + at, offsets[:, 1] + at

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _by_prefixes(self, text: str, spans: Sequence[Span]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """The same from a tokenizer without offsets: the ids up to an edge must begin the ids of the whole."""
        whole = self._plain(text)
        supervised = np.zeros(len(whole), bool)
        for begin, end in spans:
            edges = []
            for edge in (begin, end):
                prefix = self._plain(text[:edge])
                if whole[: len(prefix)] != prefix:
                    raise BadDocument("answer not tokenised exactly: a token reaches over its edge")
                edges.append(len(prefix))
            supervised[edges[0] : edges[1]] = True
        return np.array(whole, np.int32), supervised


def _from_json(described: dict[str, Any]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(described))


def _without_prefix(described: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer that puts no space before a text: for one that continues another."""

    def plain(part: Any) -> Any:
        if isinstance(part, list):
            return [plain(item) for item in part if not (isinstance(item, dict) and item.get("type") == "Prepend")]
        if not isinstance(part, dict):
            return part
        part = {key: plain(value) for key, value in part.items()}
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = False
        if part.get("type") == "Metaspace":
            part["prepend_scheme"] = "never"
        return part

    changed = {name: plain(described[name]) for name in ("normalizer", "pre_tokenizer")}
    if isinstance(changed["normalizer"], dict) and changed["normalizer"].get("type") == "Prepend":
        changed["normalizer"] = None
    return {**described, **changed, "post_processor": None, "padding": None, "truncation": None}


def _straddled(starts: NDArray[np.int64], ends: NDArray[np.int64], edge: int) -> bool:
    """Whether a token lies on both sides of a place."""
    return bool(((starts < edge) & (ends > edge)).any())


def _covers(starts: NDArray[np.int64], ends: NDArray[np.int64], text: str, begin: int, end: int) -> bool:
    """Whether tokens cover a span.

    What some tokenizers do not keep may be bare: white space, and what composes with the character before it (an accent
    written by itself), which a normalizer makes one character of.
    """
    covered = np.zeros(end - begin + 1, np.int64)
    np.add.at(covered, starts - begin, 1)
    np.add.at(covered, ends - begin, -1)
    bare = [begin + int(place) for place in np.flatnonzero(np.cumsum(covered)[:-1] == 0)]
    return all(text[place].isspace() or _composes(text, begin, place) for place in bare)


def _composes(text: str, begin: int, place: int) -> bool:
    """Whether a character becomes a part of one before it, in the canonical composition of Unicode."""
    first = max(begin, place - _MOST_COMPOSED)
    return len(unicodedata.normalize("NFC", text[first : place + 1])) < len(text[first : place + 1])


_MOST_COMPOSED = 4
"""Characters before one that may be composed with it."""
