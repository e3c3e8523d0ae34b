"""A trained student on disk: a plain Hugging Face model with the cache's tokenizer, however it was trained."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from kdcache.cache import Cache

ADAPTER = "adapter"


def save_student(model: Any, cache: Cache, out: Path | str) -> None:
    """Write a student that stands on its own. Every rank must call it: sharded weights are gathered.

    Adapters of peft are merged into the weights, which changes the model, and also written by themselves, into
    `adapter/`.

    Args:
        model: the student, not wrapped; sharded by FSDP2 or not.
        cache: what it learned from.
        out: a folder; made if need be.
    """
    out = Path(out)
    weights = _gathered(model)
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    if hasattr(model, "merge_and_unload"):
        # Unless told, peft asks the hub whether the embeddings were changed.
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
