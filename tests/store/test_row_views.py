"""A cache as a data set of torch and of `datasets`: the same rows, in any order, in any process."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from kdcache import Cache, open_cache
from kdcache.row_views import row_tensors
from tests.processes import READY


@pytest.fixture(scope="module")
def opened(cache: Path) -> Cache:
    return open_cache(cache)


def test_a_loader_stacks_the_rows(opened: Cache) -> None:
    rows = opened.to_torch()
    assert len(rows) == len(opened)
    batch = next(iter(DataLoader(rows, batch_size=3)))
    assert batch["tokens"].shape == (3, 64) and batch["ids"].shape == (3, 64, 8)
    assert set(batch) == {
        "tokens", "labels", "segments", "ids", "logprobs", "weights", "count", "log_partition", "log_tail", "entropy",
        "label_logprob",
    }  # fmt: skip
    for index in range(3):
        for name, values in row_tensors(opened[index]).items():
            assert torch.equal(batch[name][index], values), name


def test_a_row_is_read_when_it_is_asked_for(opened: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = Cache.read_packed
    monkeypatch.setattr(Cache, "read_packed", lambda self, index: read.append(index) or original(self, index))
    rows, table = opened.to_torch(), opened.to_datasets()
    assert read == []
    assert torch.equal(rows[5]["tokens"], table[5]["tokens"]) and read == [5, 5]
    found = table.shuffle(seed=0).select([2, 0])
    assert read == [5, 5]
    wanted = table.shuffle(seed=0)[2]["row"]
    assert torch.equal(found[0]["ids"], opened[wanted].targets.ids)
    assert len(table[:2]["tokens"]) == 2 and len(table) == len(opened)


def test_both_may_be_sent_elsewhere(opened: Cache) -> None:
    for made in (opened.to_torch(), opened.to_datasets()):
        assert torch.equal(pickle.loads(pickle.dumps(made))[4]["ids"], opened[4].targets.ids)


@pytest.mark.slow
def test_processes_of_a_loader_read_the_same(opened: Cache) -> None:
    loader = DataLoader(opened.to_torch(), batch_size=5, num_workers=2, multiprocessing_context=READY)
    found = torch.cat([batch["ids"] for batch in loader])
    assert torch.equal(found, torch.stack([row.targets.ids for row in opened]))
