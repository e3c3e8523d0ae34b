"""The facts of a training that advice is given on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdcache.advice import TrainingFacts, of_training
from kdcache.losses.rollout_loss import read_clip
from kdcache.store.manifest import Manifest
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
        teacher_parameters: None to take what the first cache says of its teacher.
    """
    caches = [source.cache for source in sources]
    labels = sum(cache.commits.total("labels") for cache in caches) / max(1, sum(map(len, caches)))
    constant = config.soft_schedule == "constant"
    of_a_student = read_clip(config.loss) is not None or any(_written_by_a_student(c.manifest) for c in caches)
    return of_training(
        TrainingFacts(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            trained=Path(config.start).suffix != ".json",
            adapters=bool(config.lora),
            teacher_parameters=teacher_parameters or _recorded(caches[0].manifest.origin.get("teacher_parameters")),
            labels=rows * labels,
            truncated=any(c.manifest.width < c.manifest.vocab_size and not c.manifest.rule.sampled for c in caches),
            without_labels=config.soft_weight == 1 and constant and config.tail not in _BY_LABELS and not of_a_student,
            lr=config.lr,
        )
    )


def _written_by_a_student(manifest: Manifest) -> bool:
    """Whether another model than the teacher wrote the text: no label term is missing, for its labels teach nothing."""
    generated = manifest.origin.get("generated")
    writer = generated.get("writer_sha256") if isinstance(generated, dict) else None
    return writer is not None and writer != manifest.teacher_sha256


def _recorded(count: Any) -> int | None:
    return count if type(count) is int and count > 0 else None
