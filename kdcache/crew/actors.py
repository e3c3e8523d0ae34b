"""Workers that are actors of a Ray cluster, which hold their model open from shard to shard.

Why actors and not tasks: docs/decisions/0018. An actor that dies (its process, its node) is reported by Ray and started
again by the driver, wherever there is room. Workers run in the driver's folder if their node has it, so that relative
names mean the same; what is not at a URL must lie on a file system that all nodes share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from kdcache.crew.assign import Answer
from kdcache.crew.tasks import Outcome, Task, TaskWorker
from kdcache.errors import one_line
from kdcache.launcher import LaunchOptions
from kdcache.ray_cluster import connected, handed_on, has_gpus

_LOOKING = "looking"
"""The concurrency group in which an actor is asked for its progress while it works."""

_FAREWELL = 10.0
"""Seconds for idle actors to close their models."""


class Actor:
    """A `TaskWorker` in an actor's process."""

    def __init__(self, module: str, fields: dict[str, Any], folder: str) -> None:
        with contextlib.suppress(OSError):  # a node that has no such folder
            os.chdir(folder)
        self._worker: TaskWorker = importlib.import_module(module).make_worker(fields)

    def do(self, task: Task) -> Outcome:
        """See `TaskWorker`."""
        return self._worker.do(task)

    def progress(self) -> tuple[float, int]:
        """See `TaskWorker`."""
        return self._worker.progress

    def close(self) -> None:
        """See `TaskWorker`."""
        self._worker.close()


@contextlib.contextmanager
def ray_workers(module: str, config: Any, options: LaunchOptions, device: str) -> Iterator[RayActors]:
    """Actors of a cluster, which all end with the context.

    Args:
        module: whose `make_worker` makes each of them.
        config: a dataclass, whose fields each worker is given.
        options: how many workers, where, and what each may use.
        device: that the workers run on; on `cpu` they ask for no GPUs.

    Raises:
        ConfigError: nobody answers at the address, or there is no room for a worker.
    """
    cpus, gpus = options.cpus_per_worker or 1, options.gpus_per_worker or 0.0
    with connected(options.address, cpus, gpus):
        if options.gpus_per_worker is None and device != "cpu" and has_gpus(ray):
            gpus = 1.0
        count = options.workers or (max(1, int(ray.cluster_resources().get("GPU", 0) // gpus)) if gpus else 1)
        actors = RayActors(module, dataclasses.asdict(config), count, cpus, gpus)
        try:
            yield actors
        finally:
            actors.stop()


class RayActors:
    """A `Crew` of actors.

    Args:
        module: whose `make_worker` makes each of them.
        fields: of the configuration, which each is given.
        count: how many.
        cpus: cores of each.
        gpus: GPUs likewise.
    """

    def __init__(self, module: str, fields: dict[str, Any], count: int, cpus: float, gpus: float) -> None:
        self.count = count
        self._given = module, fields
        self._kind = ray.remote(concurrency_groups={_LOOKING: 1})(Actor).options(
            num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0, runtime_env=handed_on()
        )
        self._actors: dict[int, Any] = {}
        self._asked: dict[Any, int] = {}  # futures of tasks
        self._looked: dict[Any, int] = {}  # and of progress
        self._alive: set[int] = set()

    def start(self, worker: int) -> None:
        """See `Crew`."""
        self._forget(worker)
        self._actors[worker] = self._kind.remote(*self._given, str(Path.cwd()))

    def ask(self, worker: int, task: Task) -> None:
        """See `Crew`."""
        self._asked[self._actors[worker].do.remote(task)] = worker

    def answers(self, seconds: float) -> Iterator[Answer]:
        """See `Crew`."""
        if not ray.wait(list(self._asked), num_returns=1, timeout=seconds)[0]:
            yield from self._progress()
            return
        for future in ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)[0]:
            worker = self._asked.pop(future)
            self._alive.add(worker)
            try:
                outcome = ray.get(future)
            except RayError as error:
                yield Answer(worker, died=f"died: {one_line(error)}")
            else:
                yield Answer(worker, outcome=outcome)

    def stop(self) -> None:
        """End all actors; those that have nothing to do close their models first."""
        idle = self._alive - set(self._asked.values())
        closing = [self._actors[worker].close.remote() for worker in idle]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=_FAREWELL)
        for worker in list(self._actors):
            self._forget(worker)

    def _progress(self) -> Iterator[Answer]:
        """How far the busy actors are: what came of the last question, and the next one.

        One that has not started answers when it has.
        """
        for future in ray.wait(list(self._looked), num_returns=len(self._looked), timeout=0)[0] if self._looked else ():
            worker = self._looked.pop(future)
            with contextlib.suppress(RayError):  # of one that died, its task tells
                yield Answer(worker, progress=ray.get(future))
        for worker in set(self._asked.values()) - set(self._looked.values()):
            self._looked[self._actors[worker].progress.options(concurrency_group=_LOOKING).remote()] = worker

    def _forget(self, worker: int) -> None:
        actor = self._actors.pop(worker, None)
        self._alive.discard(worker)
        for futures in (self._asked, self._looked):
            for future in [future for future, of in futures.items() if of == worker]:
                del futures[future]
        if actor is not None:
            with contextlib.suppress(RayError):
                ray.kill(actor, no_restart=True)
