"""Order, hold-out and batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache import open_cache
from kdcache.errors import ConfigError
from kdcache.student.data import Collator, RowDataset, RunOrder, labelled, split_heldout
from kdcache.student.mixture import Mixture
from kdcache.student.permutation import Permutation


def test_the_order_of_a_run_is_a_pure_function_of_the_seed() -> None:
    whole = list(RunOrder(Mixture([10], 3), 35))
    assert whole == list(RunOrder(Mixture([10], 3), 35)) != list(RunOrder(Mixture([10], 4), 35))
    assert list(RunOrder(Mixture([10], 3), 17)) == whole[:17]  # a shorter run is the beginning of a longer one
    permutations = [Permutation(10, (3, epoch, 0))(np.arange(10)).tolist() for epoch in range(4)]
    assert whole == [row for epoch in permutations for row in epoch][:35]


@pytest.mark.parametrize("done", [0, 1, 12, 35])
def test_what_is_done_is_skipped_and_not_looked_up(done: int) -> None:
    order = RunOrder(Mixture([10], 3), 35, done)
    assert len(order) == 35
    assert list(order) == [None] * done + list(RunOrder(Mixture([10], 3), 35))[done:]


@pytest.mark.parametrize(("rows", "share", "held"), [(100, 0.02, 2), (10, 0.02, 1), (2, 0.9, 1), (50, 0.5, 25)])
def test_the_hold_out(rows: int, share: float, held: int) -> None:
    train, heldout = (side.tolist() for side in split_heldout(rows, share))
    assert len(heldout) == held
    assert sorted(train + heldout) == list(range(rows))
    assert heldout == sorted(Permutation(rows, (0,))(np.arange(held)).tolist())


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match="1 row"):
        split_heldout(1, 0.1)


def test_a_batch_lines_up_with_its_rows(cache: Path) -> None:
    opened = open_cache(cache)
    data = RowDataset([opened], [[5, 2, 9]])
    batch = Collator([opened])([data[i] for i in range(3)])
    rows = [opened[i] for i in (5, 2, 9)]
    assert torch.equal(batch["input_ids"], torch.stack([r.tokens for r in rows]))
    assert torch.equal(batch["labels"], torch.stack([r.labels for r in rows]))
    mask = labelled(batch)
    assert torch.equal(batch["targets"].ids, torch.cat([r.targets.ids[r.labels != -100] for r in rows]))
    assert len(batch["targets"].count) == int(mask.sum())
    assert batch["rows"].tolist() == [[0, 5], [0, 2], [0, 9]]
    starts = np.flatnonzero(np.diff(rows[0].segments.numpy(), prepend=-5))
    assert (batch["position_ids"][0][starts] == 0).all()
    assert ((batch["position_ids"].diff(dim=1) == 1) | (batch["position_ids"][:, 1:] == 0)).all()
