"""Order, hold-out and batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kdcache import open_cache
from kdcache.errors import ConfigError
from kdcache.student.data import Collator, RowDataset, RunOrder, labelled, split_heldout


def test_the_order_of_a_run_is_a_pure_function_of_the_seed() -> None:
    whole = list(RunOrder(10, 35, seed=3))
    assert whole == list(RunOrder(10, 35, seed=3)) != list(RunOrder(10, 35, seed=4))
    assert list(RunOrder(10, 17, seed=3)) == whole[:17]  # a shorter run is the beginning of a longer one
    for epoch in range(3):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert whole[:10] != whole[10:20]


@pytest.mark.parametrize(("rows", "share", "held"), [(100, 0.02, 2), (10, 0.02, 1), (2, 0.9, 1), (50, 0.5, 25)])
def test_the_hold_out(rows: int, share: float, held: int) -> None:
    train, heldout = split_heldout(rows, share)
    assert len(heldout) == held
    assert sorted(train + heldout) == list(range(rows))
    assert (train, heldout) == split_heldout(rows, share)


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match="1 row"):
        split_heldout(1, 0.1)


def test_a_batch_lines_up_with_its_rows(cache: Path) -> None:
    opened = open_cache(cache)
    data = RowDataset(opened, [5, 2, 9])
    batch = Collator(opened)([data[i] for i in range(3)])
    rows = [opened[i] for i in (5, 2, 9)]
    assert torch.equal(batch["input_ids"], torch.stack([r.tokens for r in rows]))
    assert torch.equal(batch["labels"], torch.stack([r.labels for r in rows]))
    mask = labelled(batch)
    assert torch.equal(batch["targets"].ids, torch.cat([r.targets.ids[r.labels != -100] for r in rows]))
    assert len(batch["targets"].count) == int(mask.sum())
    starts = np.flatnonzero(np.diff(rows[0].segments.numpy(), prepend=-5))
    assert (batch["position_ids"][0][starts] == 0).all()
    assert ((batch["position_ids"].diff(dim=1) == 1) | (batch["position_ids"][:, 1:] == 0)).all()
