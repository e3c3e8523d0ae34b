"""Audit: whether the targets of anyone's cache are what a teacher says, and if not, what is wrong with them.

The teacher is run over a sample of the rows, and what is stored is compared with it under each assumption that tools
get wrong: a slot early or late, pieces that see each other, entries renormalised, softened, rounded to nothing, of
another teacher or tokenizer. Each check has a verdict (`ok`, `fault`, or `unknown` where the cache or the sample cannot
say), a sentence, and its figures.

Cost: one or two forward passes a row of the sample.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import ConfigError, CorpusError
from kdcache.interop.foreign_row import ForeignRow
from kdcache.interop.formats import READ, WEIGHTS, ForeignCache, find_format
from kdcache.pretrained import load_tokenizer, tokenizer_fingerprint, vocabulary_size
from kdcache.report.audit_checks import FAULT, Check, Evidence, check
from kdcache.report.compared_rows import ComparedRow, compare
from kdcache.rows import RowSpec
from kdcache.teacher.engines.base import TeacherSpec, find_engine
from kdcache.teacher.open_teacher import open_teacher
from kdcache.teacher.opened_teacher import OpenedTeacher


def audit(
    path: str,
    teacher: str,
    *,
    as_: str | None = None,
    tokens: str | None = None,
    rows: int = 32,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    engine: str = "transformers",
    engine_options: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare a cache of any tool with a teacher.

    Args:
        path: its file or folder.
        teacher: folder, .gguf file or hub name of the model that is said to have made it.
        as_: its format, one of `formats.READ`; None to find it out.
        tokens: a file with the token ids, for formats that keep none.
        rows: how many sequences the teacher runs over.
        seed: decides which.
        device, dtype, engine: as for a dump.
        engine_options: `engine_python`, `engine_set` and `tokenizer`, see `TeacherSpec`.
        on_progress: called with (rows done, rows to do).

    Returns:
        `cache`, `format`, `teacher`, `rows`, `positions`, `ok` (no check has found a fault), and `checks`, each with
        `name`, `verdict`, `what` (a sentence) and its figures.

    Raises:
        ConfigError: another format, or an option that is missing.
        CorpusError: a cache that cannot be read.
        ModelError: a teacher that cannot be run.
    """
    if rows < 1:
        raise ConfigError(f"rows is {rows}, but must be at least 1")
    form = find_format(as_, READ) if as_ is not None else find_format(guess_format(path), READ)
    cache = form.open(path, tokens)
    spec = TeacherSpec(model=teacher, engine=engine, device=device, dtype=dtype, batch_rows=1, **(engine_options or {}))
    files = find_engine(engine).teacher_files(spec)
    tokenizer = load_tokenizer(files.folder)
    vocabulary = vocabulary_size(tokenizer)
    sample = [_shortened(row, files.context) for row in sample_rows(cache, rows, seed)]
    found = {"cache": path, "format": form.name, "teacher": teacher, "rows": len(sample)}
    foreign = _ids_outside(sample, vocabulary)
    if foreign is not None:
        return {**found, "positions": sum(len(row.slots) for row in sample), "ok": False, "checks": [foreign]}
    longest = max(len(row.tokens) for row in sample)
    with open_teacher(spec, RowSpec(vocab_size=vocabulary, seq_len=max(2, longest))) as opened:
        checks, positions = audit_rows(cache, sample, opened, tokenizer, on_progress)
    return {
        **found, "positions": positions, "ok": all(each["verdict"] != FAULT for each in checks), "checks": checks
    }  # fmt: skip


def guess_format(path: str) -> str:
    """The format of a file or folder, by what is in it.

    Raises:
        ConfigError: it looks like none.
    """
    place = Path(path)
    if "://" in path or (place / "kdcache.json").is_file():
        return "kdcache"
    names = [place.name] if place.is_file() else [each.name for each in place.iterdir()] if place.is_dir() else []
    if any(name.endswith(".tar") for name in names):
        return "megatron"
    if any(name.endswith(".array_record") for name in names):
        return "maxtext"
    if "manifest.json" in names and any(name.endswith(".pt") for name in names):
        return "se-kd"
    if "compression_config.yaml" in names:
        return "distillkit"
    if any(name.endswith((".jsonl", ".ndjson")) or ".jsonl." in name for name in names):
        return "topk-jsonl"
    raise ConfigError(f"as_ is not given, and {path} does not look like any of {', '.join(READ)}; name its format")


