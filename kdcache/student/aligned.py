"""Runs with `align`: what the student's tokenizer must be, and which losses there are.

Everything that can be refused before the training is refused here: a cache or a student without a tokenizer, tokens
whose bytes are not known, a loss that needs the student's labels among the teacher's ids, sampled targets of a
vocabulary that the student's does not hold, and, after some rows were tried, tokenizers without a common boundary.
"""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache.alignment import AlignedRows, Alignment, read_student_tokenizer
from kdcache.cache import Cache
from kdcache.errors import ConfigError
from kdcache.losses import Objective
from kdcache.pretrained import model_folder
from kdcache.student.caches import CacheSource
from kdcache.student.config import TrainConfig
from kdcache.student.own_tokenizer import FILES, OwnTokenizer


def student_folder(name: str) -> Path:
    """Where the tokenizer of a student is: in its checkpoint's folder, or beside its config.json.

    Raises:
        ModelError: there is no such checkpoint.
    """
    path = Path(name).expanduser()
    return path.parent if path.suffix == ".json" else model_folder(name, "student")


def align_sources(sources: Sequence[CacheSource], config: TrainConfig) -> tuple[CacheSource, ...]:
    """The caches of a run, read as rows of its student.

    Raises:
        ConfigError, ModelError: see the module.
    """
    name = config.start
    alignment = Alignment(sources[0].cache, read_student_tokenizer(name, student_folder(name)))
    objective = Objective(loss=config.loss, tail=config.tail)
    if objective.takes_rollouts:
        raise ConfigError(f"align and loss {config.loss} exclude each other: rollouts are tokens of their writer")
    if not alignment.vocabularies.alike and config.soft_weight > 0:
        _require_loss(objective, config, sources[0].cache, alignment)
    return tuple(dataclasses.replace(source, alignment=alignment) for source in sources)


def _require_loss(objective: Objective, config: TrainConfig, cache: Cache, alignment: Alignment) -> None:
    manifest = cache.manifest
    if objective.takes_label_entry:
        raise ConfigError(
            f"loss {config.loss} needs each label among the teacher's ids, but the student {config.start} has others"
        )
    if not objective.takes_entries:
        return
    if manifest.rule.sampled and not alignment.complete:
        raise ConfigError(
            f"loss {config.loss} of sampled targets ({manifest.rule.kind}) needs every token of the teacher in the "
            f"student's vocabulary, but {alignment.vocabularies.overlap.share:.1%} of them are; use loss alm, or a "
            "cache of topk targets"
        )
    for t in config.temperature_ends():
        if t not in manifest.temperatures and not objective.any_temperature:
            stored = ", ".join(f"{each:g}" for each in manifest.temperatures)
            raise ConfigError(f"temperature {t:g} is not exact with align: the cache stores temperature(s) {stored}")


def require_aligned(sources: Sequence[CacheSource], config: TrainConfig) -> None:
    """Try some rows of each cache.

    Raises:
        ConfigError: the tokenizers share no byte boundary.
        ModelError: the student cannot be given the text of a row.
    """
    for source in sources:
        rows = source.rows
        if isinstance(rows, AlignedRows) and config.soft_weight > 0:
            rows.require_aligned()


def aligned_tokenizer(folder: Path, cache: Cache, alignment: Alignment) -> OwnTokenizer:
    """The files of a student's tokenizer, with the cache's chat template if it has none and knows its special tokens.

    Args:
        folder: of the tokenizer.
        cache: what the student learns from.
        alignment: of both.
    """
    own, template = alignment.student.tokenizer, _template(cache)
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    if not files:  # inside a .gguf file
        with tempfile.TemporaryDirectory() as made:
            own.save_pretrained(made)
            files = {path.name: path.read_bytes() for path in Path(made).iterdir()}
    if template is not None and own.chat_template is None:
        known = own.get_vocab()
        named = [text for text in cache.load_tokenizer().get_added_vocab() if text in template]
        missing = [text for text in named if text not in known]
        if missing:
            warnings.warn(
                f"the student {alignment.student.name} gets no chat template: that of the cache writes {missing[0]!r}, "
                "which its tokenizer has not",
                stacklevel=2,
            )
        else:
            files["chat_template.jinja"] = template.encode()
    return OwnTokenizer(files)


def _template(cache: Cache) -> str | None:
    found: Any = cache.load_tokenizer().chat_template
    return found if isinstance(found, str) else None
