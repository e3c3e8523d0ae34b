"""The processes that hold one teacher together: what they agree on.

Each process of a group runs every forward pass, over the same batches. The first of them leads: it alone reads and
writes the cache, and the others take its word for what is there, since a shard that one process sees as committed and
another does not would leave one of them waiting in a forward pass.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from kdcache.worker import find_worker

T = TypeVar("T")

_PATIENCE = timedelta(hours=2)
"""For the slowest to load its part of a large teacher, or for the leader to read a large corpus."""


@dataclass(frozen=True)
class TensorGroup:
    """This process among those that hold its teacher.

    Attributes:
        size: how many they are.
        leads: whether this one reads and writes the cache.
    """

    size: int = 1
    leads: bool = True

    def lead(self, work: Callable[[], T]) -> T:
        """What the leader makes of some work, in every process; the others wait for it.

        An exception is the leader's alone: its process ends, and torchrun then ends the others.
        """
        if self.size == 1:
            return work()
        import torch

        box: list[Any] = [work() if self.leads else None]
        torch.distributed.broadcast_object_list(box, src=0)
        said: T = box[0]
        return said


@functools.cache
def join_group(size: int) -> TensorGroup:
    """Join the group of this process, which is then its whole world: `size` neighbouring ranks of torchrun.

    Raises:
        ConfigError: torchrun did not start this process, or not a multiple of `size`.
    """
    if size == 1:
        return TensorGroup()
    group = find_worker(None, os.environ, size).index
    import torch
    from torch.distributed.rendezvous import rendezvous

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    store, rank, _ = next(rendezvous("env://"))
    own = torch.distributed.PrefixStore(f"kdcache-{group}", store)  # type: ignore[attr-defined]
    torch.distributed.init_process_group(backend, store=own, rank=rank % size, world_size=size, timeout=_PATIENCE)
    return TensorGroup(size, leads=rank % size == 0)
