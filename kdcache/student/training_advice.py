"""The facts of a training that advice is given on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache.advice import TrainingFacts, of_training
from kdcache.errors import ModelError
from kdcache.pretrained.files import is_gguf, weight_files
from kdcache.pretrained.quantised import quantisation
from kdcache.pretrained.weights import read_headers
from kdcache.student.caches import CacheSource
from kdcache.student.config import TrainConfig

_BY_LABELS = ("label", "label-sample")
"""Tails that need no label term: they teach the label themselves."""


def advise(
    config: TrainConfig, sources: Sequence[CacheSource], model: Any, rows: int, teacher_parameters: int | None
) -> list[str]:
    """What usually goes wrong with a training like this one.

    Args:
        config: of the training.
        sources: its caches.
        model: the student.
        rows: that it will read, each as often as it comes.
        teacher_parameters: None to look for the teacher of the first cache.
    """
    caches = [source.cache for source in sources]
    labels = sum(cache.commits.total("labels") for cache in caches) / max(1, sum(map(len, caches)))
    constant = config.soft_schedule == "constant"
    return of_training(
        TrainingFacts(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            trained=Path(config.start).suffix != ".json",
            adapters=bool(config.lora),
            teacher_parameters=teacher_parameters or _parameters_of(caches[0].manifest.origin.get("teacher")),
            labels=rows * labels,
            truncated=any(c.manifest.width < c.manifest.vocab_size and not c.manifest.rule.sampled for c in caches),
            without_labels=config.soft_weight == 1 and constant and config.tail not in _BY_LABELS,
            lr=config.lr,
        )
    )


def _parameters_of(teacher: Any) -> int | None:
    """Weights in the files of a teacher that is a folder of this machine; None if it cannot be seen."""
    folder = Path(str(teacher or ""))
    try:
        if not folder.is_dir() or is_gguf(folder) or quantisation(folder) is not None:
            return None
        return sum(math.prod(weight.shape) for weight in read_headers(weight_files(folder, "teacher")).values())
    except (ModelError, OSError):
        return None