def sample_rows(cache: ForeignCache, rows: int, seed: int) -> list[ForeignRow]:
    """Some sequences with targets, of parts of the cache in random order, from the first of each on.

    Raises:
        CorpusError: there is none.
    """
    parts = list(cache.parts())
    order = np.random.default_rng(seed).permutation(len(parts))
    each = -(-rows // max(1, min(rows, len(parts))))
    found: list[ForeignRow] = []
    for number in order.tolist():
        with_targets = (row for row in cache.read(parts[number]) if (row.count > 0).any())
        found += itertools.islice(with_targets, min(each, rows - len(found)))
        if len(found) == rows:
            break
    if not found:
        raise CorpusError("the cache holds no targets")
    return found


def audit_rows(
    cache: ForeignCache,
    sample: Sequence[ForeignRow],
    teacher: OpenedTeacher,
    tokenizer: Any,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Check], int]:
    """The checks of some rows of a cache, and their number of positions.

    Raises:
        CorpusError: no target has a slot before and behind it.
    """
    compared: list[ComparedRow] = []
    for number, row in enumerate(sample):
        if on_progress:
            on_progress(number, len(sample))
        weights = cache.selection if cache.values == WEIGHTS else None
        one = compare(row, teacher, lambda each: _pieces(each, tokenizer), weights, cache.values != WEIGHTS)
        if one is not None:
            compared.append(one)
    if not compared:
        raise CorpusError("no row of the sample has a target with a slot before and behind it")
    evidence = Evidence(compared, cache.values, teacher.rows.vocab_size)
    other = cache.tokenizer_sha256 is not None and cache.tokenizer_sha256 != tokenizer_fingerprint(tokenizer)
    checks = [
        evidence.shift(), evidence.leak(cache.isolated), evidence.teacher(), evidence.tokenizer(other),
        evidence.temperature(), evidence.renormalised(), evidence.tail(), evidence.rounding(),
    ]  # fmt: skip
    return checks, evidence.positions


def _shortened(row: ForeignRow, context: int | None) -> ForeignRow:
    """A row no longer than the teacher's context."""
    if context is None or len(row.tokens) <= context:
        return row
    lengths = row.piece_lengths
    if lengths is not None:
        ends = np.minimum(np.cumsum(lengths), context)
        lengths = np.diff(ends, prepend=0)
        lengths = lengths[lengths > 0]
    kept = row.take(row.slots < context)
    return dataclasses.replace(kept, tokens=row.tokens[:context], piece_lengths=lengths)


def _ids_outside(sample: Sequence[ForeignRow], vocabulary: int) -> Check | None:
    """The fault of ids that the teacher does not have."""
    largest = max(max(int(row.tokens.max()), int(row.ids[row.used].max(initial=0))) for row in sample)
    if largest < vocabulary:
        return None
    return check(
        "tokenizer", FAULT, f"the token id {largest} is outside the teacher's vocabulary of {vocabulary}",
        largest_id=largest, vocabulary=vocabulary,
    )  # fmt: skip


def _pieces(row: ForeignRow, tokenizer: Any) -> NDArray[np.int64]:
    """`[P]` tokens of each piece of a row: as the cache says, else as the tokens that begin or end a document show."""
    if row.piece_lengths is not None:
        return row.piece_lengths
    n = len(row.tokens)
    starts = np.flatnonzero(row.tokens == tokenizer.bos_token_id)
    if not (starts > 0).any():
        starts = np.flatnonzero(row.tokens == tokenizer.eos_token_id) + 1
    cuts = np.unique(np.concatenate([[0], starts[starts < n]]))
    return np.diff(cuts, append=n).astype(np.int64)
