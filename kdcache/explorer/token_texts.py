"""Token texts: what each token of a tokenizer reads like by itself.

A token is a run of bytes, and not always of whole characters: bytes of a part of a character are written ⟨E2⟩.
Characters that show nothing, or change how the text around them is read (controls, bidirectional overrides, zero-width
spaces), are written by their number, ⟨U+202E⟩. Line feeds and tabs stay.

Cost: one look into the vocabulary a token, kept.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
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
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {}
        self._added: dict[int, str] = {}
        self._bytes_of: dict[str, int] = {}
        if tokenizer is not None:
            self._added = {number: text for text, number in tokenizer.get_added_vocab().items()}
            space = tokenizer.get_vocab().get("\u0120")
            if space is not None and tokenizer.decode([space]) == " ":  # the letters of its tokens stand for bytes
                self._bytes_of = _byte_alphabet()

    def __getitem__(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = readable(self._text(token))
        return self._texts[token]

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return f"⟨{token}⟩"
        if token in self._added:
            return self._added[token]
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:
            return f"⟨{token}⟩"
        if self._bytes_of and all(each in self._bytes_of for each in piece):
            return bytes(self._bytes_of[each] for each in piece).decode("utf-8", "surrogateescape")
        if byte := _BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)]).decode("utf-8", "surrogateescape")
        if "\u2581" in piece:  # SentencePiece's space
            return str(piece).replace("\u2581", " ")
        return str(piece)


def _byte_alphabet() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte (GPT-2's `bytes_to_unicode`)."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(256 + place): byte for place, byte in enumerate(others)}
