"""Token texts: what each token of a tokenizer reads like by itself.

A token is a run of bytes, and not always of whole characters: bytes of a part of a character are written ⟨E2⟩.
Characters that show nothing, or change how the text around them is read (controls, bidirectional overrides, zero-width
spaces), are written by their number, ⟨U+202E⟩. Line feeds and tabs stay.

Cost: one look into the vocabulary a token, kept.
"""

from __future__ import annotations

import unicodedata
from typing import Any

from kdcache.token_bytes import TokenBytes

_JOINERS = "\u200c\u200d"
"""They join or part letters of some scripts, and pictures; beside others they are left where they are."""
_PLAIN = "\n\t"
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Categories of Unicode (chapter 4.5) of characters that show nothing of their own."""


def readable(text: str) -> str:
    """A text whose every character shows; a byte that is no character (PEP 383) as ⟨E2⟩."""
    alone = not text.strip(_JOINERS)
    return "".join(_shown(each, alone) for each in text)


def _shown(character: str, alone: bool) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:
        return f"⟨{code - 0xDC00:02X}⟩"
    if character in _PLAIN or unicodedata.category(character) not in _HIDDEN:
        return character
    if character in _JOINERS and not alone:
        return character
    return f"⟨U+{code:04X}⟩"


class TokenTexts:
    """The readable text of each token.

    Args:
        tokenizer: of transformers; without one a token is shown by its number.
    """

    def __init__(self, tokenizer: Any | None) -> None:
        self._bytes = None if tokenizer is None else TokenBytes(tokenizer)
        self._texts: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = readable(self._text(token))
        return self._texts[token]

    def _text(self, token: int) -> str:
        piece = None if self._bytes is None else self._bytes.piece(token)
        return f"⟨{token}⟩" if piece is None else piece.decode("utf-8", "surrogateescape")
