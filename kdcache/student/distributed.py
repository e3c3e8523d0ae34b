"""What the ranks of one run exchange, the training itself left out. A single process exchanges nothing."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar

import torch

from kdcache import stopping

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


class Vote:
    """Whether any rank says yes, asked after each step of a training, and told after the next one.

    So no rank waits for its device, and all of them are told the same after the same step. A single process is told at
    once.

    Args:
        device: where the ranks exchange tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._asked: tuple[torch.Tensor, Any] | None = None

    def any(self, mine: bool) -> bool:
        """Whether some rank has said yes one step ago; every rank must call this."""
        if world() == 1:
            return mine
        before, cuda = self._asked, self._device.type == "cuda"
        votes = torch.full((1,), int(mine), dtype=torch.int32, device=self._device)
        torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
        told = torch.empty(1, dtype=torch.int32, pin_memory=cuda).copy_(votes, non_blocking=cuda)
        arrived: Any = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        if arrived is not None:
            arrived.record()
        self._asked = told, arrived
        if before is None:
            return False
        if before[1] is not None:
            before[1].synchronize()
        return bool(before[0].item())


def stop_together() -> None:
    """Stop every rank if a signal has told any of them to; every rank must call this, when its work is saved.

    Raises:
        Stopped: by `kdcache.stopping`.
    """
    if any(gather(stopping.requested())):
        if world() > 1:  # a rank that exits with its group open aborts now and then
            torch.distributed.destroy_process_group()
        raise stopping.Stopped
