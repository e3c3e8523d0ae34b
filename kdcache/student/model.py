"""A student: from a checkpoint, a hub name, or a config.json with fresh weights.

Refused with a sentence: a vocabulary that does not cover the cache's, a tokenizer that gives
the cache's ids other meanings, a context shorter than a row, and any model that leaks
between packed pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kdcache.cache import Cache
from kdcache.errors import ConfigError, ModelError
from kdcache.isolation import probe
from kdcache.pretrained import context_length, load_model, load_tokenizer, model_folder, one_line


def load_student(name: str, cache: Cache, device: torch.device, seed: int) -> Any:
    """A student in float32 on a device, checked against the cache.

    Raises:
        ModelError: it cannot learn from this cache.
        IsolationError: it lets packed pieces see each other.
    """
    path = Path(name).expanduser()
    if path.suffix == ".json":
        model = _fresh(path, seed)
    else:
        folder = model_folder(name, "student")
        _require_same_tokens(folder, cache)
        model = load_model(folder, "student", "float32")
    manifest = cache.manifest
    config = model.config.get_text_config()
    if config.vocab_size < manifest.vocab_size:
        raise ModelError(
            f"the student {name} has a vocabulary of {config.vocab_size}, which does not cover the cache's "
            f"{manifest.vocab_size} ids"
        )
    longest = context_length(config.to_dict())
    if longest is not None and longest < manifest.seq_len:
        raise ModelError(f"the student {name} takes {longest} positions, but a row of the cache has {manifest.seq_len}")
    model.to(device)
    probe(model, manifest.vocab_size, manifest.seq_len, device, isolate=manifest.isolate)
    return model


def require_students(names: Sequence[str]) -> None:
    """Refuse a list of students of which one is not there or is named twice, before any of them is loaded.

    Raises:
        ConfigError: named twice.
        ModelError: not there.
    """
    for i, name in enumerate(names):
        if name in names[:i]:
            raise ConfigError(f"the student {name} is named twice")
        if Path(name).suffix != ".json":
            model_folder(name, "student")


def _fresh(path: Path, seed: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    if not path.is_file():
        raise ModelError(f"the student's configuration {path} does not exist")
    try:
        set_seed(seed)
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise ModelError(f"no student can be made of {path}: {one_line(error)}") from error


def _require_same_tokens(folder: Path, cache: Cache) -> None:
    """Where a checkpoint brings a tokenizer, the cache's ids must mean the same tokens in it."""
    if not (folder / "tokenizer.json").is_file():
        return
    theirs = load_tokenizer(folder).get_vocab()
    for token, number in load_tokenizer(cache.tokenizer_path).get_vocab().items():
        if theirs.get(token) != number:
            raise ModelError(
                f"the student {folder} has another tokenizer than the cache: {token!r} is id {number} in the cache "
                f"and {theirs.get(token, 'absent')} in the student"
            )
