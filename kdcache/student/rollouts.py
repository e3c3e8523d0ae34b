"""Rollouts: what must hold for a run that learns from text that its student's earlier self wrote.

The cache has the log-probability that the writer gave each token (the extra `writer_logp`) and names the writer in
`origin["generated"]`, as `kdcache generate` recorded it. A run refuses

- a cache without those log-probabilities;
- a student that is not that writer: the ratios between them would be those of two models that have nothing to do with
  each other, and clipping would decide every step;
- a student that was itself distilled from another teacher than the one that the cache names: the two objectives have
  different optima (Wu et al. 2026, arXiv 2604.13010, teacher consistency).

What is not recorded is not checked: a cache that other code wrote may name no writer, and most students no teacher.
Cost: hashing the student's weights, once a run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kdcache.errors import ConfigError
from kdcache.extras import WRITER_LOGP
from kdcache.pretrained import fingerprint, model_folder
from kdcache.store.manifest import Manifest

RUN, TEACHERS = "train-student.json", "teachers"
"""Where a student's folder says which teachers it was trained from, by fingerprint."""


def require_rollouts(manifest: Manifest, loss: str) -> None:
    """Refuse a cache whose rows do not know with what probability their tokens were drawn.

    Raises:
        ConfigError: it has no such extra.
    """
    spec = manifest.extra_specs.get(WRITER_LOGP)
    if spec is None or (spec.width, spec.per) != (1, "token"):
        raise ConfigError(
            f"loss {loss} learns from rollouts, but the cache has no {WRITER_LOGP}, the log-probability that the "
            "writer gave each token; dump a corpus that kdcache generate wrote with this student"
        )


def require_writer(manifest: Manifest, student: str, loss: str) -> None:
    """Refuse a student that did not write the rollouts of a cache, or that had another teacher before.

    Refused, too, are rollouts of temperature 0: nothing was drawn, so no ratio corrects which tokens are there.

    Args:
        manifest: of the cache.
        student: a folder, hub name or `config.json`, as a run is given it.
        loss: for the message.

    Raises:
        ConfigError: the cache names another writer or a temperature of 0, or the student another teacher.
        ModelError: the student cannot be found.
    """
    generated = manifest.origin.get("generated")
    generated = generated if isinstance(generated, dict) else {}
    writer = generated.get("writer_sha256")
    if generated.get("temperature") == 0:
        raise ConfigError(
            f"loss {loss} learns from tokens that were drawn, but the rollouts were written with temperature 0; "
            "generate them with another one"
        )
    if Path(student).suffix == ".json":
        if writer is not None:
            raise ConfigError(f"loss {loss} learns from rollouts of the student, but {student} has no weights yet")
        return
    folder = model_folder(student, "student")
    if writer is not None and (own := fingerprint(folder)) != writer:
        raise ConfigError(
            f"loss {loss} learns from rollouts of the student, but the cache names {generated.get('writer')} (sha256 "
            f"{str(writer)[:12]}) as their writer, not {student} ({own[:12]}); begin with that model, or generate again"
        )
    before = _teachers_of(folder)
    if before and manifest.teacher_sha256 not in before:
        raise ConfigError(
            f"the student {student} was distilled from another teacher (sha256 {', '.join(x[:12] for x in before)}) "
            f"than the cache names ({manifest.teacher_sha256[:12]}); for loss {loss} they must be the same"
        )


def _teachers_of(folder: Path) -> list[str]:
    """Fingerprints of the teachers that a student's folder names; none if it does not say."""
    try:
        found: Any = json.loads((folder / RUN).read_text()).get(TEACHERS, [])
    except (OSError, ValueError, AttributeError):
        return []
    return [x for x in found if isinstance(x, str)] if isinstance(found, list) else []
