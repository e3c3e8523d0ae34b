"""Evaluate: a student's figures over a cache; with a live teacher, the dense ones too.

dense_kl    KL(teacher ‖ student) over the whole vocabulary, mean over positions, nats
acceptance  sum_v min(p_v, q_v), mean over positions: the share of a student's drafts that
            the teacher accepts in speculative decoding (Leviathan et al. 2023,
            arXiv 2211.17192, corollary 3.6)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kdcache.cache import Cache, open_cache
from kdcache.errors import ConfigError, ModelError
from kdcache.isolation import packed_forward
from kdcache.pretrained import find_device, fingerprint, load_model, model_folder
from kdcache.student.data import Rows, batches, labelled, split_heldout
from kdcache.student.measure import measure
from kdcache.student.model import load_student

_TILE = 1 << 22


def evaluate(
    student: str,
    cache: str,
    teacher: str | None = None,
    heldout: float | None = None,
    rows: int | None = None,
    batch_rows: int = 8,
    device: str = "auto",
    local_copy: str | None = None,
    local_limit: str = "20GB",
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure a student on rows of a cache.

    Args:
        student: checkpoint folder or hub name.
        cache: folder or URL of the cache.
        teacher: the cache's teacher, run live for `dense_kl` and `acceptance`.
        heldout: measure only the rows that training holds out at this share.
        rows: measure only so many rows, evenly spread.
        batch_rows: rows a forward pass.
        device: where to run.
        local_copy, local_limit: as for `open_cache`.
        on_progress: called with (rows done, rows to do).

    Raises:
        KdcacheError: see the exception tree.
    """
    opened, where = open_cache(cache, local_copy=local_copy, local_limit=local_limit), find_device(device)
    if rows is not None and rows < 1:
        raise ConfigError(f"--rows is {rows}, but must be at least 1")
    if batch_rows < 1:
        raise ConfigError(f"--batch-rows is {batch_rows}, but must be at least 1")
    if heldout is not None and not 0 < heldout < 1:
        raise ConfigError(f"--heldout is {heldout}, but must lie between 0 and 1")
    chosen: Rows = range(len(opened)) if heldout is None else split_heldout(len(opened), heldout)[1]
    if not len(chosen):
        raise ConfigError(f"the cache {cache} has no rows to measure on")
    if rows is not None and rows < len(chosen):
        chosen = [chosen[i * len(chosen) // rows] for i in range(rows)]
    model = load_student(student, opened, where, seed=0)
    figures = measure(model, opened, chosen, where, batch_rows, on_progress)
    if teacher is not None:
        folder = model_folder(teacher, "teacher")
        if fingerprint(folder) != opened.manifest.teacher_sha256:
            raise ModelError(
                f"the teacher {teacher} is not the one that made {cache}: its weights or configuration differ"
            )
        dtype = "float32" if where.type == "cpu" else "auto"
        figures.update(
            _against(load_model(folder, "teacher", dtype, where).eval(), model, opened, chosen, where, batch_rows)
        )
    return figures


@torch.inference_mode()
def _against(
    teacher: Any, student: Any, cache: Cache, rows: Rows, device: torch.device, batch_rows: int
) -> dict[str, float]:
    vocab = cache.manifest.vocab_size
    kl, acceptance, positions = 0.0, 0.0, 0
    for batch in batches(cache, rows, batch_rows):
        mask = labelled(batch).to(device)
        tokens, places = batch["input_ids"].to(device), batch["position_ids"].to(device)
        both = [packed_forward(m, tokens, places).logits[mask][:, :vocab] for m in (teacher, student)]
        step = max(1, _TILE // vocab)
        for i in range(0, len(both[0]), step):
            p, q = (logits[i : i + step].float().log_softmax(-1) for logits in both)  # [n, V]
            kl += (p.exp() * (p - q)).sum(dtype=torch.float64).item()
            acceptance += torch.minimum(p, q).exp().sum(dtype=torch.float64).item()
        positions += len(both[0])
    return {"dense_kl": kl / max(1, positions), "acceptance": acceptance / max(1, positions)}
