"""A student: made from a checkpoint, a hub name, or a config.json with fresh weights; given adapters; and saved.

Refused: quantised weights, a vocabulary that does not cover the cache's, a tokenizer that gives the cache's ids other
meanings, a context shorter than a row, and any model that lets packed pieces see each other.

Adapters are low-rank updates added to frozen weights (LoRA, Hu et al. 2021, arXiv 2106.09685), by peft. What is saved
is always a plain Hugging Face model with a tokenizer: the student's own if it brings one, else the cache's.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from kdcache.alignment import Alignment
from kdcache.cache import Cache
from kdcache.errors import ConfigError, ModelError
from kdcache.isolation import probe
from kdcache.pretrained import context_length, keep_attention_cap, load_model, model_folder, one_line, require_dense
from kdcache.student.aligned import aligned_tokenizer, student_folder
from kdcache.student.own_tokenizer import read_own_tokenizer, require_unused


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

_TOKENIZER = "tokenizer_files"
"""Attribute of a student: the files of the tokenizer that it brought."""


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
    tokenizer = getattr(model, _TOKENIZER, None)
    if hasattr(model, "merge_and_unload"):
        # By default peft asks the hub whether the embeddings were changed.
        model.save_pretrained(out / ADAPTER, save_embedding_layers=False)
        model = model.merge_and_unload()
    model.save_pretrained(out, state_dict=weights)
    for name, content in (tokenizer or _files(cache)).items():
        (out / name).write_bytes(content)


def _files(cache: Cache) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.tokenizer_path.iterdir()}


def _gathered(model: Any) -> dict[str, Tensor] | None:
    """The whole weights of a sharded model, each tied one once, on rank 0; None for a model that is not sharded."""
    if not isinstance(model, FSDPModule):
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    module: Any = model
    whole: dict[str, Any] = get_model_state_dict(module, options=options)
    return {name: value for name, value in whole.items() if name not in module.all_tied_weights_keys}


def load_student(
    name: str,
    cache: Cache,
    device: torch.device,
    seed: int,
    *,
    mixed: Sequence[Cache] = (),
    trained: bool = True,
    alignment: Alignment | None = None,
) -> Any:
    """A student in float32 on a device, checked against the cache.

    It remembers the files of the tokenizer that it brings, for `save_student`.

    Args:
        name: checkpoint, hub name or config.json.
        cache: what it learns from, or is measured on.
        device: where it goes.
        seed: of the weights that a config.json gets.
        mixed: further caches of a mixture with this one.
        trained: whether it will be trained; a quantised one can only be measured.
        alignment: of the cache's tokenizer and the student's, if these are not one.

    Raises:
        ModelError: it cannot learn from this cache.
        IsolationError: it lets packed pieces see each other.
    """
    path, tokenizer = Path(name).expanduser(), None
    if path.suffix == ".json":
        model = _fresh(path, seed).to(device)
    else:
        folder = model_folder(name, "student")
        if trained:
            require_dense(folder, "student")
        tokenizer = None if alignment is not None else read_own_tokenizer(folder, cache)
        model = load_model(folder, "student", "float32", device)
    rows = cache.row_spec
    if alignment is not None:
        tokenizer = aligned_tokenizer(student_folder(name), cache, alignment)
        rows = dataclasses.replace(rows, vocab_size=alignment.student.vocab_size)
    if tokenizer is not None:
        setattr(model, _TOKENIZER, tokenizer.files)
    if tokenizer is not None and tokenizer.absent:
        require_unused(tokenizer.absent, [cache, *mixed], name)
        _pad_vocabulary(model, rows.vocab_size)
    config = model.config.get_text_config()
    if config.vocab_size < rows.vocab_size:
        whose = "cache's" if alignment is None else "tokenizer's"
        raise ModelError(
            f"the student {name} has a vocabulary of {config.vocab_size}, which does not cover the {whose} "
            f"{rows.vocab_size} ids"
        )
    longest, seq_len = longest_context(model), rows.seq_len
    if alignment is not None and longest is not None:  # its rows have as many tokens as their text
        seq_len = min(seq_len, longest)
    if longest is not None and longest < seq_len:
        raise ModelError(f"the student {name} takes {longest} positions, but a row of the cache has {seq_len}")
    probe(model, rows.vocab_size, seq_len, device, isolate=rows.isolate, packed=rows.packed)
    return model


def longest_context(model: Any) -> int | None:
    """Positions that a model takes; None if it does not say."""
    return context_length(model.config.get_text_config().to_dict())


@torch.no_grad()
def _pad_vocabulary(model: Any, vocab_size: int) -> None:
    """Let a model's vocabulary cover ids that no text of it has; the teacher gives them a little mass all the same.

    The rows that are added are the mean of the others: such an id is then as likely as an average one.
    """
    had = model.get_input_embeddings().weight.shape[0]
    if had >= vocab_size:
        return
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        for weight in (layer.weight, getattr(layer, "bias", None)):
            if weight is not None:
                weight[had:] = weight[:had].mean(0)


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
        else:
            _require_file(Path(name).expanduser())


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"the student's configuration {path} does not exist")


def _fresh(path: Path, seed: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    _require_file(path)
    try:
        set_seed(seed)
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise ModelError(f"no student can be made of {path}: {one_line(error)}") from error
    keep_attention_cap(model)
    return model
