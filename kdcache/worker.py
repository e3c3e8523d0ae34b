"""Worker: which share of the shards is mine.

Worker i of n makes the shards s with s mod n = i. It is named on the command line, or read
from what SLURM's arrays and torchrun put into the environment.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kdcache.errors import ConfigError


@dataclass(frozen=True)
class Worker:
    """Worker `index` of `count`."""

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ConfigError(f"worker {self.index}/{self.count}: I must lie in 0 to N-1, and N must be at least 1")

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def among_others(self) -> str:
        """`I/N`; the empty string for the only one."""
        return str(self) if self.count > 1 else ""

    def owns(self, shard: int) -> bool:
        """Whether a shard is this worker's to make."""
        return shard % self.count == self.index


def find_worker(named: str | None, environment: Mapping[str, str], tensor_parallel: int = 1) -> Worker:
    """The worker that is named, as I/N, else the one the launcher made this process.

    Inside a SLURM array, I is the task's place in the array; under torchrun it is the rank; with
    both, every rank of every task is a worker of its own.

    Args:
        named: I/N, or None.
        environment: variables of this process.
        tensor_parallel: neighbouring ranks that are one worker together.

    Raises:
        ConfigError: not of the form I/N, or variables that make no sense; torchrun started no multiple of
            `tensor_parallel`.
    """

    def number(name: str, default: int) -> int:
        try:
            return int(environment.get(name, default))
        except ValueError:
            raise ConfigError(f"{name} is {environment[name]!r}, which is not a number") from None

    rank, ranks = 0, 1
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, ranks = number("RANK", 0), number("WORLD_SIZE", 1)
    if ranks % tensor_parallel:
        raise ConfigError(
            f"tensor_parallel is {tensor_parallel}, but the number of processes is {ranks}: start that many, or a "
            f"multiple, by torchrun --nproc-per-node {tensor_parallel} --no-python kdcache ..."
        )
    rank, ranks = rank // tensor_parallel, ranks // tensor_parallel
    if named is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", named.strip())
        if not match:
            raise ConfigError(f"worker {named!r} is not of the form I/N, like 0/4")
        return Worker(int(match[1]), int(match[2]))
    task, tasks = 0, 1
    if "SLURM_ARRAY_TASK_ID" in environment:
        step = number("SLURM_ARRAY_TASK_STEP", 1)
        task = (number("SLURM_ARRAY_TASK_ID", 0) - number("SLURM_ARRAY_TASK_MIN", 0)) // max(step, 1)
        tasks = number("SLURM_ARRAY_TASK_COUNT", 1)
        if task >= tasks:
            raise ConfigError(
                "the SLURM array is not evenly spaced; use one like --array=0-15, or name the worker, I/N"
            )
    return Worker(task * ranks + rank, tasks * ranks)


def find_job(environment: Mapping[str, str]) -> str:
    """What the scheduler that started this process calls it; the empty string without one.

    `slurm 4711` or `slurm 4711_3`, as `squeue` and `scancel` name a job and a task of an array; `ray` and the id of the
    actor, or of the node where it is a task.
    """
    job = environment.get("SLURM_ARRAY_JOB_ID") or environment.get("SLURM_JOB_ID")
    if job:
        task = environment.get("SLURM_ARRAY_TASK_ID")
        return f"slurm {job}" + (f"_{task}" if task else "")
    ray = sys.modules.get("ray")  # a worker of Ray has imported it
    with contextlib.suppress(Exception):
        if ray is not None and ray.is_initialized():
            context = ray.get_runtime_context()
            actor = context.get_actor_id()
            return f"ray actor {actor}" if actor else f"ray node {context.get_node_id()}"
    return ""


def available_cores() -> int:
    """The cores that this process may really use: those of its affinity, within the quota of its control group."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(affinity, int(int(quota) / int(period))))
    except (OSError, ValueError):
        return affinity
