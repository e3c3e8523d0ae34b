"""SparseTargets moves, indexes and joins as one value."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kdcache import Selection, SparseTargets, select
from kdcache.errors import TargetError


def targets(rows: int = 6) -> SparseTargets:
    torch.manual_seed(0)
    return select(torch.randn(rows, 20), Selection(k=3), temperatures=(1.0, 2.0))


def test_index_and_join_are_inverse() -> None:
    whole = targets()
    again = SparseTargets.cat([whole[:2], whole[torch.tensor([2, 3])], whole[torch.arange(6) > 3]])
    for field in dataclasses.fields(whole):
        a, b = getattr(whole, field.name), getattr(again, field.name)
        assert torch.equal(a, b) or (a.isnan() & b.isnan()).all() if isinstance(a, torch.Tensor) else a == b


def test_it_is_frozen_and_its_shapes_are_checked() -> None:
    whole = targets()
    with pytest.raises(dataclasses.FrozenInstanceError):
        whole.ids = whole.ids  # type: ignore[misc]
    with pytest.raises(TargetError, match="log_tail has shape"):
        dataclasses.replace(whole, log_tail=whole.log_tail[:, :1])


def test_different_kinds_do_not_join() -> None:
    with pytest.raises(TargetError, match="cannot be joined"):
        SparseTargets.cat([targets(), dataclasses.replace(targets(), kind="full")])
