"""Pretrained models: where their files are, what the files hold, and how they are loaded.

    files.py       the folder, the hub's snapshot or the .gguf file of a name; the fingerprint
    config.py      what a configuration says
    quantised.py   forms of quantised weights: which are loaded, and how
    weights.py     every weight of the files is in the model, or on the list of harmless ones
    blocks.py      where a model keeps its layers, and what it is without some of them
    model.py       a model loaded whole, its parameters in one dtype
    tokenizer.py   a tokenizer that gives the ids of its own file
    gguf_file.py   a model and a tokenizer in one .gguf file

Guarantee: what is loaded is what the files hold, or an error of one sentence. Remote code never runs, and nothing is
unpickled: weights are safetensors or GGUF. docs/teachers.md says what a teacher may be.
"""

from __future__ import annotations

from kdcache.errors import one_line
from kdcache.pretrained.config import context_length, hidden_width, layer_widths, read_config
from kdcache.pretrained.files import fingerprint, model_folder
from kdcache.pretrained.model import find_device, keep_attention_cap, load_model
from kdcache.pretrained.quantised import require_dense
from kdcache.pretrained.tokenizer import (
    has_tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
    vocabulary_fingerprint,
    vocabulary_size,
)
from kdcache.pretrained.weights import count_parameters

__all__ = [
    "context_length", "count_parameters", "find_device", "fingerprint", "has_tokenizer", "hidden_width",
    "keep_attention_cap", "layer_widths", "load_model", "load_tokenizer", "model_folder", "one_line", "read_config",
    "require_dense", "tokenizer_fingerprint", "vocabulary_fingerprint", "vocabulary_size",
]  # fmt: skip
