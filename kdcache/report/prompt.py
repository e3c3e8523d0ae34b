"""Prompt: the most likely next tokens after a text, of a teacher and some students, side by side.

A live teacher is asked if one is given. Without one the cache may know: if a piece of some row begins with the very
tokens of the prompt and continues, its target there is the teacher's answer to this prompt. Where the teacher reads
more than its student, a live one is told the cache's system prompt first, and the cache's answer is to what the teacher
read before that piece; what that was is said. The students are never told it.

Probabilities are over the cache's vocabulary, at T = 1 unless a sampled cache was drawn at another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from kdcache.cache import Cache, open_cache
from kdcache.corpus.tokenise import Tokeniser
from kdcache.errors import ConfigError
from kdcache.isolation import packed_forward
from kdcache.prefixes import Prefix
from kdcache.pretrained import find_device
from kdcache.report.inspect import added_text
from kdcache.rows import IGNORE
from kdcache.student.model import load_student, require_students
from kdcache.targets import SparseTargets
from kdcache.teacher.engines.base import TeacherSpec
from kdcache.teacher.open_teacher import open_teacher_of

_Entries = list[tuple[int, float]]


def next_tokens(
    students: Sequence[str],
    cache: str,
    text: str,
    teacher: str | None = None,
    top: int = 10,
    device: str = "auto",
    local_copy: str | None = None,
    local_limit: str = "20GB",
    engine: str = "transformers",
    engine_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """The most likely next tokens after a prompt.

    Args:
        students: checkpoint folders or hub names, each once.
        cache: folder or URL of the cache; its tokenizer reads the prompt.
        text: the prompt, tokenised as the start of a plain document.
        teacher: the cache's teacher, run live; without it the cache is searched for the prompt.
        top: tokens to show of each.
        device: where to run.
        local_copy, local_limit: as for `open_cache`.
        engine: what runs the teacher.
        engine_options: its `engine_python`, `engine_set` and `tokenizer`, see `TeacherSpec`.
        on_progress: called with (rows searched, rows of the cache).

    Returns:
        `prompt`, `tokens[{id, text}]`, `teacher{source, row, position, sampled, temperature, told, entries}` and
        `students{NAME: {entries}}` with `entries[{id, text, probability}]`, the most likely first. `source` is
        `live`, `cache`, or None when neither knows, and `entries` is then empty; `told` is the text that the teacher
        alone read before the prompt, or None. Where `sampled` is true the
        teacher's probabilities are the stored weights, unbiased estimates at `temperature`.

    Raises:
        ConfigError: a prompt that is empty or longer than a row, a student named twice, `top` below 1.
        KdcacheError: see the exception tree.
    """
    if top < 1:
        raise ConfigError(f"top is {top}, but must be at least 1")
    require_students(students)
    twice = [name for i, name in enumerate(students) if name in students[:i]]
    if twice:
        raise ConfigError(f"the student {twice[0]} is named twice")
    if not text:
        raise ConfigError("prompt is empty, but must hold at least one token")
    opened, where = open_cache(cache, local_copy=local_copy, local_limit=local_limit), find_device(device)
    tokenizer = opened.load_tokenizer()
    system = opened.manifest.teacher_context.get("system")
    tokeniser = Tokeniser(tokenizer, opened.manifest.vocab_size, teacher_system=system)
    tokens, longest = tokeniser.prompt(text), opened.manifest.teacher_row_spec.seq_len
    if not tokens:
        raise ConfigError(f"the prompt {text!r} holds no token of the cache's tokenizer")
    if len(tokens) > opened.manifest.seq_len:
        raise ConfigError(f"the prompt has {len(tokens)} tokens, but a row of the cache has {opened.manifest.seq_len}")

    def shown(found: _Entries) -> list[dict[str, Any]]:
        return [{"id": i, "text": added_text(tokenizer, tokens, i), "probability": p} for i, p in found]

    answer: dict[str, Any] = {"source": None, "row": None, "position": None, "sampled": False, "temperature": 1.0}
    answer.update(told=None, entries=[])
    if teacher is not None:
        read = tokeniser.teacher_prompt(text)
        if len(read) > longest:
            raise ConfigError(f"the teacher would read {len(read)} tokens with its system prompt, above its {longest}")
        spec = TeacherSpec(model=teacher, engine=engine, device=device, **(engine_options or {}))
        with open_teacher_of(spec, opened.manifest, opened.storage) as live:
            answer.update(source="live", told=system, entries=shown(_most_likely(live.next_logits(read), top)))
    elif (place := find_prompt(opened, tokens, on_progress)) is not None:
        row, position, target, prefix = place
        answer.update(
            source="cache", row=row, position=position, sampled=target.sampled,
            temperature=target.sample_temperature, entries=shown(_largest(target, top)),
            told=tokenizer.decode(prefix.tokens) if len(prefix.tokens) else None,
        )  # fmt: skip
    answers = {}
    for name in students:
        model = load_student(name, opened, where, seed=0, trained=False).eval()
        answers[name] = {"entries": shown(_ask(model, opened, tokens, top, where))}
    return {
        "cache": cache,
        "prompt": text,
        "tokens": [{"id": t, "text": added_text(tokenizer, tokens[:i], t)} for i, t in enumerate(tokens)],
        "teacher": answer,
        "students": answers,
    }


def find_prompt(
    cache: Cache, tokens: Sequence[int], on_progress: Callable[[int, int], None] | None = None
) -> tuple[int, int, SparseTargets, Prefix] | None:
    """The first place where a context is exactly these tokens and the teacher's answer is stored.

    Returns:
        Row, slot, target `[]`, and what the teacher read before it; or None if no row has it.
    """
    wanted, seq_len = np.asarray(tokens), cache.manifest.seq_len
    for number, (row, targets) in enumerate(cache.read_rows(range(len(cache)))):
        if on_progress:
            on_progress(number, len(cache))
        start = 0
        lengths = row.piece_lengths.tolist() if cache.manifest.isolate else [len(row.tokens)]
        for piece, length in enumerate(lengths):
            slot = start + len(wanted) - 1
            if len(wanted) < length and (row.tokens[start : slot + 1] == wanted).all():
                labels = row.labels(seq_len)
                target = targets[int((labels[:slot] != IGNORE).sum())] if labels[slot] != IGNORE else None
                if target is not None and int(target.count):
                    return number, slot, target, row.prefix(piece)
            start += length
    return None


@torch.inference_mode()
def _ask(model: Any, cache: Cache, tokens: Sequence[int], top: int, device: torch.device) -> _Entries:
    ids = torch.tensor([tokens], device=device)
    logits = packed_forward(model, ids, torch.arange(len(tokens), device=device)[None]).logits[0, -1]
    return _most_likely(logits[: cache.manifest.vocab_size], top)


def _most_likely(logits: torch.Tensor, top: int) -> _Entries:
    likely = logits.float().softmax(-1).topk(min(top, len(logits)))
    return list(zip(likely.indices.tolist(), likely.values.tolist(), strict=True))


def _largest(target: SparseTargets, top: int) -> _Entries:
    count = int(target.count)
    order = target.weights[:count].argsort(descending=True, stable=True)[:top]
    return list(zip(target.ids[order].tolist(), target.weights[order].tolist(), strict=True))
