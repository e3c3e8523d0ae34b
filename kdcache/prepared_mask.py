"""A prepared attention mask, for models that take position ids and do not see in them where a piece ends.

transformers makes the mask of packed pieces from position ids that restart, but some models (gpt-oss) do not hand
them to where their mask is made. Such a model gets its mask ready-made, whenever a row holds several pieces and no
other mask is given.

Guarantee: the masks are those that transformers itself makes of the position ids, one for each type of layer of the
model's configuration (full, sliding, chunked), in the form that its attention takes. Whether they keep pieces apart
is not taken for granted: `kdcache.isolation.probe` proves it, or takes them off again.
Cost: `[R, 1, L, L]` numbers for each type of layer: a byte each for `sdpa`, one of the embeddings' dtype for `eager`.
8 rows of 4,096 slots in bfloat16 take 268 MB a type; an attention that needs such a mask takes as much for each head.

Shapes: R rows, L slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def prepare_masks(model: nn.Module) -> RemovableHandle:
    """Give a transformers model its masks from now on, whatever it is wrapped in later; `remove()` ends it."""
    return model.register_forward_pre_hook(_add_mask, with_kwargs=True)


def has_prepared_masks(model: nn.Module) -> bool:
    """Whether `prepare_masks` holds for a model."""
    return _add_mask in model._forward_pre_hooks.values()


def _add_mask(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    positions = kwargs.get("position_ids")
    if positions is None or kwargs.get("attention_mask") is not None or not _restart(positions):
        return None
    from transformers.masking_utils import create_masks_for_generate

    dtype = module.get_input_embeddings().weight.dtype
    masks = create_masks_for_generate(
        config=module.config,
        inputs_embeds=torch.empty((*positions.shape, 0), dtype=dtype, device=positions.device),  # for its shape
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )
    return args, {**kwargs, "attention_mask": masks}


def _restart(positions: Tensor) -> bool:
    """Whether any row holds a second piece."""
    return positions.ndim == 2 and bool((positions.diff(dim=-1) != 1).any())
