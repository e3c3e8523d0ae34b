"""Measure: a student's figures over rows of a cache, all at T = 1.

`nll` is a mean over all labelled positions; the others compare with the teacher, so they are means over the positions
that carry a target, `targets` of them, and None where there is none.

    nll             of the true next token under the student, nats
    teacher_nll     the same under the teacher, from the cache
    delta_nll       the student's less the teacher's
    kl              KL(teacher ‖ student); its kind is in `kl_kind`: `dense` when the cache keeps
                    everything, `lower-bound` when the tail is one bucket (not comparable across k),
                    `estimate` when the targets are sampled: unbiased, with `kl_standard_error` from its spread
                    over positions; None if they were sampled at another temperature
    top1_agreement  share of positions where both prefer the same token

Sums are kept in float64, so the order of batches does not show.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kdcache.cache import Cache
from kdcache.errors import ConfigError
from kdcache.isolation import packed_forward
from kdcache.losses import measure_positions
from kdcache.student.data import batches, labelled
from kdcache.targets import SAMPLED_KINDS


def measure(
    model: Any,
    cache: Cache,
    rows: Sequence[int],
    device: torch.device,
    batch_rows: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Figures of a student over rows of a cache; see the module for what they mean.

    Raises:
        ConfigError: no row carries a label.
    """
    sums: dict[str, float] = {}
    positions = targets = done = 0
    training = model.training
    model.eval()
    with torch.inference_mode():
        for batch in batches(cache, rows, batch_rows):
            mask = labelled(batch)
            logits = packed_forward(model, batch["input_ids"].to(device), batch["position_ids"].to(device)).logits
            logits = logits[mask.to(device)][:, : cache.manifest.vocab_size].float()  # [M, V]
            figures = measure_positions(logits, batch["targets"].to(device), batch["labels"][mask].to(device))
            figures["nll_at_targets"] = figures["nll"] * figures.pop("has_target")
            if "kl" in figures:
                figures["kl_square"] = figures["kl"].double().square()
            for name, values in figures.items():
                sums[name] = sums.get(name, 0.0) + values.double().sum().item()
            positions += int(mask.sum())
            targets += int((batch["targets"].count > 0).sum())
            done += len(mask)
            if on_progress:
                on_progress(done, len(rows))
    model.train(training)
    if not positions:
        raise ConfigError(f"the {len(rows)} row(s) to measure on carry no label; hold out more, or measure other rows")
    means = {name: total / targets for name, total in sums.items()} if targets else {}
    teacher_nll = means.get("teacher_nll")
    kind = "dense" if cache.manifest.width == cache.manifest.vocab_size else "lower-bound"
    found = {
        "nll": sums["nll"] / positions,
        "teacher_nll": teacher_nll,
        "delta_nll": None if teacher_nll is None else means["nll_at_targets"] - teacher_nll,
        "kl": means.get("kl"),
        "kl_kind": "estimate" if cache.manifest.selection["kind"] in SAMPLED_KINDS else kind,
        "top1_agreement": means.get("top1_agreement"),
        "positions": positions,
        "targets": targets,
    }
    if found["kl_kind"] == "estimate" and "kl" in means:
        found["kl_standard_error"] = math.sqrt(max(0.0, means["kl_square"] - means["kl"] ** 2) / targets)
    return found
