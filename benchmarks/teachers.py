"""Teachers of common shapes with random weights, for times, which do not depend on the weights."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

SHAPES = {
    "200m": {
        "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "1b": {  # of Llama 3.2 1B
        "vocab_size": 128_256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "8b": {  # of Llama 3.1 8B
        "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
}  # fmt: skip


def make_teacher(folder: Path, shape: str, corpus: Path) -> None:
    """Save a random bfloat16 Llama, and a tokenizer with as many ids: the words of a text, then unused ids."""
    settings = SHAPES[shape]
    words = ["<s>", "</s>", "<unk>", *dict.fromkeys(corpus.read_text().split())][: settings["vocab_size"]]
    words += [f"<{i}>" for i in range(len(words), settings["vocab_size"])]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", max_position_embeddings=131_072, **settings)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
