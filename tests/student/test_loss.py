"""The loss of a batch, for any loop: in pieces it is that of the whole, each term by its own positions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from kdcache import open_cache, sparse_kd_loss_from_logits
from kdcache.isolation import packed_forward
from kdcache.losses import Figures, Objective, PositionWeights
from kdcache.student import Collator, RowDataset, compute_loss, count_items, fuse_head, labelled, load_student

VOCAB = 320


def some_without_target(batch: dict[str, Any]) -> dict[str, Any]:
    targets = batch["targets"]
    kept = batch["labels"][labelled(batch)] % 3 > 0
    return {**batch, "targets": dataclasses.replace(targets, count=targets.count * kept)}


def test_pieces_make_the_whole(cache: Path, student_config: Path) -> None:
    opened = open_cache(cache)
    model = load_student(str(student_config), opened, torch.device("cpu"), 0)
    collate, rows = Collator([opened]), RowDataset([opened], [range(8)]).__getitems__(range(8))
    whole, *pieces = (some_without_target(collate(part)) for part in (rows, rows[:2], rows[2:]))
    items = count_items(whole)
    assert torch.equal(items, sum(count_items(piece) for piece in pieces))
    assert items[0] == labelled(whole).sum() > items[1] > 0
    objective, weights = Objective(soft_weight=0.7, temperature=2.0), PositionWeights("confidence")

    mask = labelled(whole)
    logits = packed_forward(model, whole["input_ids"], whole["position_ids"]).logits[mask][:, :VOCAB].double()
    oracle = sparse_kd_loss_from_logits(
        logits, whole["targets"], labels=whole["labels"][mask], soft_weight=0.7, temperature=2.0,
        num_items=items[0], num_targets=items[1], position_weights=weights.of(whole["targets"], VOCAB),
    ).item()  # fmt: skip

    head = fuse_head(model, "cpu")

    def loss(batch: dict[str, Any], num_items: torch.Tensor | None = None) -> float:
        return compute_loss(
            model, head, batch, objective, vocab_size=VOCAB, num_items=num_items, weights=weights
        ).item()

    assert loss(whole) == pytest.approx(oracle, rel=1e-6)
    assert loss(whole, items) == pytest.approx(oracle, rel=1e-6)
    assert sum(loss(piece, items) for piece in pieces) == pytest.approx(oracle, rel=1e-6)
    assert sum(loss(piece) for piece in pieces) / 2 != pytest.approx(oracle, rel=3e-5)


def test_a_step_without_any_target_has_a_finite_loss(cache: Path, student_config: Path) -> None:
    opened = open_cache(cache)
    model = load_student(str(student_config), opened, torch.device("cpu"), 0)
    batch = Collator([opened])([RowDataset([opened], [range(1)])[0]])
    batch["targets"] = dataclasses.replace(batch["targets"], count=torch.zeros_like(batch["targets"].count))
    figures = Figures()
    loss = compute_loss(
        model, fuse_head(model, "cpu"), batch, Objective(soft_weight=0.5), vocab_size=VOCAB,
        num_items=count_items(batch), figures=figures,
    )  # fmt: skip
    assert loss.item() == pytest.approx(0.5 * figures.values()["nll"].mean().item(), rel=1e-6)
    loss.backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
