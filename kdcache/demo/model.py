"""A small tokenizer and a small Llama-shaped teacher, trained on this machine in minutes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.isolation import packed_forward
from kdcache.rows import IGNORE, PackedRow, position_ids

VOCAB = 2048


def train_tokenizer(texts: Sequence[str], folder: Path) -> Any:
    """A byte-level BPE tokenizer that ends every document with `<|end|>`; saved to a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="$A <|end|>", special_tokens=[("<|end|>", backend.token_to_id("<|end|>"))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def llama_config(hidden: int, layers: int, seq_len: int) -> dict[str, Any]:
    """A Llama-shaped configuration over the demo's vocabulary."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 16 * 16,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 32,
        "max_position_embeddings": seq_len,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


def train_teacher(
    rows: Sequence[PackedRow],
    config: dict[str, Any],
    folder: Path,
    *,
    seconds: float,
    most_steps: int,
    seed: int,
    seq_len: int,
    on_progress: Callable[[int, int], None],
) -> int:
    """Train a teacher on packed rows until its time or its steps are used up; returns the steps.

    The learning rate falls with whichever of the two runs out first.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    set_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    random, started, step = np.random.default_rng(seed), time.perf_counter(), 0
    while (spent := max(step / most_steps, (time.perf_counter() - started) / seconds)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 50) * min(1.0, max(0.02, (1 - spent) / 0.5))
        batch = [rows[i] for i in random.integers(0, len(rows), 8)]
        tokens = torch.from_numpy(np.stack([row.padded_tokens(seq_len) for row in batch]))
        labels = torch.from_numpy(np.stack([row.labels(seq_len) for row in batch]))
        positions = torch.from_numpy(position_ids(np.stack([row.segments(seq_len) for row in batch])))
        logits = packed_forward(model, tokens, positions).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        on_progress(int(1000 * spent), 1000)
    model.save_pretrained(folder)
    return step


def write_config(config: dict[str, Any], path: Path) -> None:
    """A student's config.json."""
    path.write_text(json.dumps(config, indent=2) + "\n")
