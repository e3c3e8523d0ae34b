"""Tasks: what a worker is asked to do, and what it answers.

Each answer is an `Outcome` of plain values, errors included, so that it crosses to any driver: a `KdcacheError` as its
name and sentence, any other exception as its traceback.
"""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from kdcache.errors import KdcacheError

OPEN, MAKE, FINISH = "open", "make", "finish"


@dataclass(frozen=True)
class Task:
    """What a worker is asked to do.

    Attributes:
        kind: `open`: open the inputs, and create the output if there is none; `make`: make a shard; `finish`: close the
            output, and count.
        shard: which one is made.
    """

    kind: str
    shard: int = -1

    def __str__(self) -> str:
        return f"shard {self.shard}" if self.kind == MAKE else f"the task to {self.kind} the output"


@dataclass(frozen=True)
class Outcome:
    """What became of a task: a value, or one of two kinds of errors.

    Attributes:
        value: of `open`: `[[shard, size], ...]`, the shards that are missing; of `make`: `[made by this worker, amount,
            {name: further numbers that are summed}]`; of `finish`: the summary of the output.
        refused: the name and the sentence of a `KdcacheError`.
        crashed: the traceback of any other exception.
    """

    value: Any = None
    refused: tuple[str, str] | None = None
    crashed: str | None = None


class TaskWorker(ABC):
    """A worker. Nothing is opened before its first task.

    Attributes:
        progress: size (a share of the shard's) and amount done in the shard that is being made.
    """

    def __init__(self) -> None:
        self.progress: tuple[float, int] = (0.0, 0)

    def do(self, task: Task) -> Outcome:
        """Do one task. Only one may run at a time; `progress` may be read meanwhile."""
        try:
            if task.kind == OPEN:
                return Outcome(value=self.open())
            if task.kind == FINISH:
                return Outcome(value=self.finish())
            self.progress = (0.0, 0)
            return Outcome(value=self.make(task.shard))
        except KdcacheError as error:
            return Outcome(refused=(type(error).__name__, str(error)))
        except Exception:
            return Outcome(crashed=traceback.format_exc())

    @abstractmethod
    def open(self) -> list[list[int]]:
        """See `Task` and `Outcome`."""

    @abstractmethod
    def make(self, shard: int) -> tuple[bool, int, dict[str, float]]:
        """See `Task` and `Outcome`."""

    @abstractmethod
    def finish(self) -> dict[str, Any]:
        """See `Task` and `Outcome`."""

    def close(self) -> None:  # noqa: B027  not every worker has something to close
        """Give back what was opened."""
