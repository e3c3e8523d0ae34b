"""What tokens read like: bytes that are no character, spaces, and characters that would act on the text around them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from kdcache.explorer.token_texts import TokenTexts, readable
from kdcache.pretrained import load_tokenizer


def test_a_byte_level_tokenizer(teacher: Path) -> None:
    tokenizer = load_tokenizer(teacher)
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode("é fox\n😀", add_special_tokens=False)
    assert "".join(texts[i] for i in ids) == "⟨C3⟩⟨A9⟩ fox\n⟨F0⟩⟨9F⟩⟨98⟩⟨80⟩"
    assert texts[0] == "<s>" and texts[1] == "</s>"
    assert texts[10_000] == "⟨10000⟩"  # a row that the model is padded with


def test_pieces_with_a_mark_for_spaces_and_byte_tokens() -> None:
    vocabulary = {"<unk>": 0, "\u2581the": 1, "ing": 2, "<0xE2>": 3, "<0x41>": 4, "\u2581": 5}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    texts = TokenTexts(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))
    assert [texts[i] for i in range(6)] == ["<unk>", " the", "ing", "⟨E2⟩", "A", " "]


def test_without_a_tokenizer_a_token_is_its_number() -> None:
    assert TokenTexts(None)[17] == "⟨17⟩"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\tand\nlines", "plain\tand\nlines"),
        ("a\u202eb\u2069", "a⟨U+202E⟩b⟨U+2069⟩"),
        ("\x00\x1b[2J\u2028", "⟨U+0000⟩⟨U+001B⟩[2J⟨U+2028⟩"),
        ("\u200b\ufeff\u00ad", "⟨U+200B⟩⟨U+FEFF⟩⟨U+00AD⟩"),
        ("👨\u200d👩", "👨\u200d👩"),
        ("\u200d", "⟨U+200D⟩"),
        ("e\u0301 नि مرحبا", "e\u0301 नि مرحبا"),
        (b"\xe2\x82".decode("utf-8", "surrogateescape"), "⟨E2⟩⟨82⟩"),
        ("\ud800", "⟨U+D800⟩"),
    ],
)
def test_every_character_shows(text: str, shown: str) -> None:
    assert readable(text) == shown
