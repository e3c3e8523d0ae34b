"""Retokenise: a piece of a teacher's tokens as tokens of a student.

Special tokens are mapped by name and keep their places; the text between two of them is tokenised by the student on its
own. A place in a piece is counted in units: one for each byte of text, and one for each special token, so that both
tokenisations share one scale. The space that a tokenizer puts in front of a text is no byte of it.

A piece that was cut in the middle of a character begins, or ends, with bytes that are no text: the student is not given
them. Such bytes anywhere else are an error: the student cannot encode them.

Cost: that of the student's tokenizer.

Shapes: n tokens of the teacher in a piece, m of the student.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.alignment.vocabulary import Vocabularies
from kdcache.corpus.exact_tokens import ExactTokens
from kdcache.errors import ModelError
from kdcache.token_bytes import TokenBytes

UNKNOWN = -1
"""The edge of a token that begins inside a character."""

_LONGEST_CHARACTER = 4


class UnencodableError(ModelError):
    """A piece that the student cannot be given."""


@dataclass(frozen=True)
class Piece:
    """A piece in the tokens of both sides.

    Attributes:
        tokens: `[m]` of the student.
        edges: `[m + 1]` where each of them begins, in units, and where the last ends; `UNKNOWN` inside a character.
        teacher_edges: `[n + 1]` the same of the teacher's tokens.
        text: `[units]` bool, which of the units are bytes of text.
    """

    tokens: NDArray[np.int64]
    edges: NDArray[np.int64]
    teacher_edges: NDArray[np.int64]
    text: NDArray[np.bool_]


class Retokeniser:
    """Retokenises pieces.

    Args:
        teacher, student: their tokenizers.
        of_teacher, of_student: the bytes of the tokens of both.
        vocabularies: of both.
    """

    def __init__(
        self, teacher: Any, student: Any, of_teacher: TokenBytes, of_student: TokenBytes, vocabularies: Vocabularies
    ) -> None:
        self._exact = ExactTokens(student, parse_special=False)
        self._of_teacher, self._of_student, self._vocabularies = of_teacher, of_student, vocabularies
        self._unknown = student.unk_token_id
        unknown = teacher.unk_token_id  # GPT-2 names its end of text so, too, and that is known
        self._unknown_to_teacher = None if unknown in (teacher.bos_token_id, teacher.eos_token_id) else unknown

    def piece(self, tokens: NDArray[np.integer[Any]]) -> Piece:
        """Retokenise a piece.

        Args:
            tokens: `[n]` of the teacher.

        Raises:
            UnencodableError: the student has nothing for a special token, or cannot encode the text.
        """
        texts = [self._of_teacher.text(int(token)) for token in tokens]
        first = next((place for place, text in enumerate(texts) if text is not None), len(texts))
        if first < len(texts) and self._of_teacher.prefixed:
            texts[first] = (texts[first] or b"").removeprefix(b" ")
        alike = self._vocabularies.alike  # then each token has a unit, also one of no bytes
        units = np.array([1 if text is None or (alike and not text) else len(text) for text in texts], np.int64)
        teacher_edges = np.concatenate([[0], np.cumsum(units)])
        if alike:
            ids, edges = self._vocabularies.ids[tokens], teacher_edges
        else:
            ids, edges = self._retokenised(tokens, texts, teacher_edges)
        is_text = np.repeat([bool(text) for text in texts], units)
        return Piece(ids, edges, teacher_edges, is_text)

    def _retokenised(
        self, tokens: NDArray[np.integer[Any]], texts: list[bytes | None], begins: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ids: list[NDArray[np.int64]] = []
        edges: list[NDArray[np.int64]] = []
        end = 0
        for is_text, run in itertools.groupby(range(len(texts)), lambda place: texts[place] is not None):
            places = list(run)
            if not is_text:
                ids.append(np.array([self._special(int(tokens[place])) for place in places], np.int64))
                edges.append(begins[places])
                end = int(begins[places[-1] + 1])
                continue
            content = b"".join(texts[place] or b"" for place in places)
            if not content:
                continue
            begin, last = places[0] == 0, places[-1] == len(texts) - 1
            text, skipped = _whole_characters(content, begin, last)
            made, at = self._text(text, starts=all(before is None for before in texts[: places[0]]))
            ids.append(made)
            edges.append(np.where(at == UNKNOWN, UNKNOWN, at + int(begins[places[0]]) + skipped))
            end = int(begins[places[0]]) + skipped + len(text.encode())
        return np.concatenate([np.zeros(0, np.int64), *ids]), np.concatenate([*edges, np.array([end], np.int64)])

    def _special(self, token: int) -> int:
        partner = int(self._vocabularies.ids[token])
        if partner < 0 or token == self._unknown_to_teacher:
            name = self._of_teacher.special.get(token, f"id {token}")
            raise UnencodableError(f"has nothing for the special token {name!r}")
        return partner

    def _text(self, text: str, *, starts: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids of a text, and where in its bytes each begins; `starts` says whether no text stands before it."""
        ids, begin, end = self._exact.encode_plain(text, 0 if starts else 1)
        if not starts:
            begin, end = begin - 1, end - 1
        numbers = ids.astype(np.int64)
        if self._unknown is not None and (numbers == self._unknown).any():
            place = int(np.flatnonzero(numbers == self._unknown)[0])
            near = text[int(begin[place]) : int(begin[place]) + 20] if len(begin) else text[:20]
            raise UnencodableError(f"cannot encode {near!r}")
        pieces = [self._of_student.text(int(token)) or b"" for token in numbers]
        if pieces and starts and self._of_student.prefixed:
            pieces[0] = pieces[0].removeprefix(b" ")
        if b"".join(pieces) == text.encode():
            lengths = np.array([len(each) for each in pieces], np.int64)
            return numbers, np.cumsum(lengths) - lengths
        if len(begin) != len(numbers):
            raise UnencodableError(f"changes the text {text[:20]!r}, and does not say where its tokens lie")
        return numbers, _by_offsets(text, begin, end)


def _whole_characters(content: bytes, begin: bool, last: bool) -> tuple[str, int]:
    """The text of some bytes, and how many bytes at their beginning belong to a character that was cut.

    Args:
        content: the bytes.
        begin, last: whether they begin, or end, a piece, which may be cut in a character.

    Raises:
        UnencodableError: they are no UTF-8.
    """
    skipped, stop = 0, len(content)
    while begin and skipped < min(stop, _LONGEST_CHARACTER - 1) and 0x80 <= content[skipped] < 0xC0:
        skipped += 1
    if last:
        for back in range(1, min(stop - skipped, _LONGEST_CHARACTER - 1) + 1):
            lead = content[stop - back]
            if lead >= 0xC0:
                needs = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
                stop -= back if needs > back else 0
                break
    try:
        return content[skipped:stop].decode(), skipped
    except UnicodeDecodeError as error:
        near = content[max(0, error.start - 10) : error.start + 10]
        raise UnencodableError(f"cannot encode {near!r}, which is no text") from None


def _by_offsets(text: str, begin: NDArray[np.int64], end: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where in a text's bytes each token begins, from places in its characters; what no token has belongs to the next.

    Tokens that share a character have no edge between them.
    """
    bytes_before = np.concatenate([[0], np.cumsum([len(letter.encode()) for letter in text])])
    edges = np.zeros(len(begin), np.int64)
    for place in range(1, len(begin)):
        apart = end[place - 1] <= begin[place]
        edges[place] = bytes_before[end[place - 1]] if apart else UNKNOWN
    return edges
