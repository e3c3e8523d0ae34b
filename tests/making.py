"""What tests make for themselves: texts, a tokenizer, random models, options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXTS = [
    f"The {animal} {verb} over the {thing} {n} times, and {n % 7} of them were {mood}."
    + (" It was a long day, and nobody could say why." * (n % 5))
    for n, (animal, verb, thing, mood) in enumerate(
        (a, v, t, m)
        for a in ("fox", "cat", "heron", "old dog")
        for v in ("jumped", "looked", "sang")
        for t in ("wall", "river", "gate")
        for m in ("quick", "sad", "bright")
    )
]


TEACHER = {
    "vocab_size": 384,  # padded: the tokenizer has 320
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
STUDENT = {**TEACHER, "num_hidden_layers": 1, "num_key_value_heads": 4, "tie_word_embeddings": True}

ODD = {
    "gpt_oss": {**TEACHER, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8,
                "pad_token_id": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "lfm2": {**TEACHER, "pad_token_id": 0, "layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "mamba": {"vocab_size": 384, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "pad_token_id": 0},
}  # fmt: skip
"""Models that do not see in position ids where a piece ends: by its mask, by convolutions, by a state."""


def make_odd(folder: Path, kind: str) -> Path:
    """A random model of `ODD`, whose layers have weight, and the tests' tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    make_tokenizer(folder)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **ODD[kind]))
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.ndim > 1 and not name.endswith("A_log"):  # what a state decays by
                values.mul_(2 if kind == "mamba" else 4)  # a state adds up what is rounded
    model.save_pretrained(folder)
    return folder


def make_tokenizer(folder: Path, size: int = 320) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(folder: Path, kind: str = "llama", scale: float = 8.0, **changes: Any) -> None:
    """A random model whose logits are spread enough to have peaked and flat positions."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**TEACHER, **changes}))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    model.save_pretrained(folder)


def dump_options(teacher: Path, corpus: Path, out: Path, **changes: Any) -> Any:
    from kdcache.teacher.config import DumpConfig

    options = {
        "seq_len": 64,
        **({} if changes.get("select") in ("sample", "full") else {"k": 8}),
        "temperatures": "1,2",
        "docs_per_shard": 30,
        "batch_rows": 4,
        "device": "cpu",
        "precision": "float32",
    }
    return DumpConfig(**{**options, "teacher": str(teacher), "corpus": str(corpus), "out": str(out), **changes})


def run_dump(options: dict[str, Any]) -> None:
    """A dump for a process of its own that is started without importing anything anew."""
    import torch

    from kdcache.teacher.dump import dump

    torch.set_num_threads(1)
    dump(dump_options(**options))
