"""Random states of a checkpoint: those of the same ranks are taken up, others are drawn anew for each rank."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import Trainer

from kdcache.student.trainer import DistillationTrainer


def load(checkpoint: Path, rank: int, world: int, step: int = 7) -> list[float]:
    """What a rank draws after it went on from a checkpoint."""
    trainer: Any = object.__new__(DistillationTrainer)
    trainer.args = SimpleNamespace(world_size=world, process_index=rank, parallel_mode=None)
    trainer.config, trainer.state = SimpleNamespace(seed=3), SimpleNamespace(global_step=step)
    torch.manual_seed(0)
    trainer._load_rng_state(str(checkpoint))
    return torch.rand(3).tolist()


def save(checkpoint: Path, rank: int, world: int) -> list[float]:
    trainer: Any = object.__new__(Trainer)
    trainer.args = SimpleNamespace(world_size=world, process_index=rank)
    torch.manual_seed(100 + rank)
    trainer._save_rng_state(str(checkpoint))
    return torch.rand(3).tolist()


def test_the_states_of_the_same_ranks_are_taken_up(tmp_path: Path) -> None:
    one = save(tmp_path / "one", 0, 1)
    two = [save(tmp_path / "two", rank, 2) for rank in range(2)]
    assert load(tmp_path / "one", 0, 1) == one
    assert [load(tmp_path / "two", rank, 2) for rank in range(2)] == two


def test_on_other_ranks_each_draws_its_own_and_not_the_beginning_s(tmp_path: Path) -> None:
    written = [save(tmp_path / "one", 0, 1), *(save(tmp_path / "two", rank, 2) for rank in range(2))]
    torch.manual_seed(0)
    beginning = torch.rand(3).tolist()
    drawn = [load(tmp_path / "one", rank, 2) for rank in range(2)] + [load(tmp_path / "two", 0, 1, step=8)]
    assert all(one not in (beginning, *written) for one in drawn)
    assert len({tuple(one) for one in drawn}) == 3
    assert drawn[1] == load(tmp_path / "one", 1, 2)  # and always the same
