"""A student: made from a checkpoint, a hub name, or a config.json with fresh weights; given adapters; and saved.

Refused: a vocabulary that does not cover the cache's, a tokenizer that gives the cache's ids other
meanings, a context shorter than a row, and any model that lets packed pieces see each other.

Adapters are low-rank updates added to frozen weights (LoRA, Hu et al. 2021, arXiv 2106.09685), by peft. What is saved
is always a plain Hugging Face model with the cache's tokenizer.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from kdcache.cache import Cache
from kdcache.errors import ConfigError, ModelError
from kdcache.isolation import probe
from kdcache.pretrained import context_length, keep_attention_cap, load_model, load_tokenizer, model_folder, one_line


def with_adapters(model: Any, rank: int, seed: int) -> Any:
    """The model with adapters of one rank on each linear layer but its output head; only they are trained.

    The update is scaled by alpha / rank = 2. It starts at nothing: the model's logits are what they were.

    Args:
        model: a transformers causal language model; its layers are replaced in place.
        rank: of each update.
        seed: of the adapters' first factors.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():  # peft asks for an attribute by a name that transformers has given up
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        return get_peft_model(model, config)


ADAPTER = "adapter"


def save_student(model: Any, cache: Cache, out: Path | str) -> None:
    """Write a student that needs nothing else to be loaded. Every rank must call it: sharded weights are gathered.

    Adapters of peft are merged into the weights, which changes the model, and also written by themselves, into
    `adapter/`.

    Args:
        model: the student, not wrapped; sharded by FSDP2 or not.
        cache: what it learned from.
        out: a folder; created if there is none.
    """
    out = Path(out)
    weights = _gathered(model)
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    if hasattr(model, "merge_and_unload"):
        # By default peft asks the hub whether the embeddings were changed.
        model.save_pretrained(out / ADAPTER, save_embedding_layers=False)
        model = model.merge_and_unload()
    model.save_pretrained(out, state_dict=weights)
    for path in cache.tokenizer_path.iterdir():
        shutil.copyfile(path, out / path.name)


def _gathered(model: Any) -> dict[str, Tensor] | None:
    """The whole weights of a sharded model, each tied one once, on rank 0; None for a model that is not sharded."""
    if not isinstance(model, FSDPModule):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    module: Any = model
    whole: dict[str, Any] = get_model_state_dict(module, options=options)
    return {name: value for name, value in whole.items() if name not in module.all_tied_weights_keys}


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
    rows = manifest.row_spec
    probe(model, rows.vocab_size, rows.seq_len, device, isolate=rows.isolate, packed=rows.packed)
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
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise ModelError(f"no student can be made of {path}: {one_line(error)}") from error
    keep_attention_cap(model)
    return model


def _require_same_tokens(folder: Path, cache: Cache) -> None:
    """Where a checkpoint brings a tokenizer, the cache's ids must mean the same tokens in it."""
    if not (folder / "tokenizer.json").is_file() or not cache.manifest.tokenizer_files:
        return
    theirs = load_tokenizer(folder).get_vocab()
    for token, number in cache.load_tokenizer().get_vocab().items():
        if theirs.get(token) != number:
            raise ModelError(
                f"the student {folder} has another tokenizer than the cache: {token!r} is id {number} in the cache "
                f"and {theirs.get(token, 'absent')} in the student"
            )
