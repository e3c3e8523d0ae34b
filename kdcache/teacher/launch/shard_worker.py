"""What a worker of a launched dump does: it holds the teacher open, and makes the shards that the driver names.

Each answer is an `Outcome` of plain values, errors included, so that it crosses to any driver: a `KdcacheError` as its
name and sentence, any other exception as its traceback.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from typing import Any

from kdcache.errors import KdcacheError
from kdcache.plugins import load_inherited
from kdcache.teacher.config import DumpConfig

OPEN, MAKE, FINISH = "open", "make", "finish"


@dataclass(frozen=True)
class Task:
    """What a worker is asked to do.

    Attributes:
        kind: `open`: open the inputs, and create the cache if there is none; `make`: make a shard; `finish`: seal the
            cache, and count.
        shard: which one is made.
    """

    kind: str
    shard: int = -1

    def __str__(self) -> str:
        return f"shard {self.shard}" if self.kind == MAKE else f"the task to {self.kind} the cache"


@dataclass(frozen=True)
class Outcome:
    """What became of a task: a value, or one of two kinds of errors.

    Attributes:
        value: of `open`: `[[shard, documents], ...]`, the shards that are not committed; of `make`: `[committed by this
            worker, labelled slots, seconds that the teacher waited, positions and documents that were copied]`; of
            `finish`: the summary of the cache.
        refused: the name and the sentence of a `KdcacheError`.
        crashed: the traceback of any other exception.
    """

    value: Any = None
    refused: tuple[str, str] | None = None
    crashed: str | None = None


class ShardWorker:
    """A worker. Nothing is opened before its first task.

    Attributes:
        progress: documents (a share of the shard's) and labelled slots done in the shard that is being made.
    """

    def __init__(self, config: DumpConfig) -> None:
        self._config = config
        self._maker: Any = None
        self.progress: tuple[float, int] = (0.0, 0)

    def do(self, task: Task) -> Outcome:
        """Do one task. Only one may run at a time; `progress` may be read meanwhile."""
        try:
            return Outcome(value=getattr(self, f"_{task.kind}")(task.shard))
        except KdcacheError as error:
            return Outcome(refused=(type(error).__name__, str(error)))
        except Exception:
            return Outcome(crashed=traceback.format_exc())

    def close(self) -> None:
        """Close the teacher."""
        if self._maker is not None:
            self._maker.close()

    def _open(self, _shard: int) -> list[list[int]]:
        from kdcache.store.commits import read_commits
        from kdcache.teacher.shard_maker import ShardMaker

        load_inherited()
        self._maker = maker = ShardMaker(self._config)
        if maker.done:  # refuses a damaged commit
            read_commits(maker.storage, maker.writer.manifest, sorted(maker.done))
        maker.create()
        plan = maker.inputs.plan
        return [[shard, plan.documents_of(shard)] for shard in range(len(plan)) if shard not in maker.done]

    def _make(self, number: int) -> tuple[bool, int, float, int, int]:
        self.progress = (0.0, 0)
        waited, before = self._maker.stalled_seconds, dict(self._maker.reused)
        made = self._maker.make(number, self._show)
        ours = made is not None and made.committed
        positions, documents = (self._maker.reused[name] - before[name] for name in ("positions", "documents"))
        return ours, made.labels if ours else 0, self._maker.stalled_seconds - waited, positions, documents

    def _finish(self, _shard: int) -> dict[str, Any]:
        writer = self._maker.writer
        return {**writer.finish(), "extras": writer.manifest.extras}

    def _show(self, documents: float, positions: int) -> None:
        self.progress = (documents, positions)
