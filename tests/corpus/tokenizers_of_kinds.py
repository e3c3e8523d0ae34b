"""Small tokenizers of the kinds that models have: the same pieces in the same order, trained on a few words."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = [
    "def f(x):\n    return x + 1\n\n\nfor i in range(10):\n\tprint(i)", "He is Tom.  She is Lily, surely.",
    "The capital of France is Paris.\n\n\n\nAnd here it goes on.", "naïve café, Zürich", "[user] [assistant] <user>",
] * 8  # fmt: skip

GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def _trained(backend: Tokenizer, alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(WORDS, trainer)
    return backend


def _byte_level(*, regex: str | None, prefix: bool = False, trim: bool = True, nfc: bool = False) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex is None)
    backend.pre_tokenizer = (
        bytes_ if regex is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(regex), "isolated"), bytes_])
    )
    if nfc:
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    backend = _trained(backend, pre_tokenizers.ByteLevel.alphabet())
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    return backend


def _llama2() -> Tokenizer:
    """Spaces as an underline before words, a space put before each text, and bytes for what is unknown."""
    vocab = {"<unk>": 0, **{token: i + 1 for i, token in enumerate(SPECIAL)}}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    letters = sorted({letter for words in WORDS for letter in words if letter.isascii() and letter > " "} | {"▁"})
    vocab |= {letter: len(vocab) + i for i, letter in enumerate(letters)}
    merges = [("H", "e"), ("▁", "He"), ("▁", "i"), ("▁i", "s"), ("▁", "▁"), ("r", "e"), ("▁", "T"), ("o", "m")]
    for a, b in merges:
        vocab.setdefault(a + b, len(vocab))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ])  # fmt: skip
    backend.add_special_tokens(SPECIAL)
    return backend


def _with_bos(backend: Tokenizer) -> Tokenizer:
    bos = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))])
    before = [] if backend.post_processor is None else [backend.post_processor]
    backend.post_processor = processors.Sequence([*before, bos])
    return backend


KINDS = {
    "gpt2": lambda: _byte_level(regex=None),
    "gpt2-prefix": lambda: _byte_level(regex=None, prefix=True),
    "neox": lambda: _byte_level(regex=None, trim=True),
    "llama3": lambda: _with_bos(_byte_level(regex=GPT4, trim=True)),
    "qwen": lambda: _byte_level(regex=GPT4, nfc=True, trim=False),
    "llama2": lambda: _with_bos(_llama2()),
}


def make(kind: str) -> Any:
    """A tokenizer of a kind."""
    return PreTrainedTokenizerFast(tokenizer_object=KINDS[kind](), bos_token="<s>", eos_token="</s>")


def permuted(tokenizer: Any) -> tuple[Any, np.ndarray[Any, Any]]:
    """The same tokenizer with other ids, and the new id of each; without the special tokens that it adds."""
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    new = np.random.default_rng(0).permutation(len(tokenizer))
    described["model"]["vocab"] = {text: int(new[n]) for text, n in described["model"]["vocab"].items()}
    for token in described["added_tokens"]:
        token["id"] = int(new[token["id"]])
    described["added_tokens"].sort(key=lambda token: token["id"])
    described["post_processor"] = None
    backend = Tokenizer.from_str(json.dumps(described))
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>"), new
