"""Adapters: low-rank updates beside frozen weights (LoRA, Hu et al. 2021, arXiv 2106.09685), by peft."""

from __future__ import annotations

import warnings
from typing import Any


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
