"""Token bytes: the bytes that each token of a tokenizer stands for.

Known are the two ways in which vocabularies write bytes: letters that stand for one byte each (byte-level BPE: GPT-2,
Llama 3, Qwen, and what was made of tiktoken's files), and SentencePiece's, with U+2581 for a space and `<0x0A>` for a
byte (Llama 2, Gemma, unigram models). Special tokens stand for no text.

Guarantee: the bytes of the tokens of a text, joined, are the text, up to the space that some tokenizers put in front of
it; `require_exact` tries that, and refuses a tokenizer that writes its tokens in another way (WordPiece).
Cost: one look into the vocabulary a token, kept; `lengths` looks at each token once.

Shapes: V tokens of a vocabulary, n tokens of a text.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import ModelError

SPECIAL = -1
"""The length of a token that stands for no text."""

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\u2581"
_PLAIN = "He said: it's a test.  Two spaces,\nand a new line"
"""A text that every normalisation leaves as it is, but for those that change or drop what a person can see."""


class TokenBytes:
    """The bytes of each token.

    Args:
        tokenizer: of transformers.

    Attributes:
        added: text of each token that was added to the vocabulary, by id.
        special: those of them that stand for no text.
        byte_level: whether letters stand for bytes.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.added: dict[int, str] = {number: text for text, number in tokenizer.get_added_vocab().items()}
        marked = getattr(tokenizer, "added_tokens_decoder", {})
        named = set(tokenizer.all_special_ids)
        self.special = {
            number: text
            for number, text in self.added.items()
            if number in named or getattr(marked.get(number), "special", False)
        }
        self.special |= {int(number): str(tokenizer.convert_ids_to_tokens(int(number))) for number in named}
        space = tokenizer.get_vocab().get("\u0120")
        self.byte_level = space is not None and tokenizer.decode([space]) == " "
        self._letters = _byte_alphabet() if self.byte_level else {}
        self._texts: dict[int, bytes | None] = {}
        self._lengths: NDArray[np.int32] | None = None
        self._prefixed: bool | None = None

    def piece(self, token: int) -> bytes | None:
        """The bytes of a token of the vocabulary, as if it were not special; None if there is no such token."""
        if token in self.added:
            return self.added[token].encode("utf-8", "surrogatepass")
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return None
        if self._letters and all(each in self._letters for each in piece):
            return bytes(self._letters[each] for each in piece)
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return str(piece).replace(_SPACE, " ").encode("utf-8", "surrogatepass")

    def is_byte(self, token: int) -> bool:
        """Whether a token is SentencePiece's name of a byte."""
        piece = None if token in self.added or self.byte_level else self._tokenizer.convert_ids_to_tokens(token)
        return piece is not None and _BYTE.fullmatch(piece) is not None

    def text(self, token: int) -> bytes | None:
        """The bytes of a token; None if it is special, or there is none."""
        if token not in self._texts:
            self._texts[token] = None if token in self.special else self.piece(token)
        return self._texts[token]

    @property
    def lengths(self) -> NDArray[np.int32]:
        """`[V]` bytes of each token, `SPECIAL` of those that stand for no text."""
        if self._lengths is None:
            texts = (self.text(token) for token in range(1 + max(self._tokenizer.get_vocab().values(), default=-1)))
            self._lengths = np.array([SPECIAL if text is None else len(text) for text in texts], np.int32)
        return self._lengths

    @property
    def prefixed(self) -> bool:
        """Whether the tokenizer puts a space in front of a text, which is then no byte of it."""
        if self._prefixed is None:
            first = [self.text(int(token)) for token in self._encode("a")][:1]
            self._prefixed = first[0] is not None and first[0].startswith(b" ") if first else False
        return self._prefixed

    def of_labels(
        self, labels: NDArray[np.int64], before: NDArray[np.int64], position_ids: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """`[n]` bytes of text that labels stand for; 0 of special ones.

        A space that the tokenizer put in front of a piece does not count: that of the first token behind a special one.

        Args:
            labels: `[n]` ids.
            before: `[n]` the token before each.
            position_ids: `[n]` the index of that token in its piece.
        """
        lengths = self.lengths
        found = lengths[labels].astype(np.int64)
        if self.prefixed:
            first = np.flatnonzero((position_ids == 0) & (lengths[before] == SPECIAL) & (found > 0))
            for place in first.tolist():
                found[place] -= (self.text(int(labels[place])) or b"").startswith(b" ")
        return np.maximum(found, 0)

    def require_exact(self, role: str) -> None:
        """Refuse a tokenizer whose tokens do not say which bytes they stand for.

        Args:
            role: whose it is, for the message.

        Raises:
            ModelError: the tokens of a plain text, joined, are another text.
        """
        texts = [self.text(int(token)) for token in self._encode(_PLAIN)]
        joined = b"".join(text for text in texts if text is not None)
        if None not in texts and joined.removeprefix(b" " if self.prefixed else b"") != _PLAIN.encode():
            raise ModelError(
                f"the bytes of the tokens of the {role} are not known: its tokenizer makes {joined[:40]!r} of "
                f"{_PLAIN[:40]!r}; known are byte-level vocabularies and SentencePiece's"
            )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _byte_alphabet() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte (GPT-2's `bytes_to_unicode`)."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}
