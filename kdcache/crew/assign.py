"""Who makes which shard: an idle worker takes the next that nobody has; the shard of one that dies goes to another.

The first worker opens the inputs and creates the output; then the others start, each as soon as there is room for it.
A worker that dies, or fails with an exception that is no `KdcacheError`, is replaced, and its shard is the next that is
given away. A shard that ends three workers ends the work. A `KdcacheError` ends it at once: it would be raised again.

Guarantee: two workers may make one shard (one may be thought dead that is only cut off); then the first one that is
there stays, as always. Cost: the driver keeps a number for each missing shard.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from kdcache import errors
from kdcache.crew.tasks import FINISH, MAKE, OPEN, Outcome, Task

Progress = Callable[[int, int, int], None]
"""Called with size done, size to do, and the amount done so far; see `Outcome`."""

ATTEMPTS = 3
"""Workers that one task may end."""

_TICK = 0.5
"""Seconds between looks at the progress of the workers."""

_PATIENCE = 60.0
"""Seconds without a word from any worker after which a warning says so."""


@dataclass(frozen=True)
class Answer:
    """What comes from a worker.

    Attributes:
        worker: its number.
        outcome: of its task; None where it has none yet.
        progress: size and amount of what is done of the shard that it is making.
        died: why there is no worker any more.
    """

    worker: int
    outcome: Outcome | None = None
    progress: tuple[float, int] | None = None
    died: str | None = None


class Crew(Protocol):
    """Workers by number, from 0 to `count` - 1.

    Attributes:
        count: how many there may be.
    """

    count: int

    def start(self, worker: int) -> None:
        """Start a worker, in the place of one of that number if there was one."""

    def ask(self, worker: int, task: Task) -> None:
        """Give a worker a task, and do not wait for it. It may not have begun to live yet."""

    def answers(self, seconds: float) -> Iterable[Answer]:
        """What came from workers; waits for so long if nothing did."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a crew has done.

    Attributes:
        summary: of the output, from the worker that finished it.
        made: shards that this crew made.
        amount: of these.
        totals: sums of the further numbers of their makers, by name.
        workers: how many there were at once.
        replaced: workers that died, or failed, and were replaced.
        seconds: how long it took.
    """

    summary: dict[str, Any]
    made: int
    amount: int
    totals: Mapping[str, float]
    workers: int
    replaced: int
    seconds: float


def run(crew: Crew, on_progress: Progress | None) -> Run:
    """Have all missing shards made.

    Raises:
        KdcacheError: one that a worker raised.
        LaunchError: workers died again and again.
        RuntimeError: with the traceback of a worker, in which one task failed again and again.
    """
    return _Assignment(crew, on_progress).run()


class _Assignment:
    def __init__(self, crew: Crew, on_progress: Progress | None) -> None:
        self._crew, self._on_progress = crew, on_progress
        self._started = time.perf_counter()
        self._busy: dict[int, Task] = {}
        self._idle: list[int] = []
        self._waiting: deque[int] | None = None  # shards; None until a worker has said which are missing
        self._sizes: dict[int, int] = {}
        self._shown: dict[int, tuple[float, int]] = {}
        self._failures: Counter[tuple[Task, int]] = Counter()
        self._summary: dict[str, Any] | None = None
        self._done = self._made = self._amount = self._replaced = 0
        self._totals: defaultdict[str, float] = defaultdict(float)
        self._heard = False

    def run(self) -> Run:
        self._start(0)
        while self._summary is None:
            for answer in self._crew.answers(_TICK):
                self._heard = True
                if answer.progress is not None:
                    if answer.worker not in self._idle:  # else it is of a shard that is counted already
                        self._shown[answer.worker] = answer.progress
                elif answer.died is not None:
                    self._replace(answer.worker, f"the last one {answer.died}", None)
                elif answer.outcome is not None:
                    self._take(answer.worker, answer.outcome)
            self._assign()
            self._show()
            if not self._heard and time.perf_counter() - self._started > _PATIENCE:
                self._heard = True
                warnings.warn(f"no worker has started for {_PATIENCE:.0f} s: is there room for one?", stacklevel=2)
        return Run(
            summary=self._summary, made=self._made, amount=self._amount, totals=self._totals,
            workers=self._crew.count, replaced=self._replaced, seconds=time.perf_counter() - self._started,
        )  # fmt: skip

    def _start(self, worker: int) -> None:
        self._crew.start(worker)
        self._ask(worker, Task(OPEN))

    def _ask(self, worker: int, task: Task) -> None:
        self._busy[worker] = task
        self._crew.ask(worker, task)

    def _take(self, worker: int, outcome: Outcome) -> None:
        """What a worker has done, or has failed to do."""
        if outcome.refused is not None:
            raise errors.rebuilt(*outcome.refused)
        if outcome.crashed is not None:
            return self._replace(worker, "the last one failed", outcome.crashed)
        task = self._busy.pop(worker)
        self._failures.pop(_key(task, worker), None)
        self._idle.append(worker)
        if task.kind == FINISH:
            self._summary = outcome.value
        elif task.kind == MAKE:
            made, amount, further = outcome.value
            self._shown.pop(worker, None)
            self._done += self._sizes[task.shard]
            self._made, self._amount = self._made + made, self._amount + amount
            for name, more in further.items():
                self._totals[name] += more
        elif self._waiting is None:
            self._sizes = dict(outcome.value)
            self._waiting = deque(self._sizes)
            for other in range(1, min(self._crew.count, len(self._waiting))):
                self._start(other)
        return None

    def _replace(self, worker: int, why: str, trace: str | None) -> None:
        """Start another worker in the place of one that died or failed, unless its task has ended too many."""
        task = self._busy.pop(worker, None)
        self._shown.pop(worker, None)
        if worker in self._idle:
            self._idle.remove(worker)
        if task is not None:
            self._failures[_key(task, worker)] += 1
            if self._failures[_key(task, worker)] >= ATTEMPTS:
                said = f"{task} ended {ATTEMPTS} workers, one after the other"
                if trace is not None:
                    raise RuntimeError(f"{said}; {why}:\n{trace}")
                raise errors.LaunchError(f"{said}; {why}")
            if task.kind == MAKE:
                assert self._waiting is not None
                self._waiting.appendleft(task.shard)
        self._replaced += 1
        self._start(worker)

    def _assign(self) -> None:
        """Give idle workers what is left to do."""
        if self._waiting is None:
            return
        while self._idle and self._waiting:
            self._ask(self._idle.pop(), Task(MAKE, self._waiting.popleft()))
        if self._idle and not any(task.kind != OPEN for task in self._busy.values()) and self._summary is None:
            self._ask(self._idle.pop(), Task(FINISH))

    def _show(self) -> None:
        if self._on_progress and self._waiting is not None:
            size = self._done + int(sum(size for size, _ in self._shown.values()))
            amount = self._amount + sum(amount for _, amount in self._shown.values())
            self._on_progress(size, sum(self._sizes.values()), amount)


def _key(task: Task, worker: int) -> tuple[Task, int]:
    """What failures are counted by: a shard may go to any worker."""
    return task, -1 if task.kind == MAKE else worker
