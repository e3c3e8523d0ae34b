"""Peak resident memory: `[rows, slots, vocabulary]` exists nowhere in a run, nor the logits of a batch in its loss."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import head
from kdcache.teacher.dump import dump
from tests.making import STUDENT, TEACHER, dump_options

VOCAB, ROWS, SLOTS = 152_064, 8, 1024
TINY = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
    "max_position_embeddings": SLOTS, "num_hidden_layers": 1, "tie_word_embeddings": True, "vocab_size": VOCAB,
}  # fmt: skip


def make_large_teacher(folder: Path) -> None:
    """A random teacher and a tokenizer of one token a word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    words = {"<s>": 0, "</s>": 1, **{f"w{i}": i for i in range(2, VOCAB)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **{**TEACHER, **TINY})).save_pretrained(folder)


@pytest.mark.long
def test_training_with_a_large_vocabulary(cache: Path, tmp_path: Path) -> None:
    """Above weights, gradients and optimiser: under 1/8 of one float32 [8, 1024, 152064], held-out rows included."""
    make_large_teacher(tmp_path / "teacher")
    corpus, words = tmp_path / "c.jsonl", SLOTS - 2
    lines = [" ".join(f"w{2 + (7919 * (i + words * n)) % (VOCAB - 2)}" for i in range(words)) for n in range(2 * ROWS)]
    corpus.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    dump(dump_options(tmp_path / "teacher", corpus, tmp_path / "c", seq_len=SLOTS, docs_per_shard=2 * ROWS))
    student = tmp_path / "student.json"
    student.write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], **TINY}))
    (tmp_path / "small.json").write_text(json.dumps({"model_type": "llama", **STUDENT}))
    command = [sys.executable, "-m", "tests.student.memory", *map(str, (cache, tmp_path / "c", student, tmp_path))]
    subprocess.run(command, capture_output=True, check=True)
    found = json.loads((tmp_path / "memory.json").read_text())
    assert found["weights"] > 4 * VOCAB * TINY["hidden_size"]
    # two moments, weights and gradients; the run's own weights are not there before it
    assert found["peak"] - 4 * found["weights"] < 4 * ROWS * SLOTS * VOCAB / 8, found


@pytest.mark.long
def test_the_head_takes_a_sixteenth_of_what_cross_entropy_does() -> None:
    """On the same positions, above the gradients that both leave behind; each in a fresh process."""
    above = {}
    for way in head.WAYS:
        peak, gradients = head.in_fresh_process(way, "cpu", 32_000, "forward-kl")
        above[way] = peak - gradients
    assert above["cross-entropy"] > 4 * 2048 * 32_000  # its logits, at the least
    assert 16 * above["ours"] <= above["cross-entropy"], above
