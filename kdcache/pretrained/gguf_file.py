"""A model in one .gguf file: weights, tokenizer and chat template, as llama.cpp and Ollama take them.

transformers dequantises it. It leaves out what it does not know without a word, so here is checked that every tensor is
in the model, that positions are rotated as the file says, and that text is split as the file's tokenizer splits it.
Cost: the file's list of tokens is read in Python, 1 to 4 s, once a process.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kdcache.errors import ModelError, one_line
from kdcache.lazy_torch import torch

_ROPE = "rope_freqs.weight"

_DIGITS = ("codeshell", "command-r", "exaone", "minerva-7b", "refact", "smollm", "starcoder")
"""Rules of splitting that take each digit by itself, and then split as GPT-2 does."""

_GPT2 = ("gpt-2", "jais", "mpt", "olmo", "phi-2")
"""Rules of splitting that are that of GPT-2."""

_SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""What transformers calls a special token, and what a file does."""


@dataclass(frozen=True)
class Facts:
    """What a file says.

    Attributes:
        architecture: such as `llama`.
        fields: plain values by name; long lists are left out.
        tokens: how many tokens its tokenizer has.
        elements: number of weights in each tensor.
        rotations: factors by which the wavelengths of the rotary positions are stretched; None if there are none.
    """

    architecture: str
    fields: dict[str, Any]
    tokens: int
    elements: dict[str, int] = field(repr=False)
    rotations: tuple[float, ...] | None = None


def require_gguf_package(path: Path) -> None:
    """Refuse a .gguf file where the package that reads it is missing.

    Raises:
        ModelError: it is not installed.
    """
    if find_spec("gguf") is None:
        raise ModelError(f"{path} needs the package gguf, which is not installed: pip install 'kdcache[gguf]'")


def read_facts(path: Path) -> Facts:
    """What a file says.

    Raises:
        ModelError: it is not a GGUF file, or the package that reads it is missing.
    """
    require_gguf_package(path)
    return _read_facts(str(path), path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _read_facts(path: str, _changed: int) -> Facts:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
        fields = {
            name: value.contents()
            for name, value in reader.fields.items()
            if len(value.data) <= 16 or value.types[0].name == "STRING"
        }
        tokens = reader.fields.get("tokenizer.ggml.tokens")
        factors = [tensor for tensor in reader.tensors if tensor.name == _ROPE]
        return Facts(
            architecture=str(fields["general.architecture"]),
            fields=fields,
            tokens=0 if tokens is None else len(tokens.data),
            elements={tensor.name: int(tensor.n_elements) for tensor in reader.tensors},
            rotations=tuple(float(x) for x in factors[0].data.ravel()) if factors else None,
        )
    except Exception as error:
        raise ModelError(f"{path} is not a GGUF file that can be read: {one_line(error)}") from error


def require_file_is_model(path: Path, model: Any) -> None:
    """Refuse a model that is not all of its file, and rotate its positions as the file says.

    Raises:
        ModelError: weights of the file are not in the model, or it scales positions in a way that was not taken up.
    """
    facts = read_facts(path)
    tied = model.get_output_embeddings() is not None and (
        model.get_output_embeddings().weight is model.get_input_embeddings().weight
    )
    left_out = {_ROPE, *(["output.weight"] if tied else [])}
    held = sum(count for name, count in facts.elements.items() if name not in left_out)
    taken = sum(parameter.numel() for parameter in model.parameters())  # a tied one counts once
    if held != taken:
        raise ModelError(f"{path} holds {held} weights, but transformers made a model of {taken} of it")
    scaling = facts.fields.get(f"{facts.architecture}.rope.scaling.type", "none")
    plain = (model.config.get_text_config().to_dict().get("rope_parameters") or {}).get("rope_type", "default")
    if scaling != "none" and plain == "default":
        raise ModelError(
            f"{path} scales its positions ({scaling}), which transformers does not take up from a GGUF file"
        )
    if facts.rotations is not None and not all(math.isclose(factor, 1) for factor in facts.rotations):
        _stretch(path, model, facts.rotations)


def _stretch(path: Path, model: Any, factors: tuple[float, ...]) -> None:
    """Rotate positions by frequencies divided by the file's factors (Llama 3.1), which transformers leaves out."""
    rotary = [part for part in model.modules() if isinstance(getattr(part, "inv_freq", None), torch.Tensor)]
    if len(rotary) != 1 or rotary[0].inv_freq.shape != (len(factors),) or rotary[0].rope_type != "default":
        raise ModelError(f"{path} stretches its rotary positions ({_ROPE}), and its architecture has no place for it")
    stretch = torch.tensor(factors, dtype=torch.float64)
    frequencies = (rotary[0].inv_freq.double().cpu() / stretch).to(rotary[0].inv_freq)
    rotary[0].inv_freq = frequencies
    if hasattr(rotary[0], "original_inv_freq"):
        rotary[0].original_inv_freq = frequencies


def make_tokenizer(path: Path, made: Any) -> Any:
    """The tokenizer of a file, with its tokens and no other, and text split by the rule that it names.

    Args:
        path: of the file.
        made: what transformers made of it: it adds tokens that its classes want, and splits text as GPT-2 does where it
            does not know the rule.

    Raises:
        ModelError: nobody here knows the rule, or the tokens of the file are not there.
    """
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import gguf_tokenizer_mapping

    known = getattr(gguf_tokenizer_mapping, "GGUF_PRE_TOKENIZER_SPLITS", {})  # 5.17 has none
    facts = read_facts(path)
    parts = json.loads(made.backend_tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["id"] < facts.tokens]
    backend = Tokenizer.from_str(json.dumps(parts))
    if backend.get_vocab_size() != facts.tokens:
        raise ModelError(
            f"the tokenizer in {path} has {facts.tokens} tokens, but transformers finds {backend.get_vocab_size()}"
        )
    rule = facts.fields.get("tokenizer.ggml.pre")
    by_rule = facts.fields.get("tokenizer.ggml.model") == "gpt2" and rule not in _GPT2
    if by_rule and rule not in known:
        if rule not in _DIGITS:
            raise ModelError(
                f"the tokenizer in {path} splits text by the rule {rule!r}, which is not known here; take the model in "
                "safetensors format"
            )
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    special = {name: facts.fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=made.chat_template,
        **{f"{name}_token": backend.id_to_token(number) for name, number in special.items() if number is not None},
    )


def require_round_trip(path: Path, tokenizer: Any, text: str) -> None:
    """Refuse a tokenizer that does not give back the text that it was given; a file has no ids to compare with.

    Args:
        path: of the file.
        tokenizer: what was made of it.
        text: to encode and to decode again.

    Raises:
        ModelError: naming what differs.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    again = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    if again != text and again != f" {text}" and tokenizer.unk_token_id not in ids:
        at = next(i for i, (a, b) in enumerate(zip(f"{again}\0", f"{text}\0", strict=False)) if a != b)
        raise ModelError(
            f"the tokenizer in {path} does not give back what it was given: {text[at : at + 8]!r} becomes "
            f"{again[at : at + 8]!r}"
        )
