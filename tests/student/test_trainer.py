"""The trainer: random states of a checkpoint, on the same ranks and on others; the share of time that a step waited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer

from kdcache.student.trainer import DistillationTrainer, Waiting


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


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_only_the_loader_counts_and_not_its_start() -> None:
    clock = Clock()

    def loader() -> Iterator[int]:
        for number, seconds in enumerate((100.0, 3.0, 0.0, 1.0)):
            clock.now += seconds
            yield number

    waiting, batches, seen = Waiting(clock), loader(), []
    assert waiting.share() == waiting.share_since_told() == 0
    shares = []
    for _ in range(2):  # a step asks for two, through a wrapper of its own
        step = waiting.watch(batches)
        for _ in range(2):
            seen.append(next(step))
            clock.now += 4.0  # work
        shares.append(waiting.share_since_told())
    assert seen == [0, 1, 2, 3] and list(waiting.watch(batches)) == []
    assert shares == [pytest.approx(3 / 11), pytest.approx(1 / 9)]  # 4 + 3 + 4 s, then 0 + 4 + 1 + 4 s
    assert waiting.share() == pytest.approx(4 / 20)
