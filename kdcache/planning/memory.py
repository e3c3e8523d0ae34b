"""Memory: the most that a process has had at once, how much there is, and a process of its own for what is measured.

A process's peak never falls, so whatever is to be measured after something larger runs in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from kdcache.plugins import load_inherited

P = ParamSpec("P")
R = TypeVar("R")


class NoRoomError(Exception):
    """What was tried needs more memory than there is."""


def peak(device: torch.device) -> dict[str, Any]:
    """`peak_bytes`, the most memory that this process has had at once where its tensors are, and `kind` of memory."""
    if device.type == "cuda":
        return {"peak_bytes": torch.cuda.max_memory_allocated(device), "kind": "GPU memory that torch allocated"}
    return {"peak_bytes": peak_resident(), "kind": "resident memory of the process"}


def peak_resident() -> int:
    """Bytes of resident memory that this process has had at most.

    On Linux of the program that runs now: getrusage(2) counts what its parent held when it was started, too, so a
    small command that a large notebook starts would be as large as the notebook.
    """
    if sys.platform == "linux":
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found is not None:
            return 1024 * int(found[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def room(device: torch.device) -> int:
    """Bytes of memory that a process can have at most where its tensors are: of the GPU, or of its control group."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no control group, or one without a limit
        return total


def in_own_process(function: Callable[P, R], *args: P.args, **options: P.kwargs) -> R:
    """Call a function in a fresh process, which ends with the call.

    Args:
        function: of a module; it, what it is given and what it returns are sent between the processes.

    Raises:
        NoRoomError: it ran out of memory, or the system ended its process.
        KdcacheError: as the function raises it.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=load_inherited) as pool:
        try:
            return pool.submit(function, *args, **options).result()
        except (torch.OutOfMemoryError, MemoryError, BrokenProcessPool) as error:
            raise NoRoomError(str(error)) from error
