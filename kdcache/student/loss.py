"""The loss of one batch: what Trainer's subclass computes, and a loop of one's own.

It is made inside the model's forward (`student.head`), tile by tile, so `[positions, V]` never exists.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdcache.isolation import packed_forward
from kdcache.losses import Figures, Objective, PositionWeights, distil
from kdcache.student.data import labelled
from kdcache.student.head import FusedHead


def count_items(batch: dict[str, Any]) -> Tensor:
    """`[2]` how many positions of a batch have a label, and how many a target."""
    return torch.stack([labelled(batch).sum(), (batch["targets"].count > 0).sum().to(batch["labels"].device)])


def compute_loss(
    model: nn.Module,
    head: FusedHead,
    batch: dict[str, Any],
    objective: Objective,
    *,
    vocab_size: int,
    num_items: Tensor | None = None,
    weights: PositionWeights | None = None,
    figures: Figures | None = None,
) -> Tensor:
    """Distillation and label loss of one batch: a sum over its positions, divided once.

    Args:
        model: the student, or DDP or FSDP around it.
        head: what `fuse_head` gave for that student.
        batch: of `Collator`, on any device.
        objective: divergence, tail, temperature, soft weight.
        vocab_size: of the cache; rows of the head beyond it are padding.
        num_items: `[2]` the divisors of the label and of the distillation term, for accumulation and ranks:
            `count_items` of the whole optimiser step, divided by the number of ranks, since DDP and FSDP average over
            them. By default, those of this batch.
        weights: how much the distillation term of each position counts; all the same by default.
        figures: filled with the student's figures at each position.

    Returns:
        A scalar, nats.

    Raises:
        TargetError: the targets cannot give that objective exactly.
    """
    device = next(model.parameters()).device
    mask = labelled(batch).to(device, non_blocking=True)
    tokens, positions, labels = (
        batch[name].to(device, non_blocking=True) for name in ("input_ids", "position_ids", "labels")
    )
    targets = batch["targets"].to(device, non_blocking=True)

    items, with_target = (None, None) if num_items is None else num_items.to(device).clamp(min=1e-9)  # of none, none

    def on_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return distil(
            head.source(hidden[mask], weight, bias, vocab_size), targets, labels[mask], objective,
            num_items=items, num_targets=with_target, figures=figures,
            position_weights=weights.of(targets, vocab_size) if weights else None,
        )  # fmt: skip

    loss: Tensor = packed_forward(model, tokens, positions, on_head=on_head)
    return loss
