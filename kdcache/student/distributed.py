"""What the ranks of one run exchange, the training itself left out. A single process exchanges nothing."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar

import torch

T = TypeVar("T")

_PATIENCE = timedelta(minutes=30)


def rank() -> int:
    """Which process of the run this is, as torchrun says."""
    return int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes the run has, as torchrun says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device) -> None:
    """Join the process group of the run; Trainer later finds the group and uses it."""
    if world() > 1:
        from accelerate import PartialState

        PartialState(cpu=device.type == "cpu", timeout=_PATIENCE)


def agree(value: T) -> T:
    """The value of the first process, in every process."""
    if world() == 1:
        return value
    box: list[Any] = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    said: T = box[0]
    return said


def gather(value: T) -> list[T]:
    """The value of each process, by rank."""
    if world() == 1:
        return [value]
    said: list[Any] = [None] * world()
    torch.distributed.all_gather_object(said, value)
    return said
