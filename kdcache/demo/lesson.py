"""A lesson: a teacher, a student at its start, and the texts that it learns from. There are two.

`pretrained_lesson`: SmolLM2-135M-Instruct, and the student is 6 of its 30 layers. It reads about 40 thousand tokens of
Python's manuals, fewer where the teacher would take too long.
`own_lesson`: a small teacher that is trained here, on three quarters of the manuals, and a smaller student with random
weights. The rest of the manuals, which the teacher was not trained on, is the corpus.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from kdcache.corpus.packing import pack
from kdcache.corpus.tokenise import Tokeniser
from kdcache.demo.manuals import manuals
from kdcache.demo.model import llama_config, train_teacher, train_tokenizer, write_config
from kdcache.demo.smollm2 import NAME
from kdcache.demo.stages import Stages
from kdcache.isolation import packed_forward
from kdcache.pretrained import load_model, load_tokenizer
from kdcache.student.from_teacher.config import MakeStudentOptions
from kdcache.student.from_teacher.make import make_student

LAYERS = "0,1,9,19,28,29"
"""Of SmolLM2's 30: the first and the last ones, without which a model says nothing, and two between."""

_POSITIONS = 40_000
_LEAST_POSITIONS = 2_048
_DUMP_SHARE = 0.25
"""Of the budget: the teacher's forward passes over the corpus. Selection and writing come on top."""

_BATCH_ROWS = 8
"""Rows of a forward pass; the default of a dump."""

_STUDENT_SHARE = 0.25
"""Of the documents: the teacher that is trained here does not see them."""
_TEACHER_SHARE = 0.68
"""Of the budget: to train that teacher."""


@dataclass(frozen=True)
class Lesson:
    """What a dump and two trainings need.

    Attributes:
        about: who teaches whom, in a sentence.
        pretrained: whether the teacher was fetched.
        teacher: the teacher's folder.
        student: a checkpoint folder, or a config.json for random weights.
        corpus: a .jsonl file of texts.
        seq_len: tokens a row.
        lr: peak learning rate of the students.
        prompt: what teacher and students are asked to go on with.
    """

    about: str
    pretrained: bool
    teacher: Path
    student: Path
    corpus: Path
    seq_len: int
    lr: float
    prompt: str


def pretrained_lesson(file: Path, folder: Path, seed: int, stages: Stages) -> Lesson:
    """SmolLM2 teaches 6 of its own layers.

    Args:
        file: its .gguf file.
        folder: where everything goes.
        seed: of the order of the documents.
        stages: where times and progress go; the budget decides how long the corpus is.

    Raises:
        ModelError: the file cannot be read.
        CacheError: a folder cannot be written.
    """
    seq_len, teacher, student = 128, folder / "teacher", folder / "student"
    with stages.stage(
        "teacher"
    ):  # as a folder: a .gguf file takes ten times as long to load, and is loaded three times
        stages.progress("unpacking the teacher")(0, 1)
        whole = make_student(MakeStudentOptions(teacher=str(file), out=str(teacher), device="cpu"))
    with stages.stage("student"):
        stages.progress("cutting the student out of its teacher")(0, 1)
        made = make_student(MakeStudentOptions(teacher=str(teacher), out=str(student), layers=LAYERS, device="cpu"))
    with stages.stage("corpus") as entry:
        stages.progress("reading the corpus")(0, 1)
        affordable = int(_DUMP_SHARE * stages.seconds * _positions_per_second(teacher, seq_len))
        entry["positions"] = max(_LEAST_POSITIONS, min(_POSITIONS, affordable))
        texts, tokenizer, tokens = [], load_tokenizer(teacher), 0
        for text in _shuffled(manuals(), seed):
            texts.append(text)
            tokens += len(tokenizer(text)["input_ids"])
            if tokens >= entry["positions"]:
                break
        corpus = _write(texts, folder)
    about = (
        f"{NAME} ({whole['parameters']['teacher'] / 1e6:.1f}M parameters) teaches {len(made['layers'])} of its "
        f"{made['sizes']['teacher']['layers']} layers ({made['parameters']['student'] / 1e6:.1f}M)"
    )
    return Lesson(about, True, teacher, student, corpus, seq_len, 1e-3, "The capital of France is")


def own_lesson(folder: Path, seed: int, stages: Stages) -> Lesson:
    """A teacher that is trained here teaches a smaller model with random weights.

    Args:
        folder: where everything goes.
        seed: of the split, the weights and the order of rows.
        stages: where times and progress go; most of the budget trains the teacher.
    """
    seq_len, teacher, student = 256, folder / "teacher", folder / "student.json"
    with stages.stage("corpus"):
        texts = _shuffled(manuals(), seed)
        cut = round(_STUDENT_SHARE * len(texts))
        corpus = _write(texts[:cut], folder)
    with stages.stage("tokenizer"):
        tokenizer = train_tokenizer(texts, teacher)
        rows = pack(Tokeniser(tokenizer, len(tokenizer)).texts(list(enumerate(texts[cut:]))), seq_len).rows
    with stages.stage("teacher") as entry:
        entry["steps"] = train_teacher(
            rows, llama_config(192, 4, seq_len), teacher, seconds=_TEACHER_SHARE * stages.seconds, most_steps=3000,
            seed=seed, seq_len=seq_len, on_progress=stages.progress("training the teacher"),
        )  # fmt: skip
    write_config(llama_config(96, 2, seq_len), student)
    about = (
        "a teacher of 4 layers, trained here on the same kind of text, teaches a student of 2 layers and half its width"
    )
    return Lesson(about, False, teacher, student, corpus, seq_len, 3e-3, "Return True if the")


def _positions_per_second(folder: Path, seq_len: int) -> float:
    """How fast the teacher reads here: one batch, after a row that is not timed."""
    model, positions = load_model(folder, "teacher", "float32").eval(), torch.arange(seq_len).expand(_BATCH_ROWS, -1)
    with torch.inference_mode():
        packed_forward(model, torch.zeros_like(positions[:1]), positions[:1])
        started = time.perf_counter()
        packed_forward(model, torch.zeros_like(positions), positions)
    return positions.numel() / (time.perf_counter() - started)


def _shuffled(texts: Sequence[str], seed: int) -> list[str]:
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]


def _write(texts: Sequence[str], folder: Path) -> Path:
    corpus = folder / "student-corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return corpus
