"""What a worker of a launched dump does: it holds the teacher open, and makes the shards that the driver names."""

from __future__ import annotations

from typing import Any

from kdcache.crew.processes import serve
from kdcache.crew.tasks import TaskWorker
from kdcache.plugins import load_inherited
from kdcache.teacher.config import DumpConfig


class ShardWorker(TaskWorker):
    """A worker of a dump. The size of a shard is its documents; the amount is its labelled slots."""

    def __init__(self, config: DumpConfig) -> None:
        super().__init__()
        self._config = config
        self._maker: Any = None

    def close(self) -> None:
        """Close the teacher."""
        if self._maker is not None:
            self._maker.close()

    def open(self) -> list[list[int]]:
        """See `TaskWorker`."""
        from kdcache.store.commits import read_commits
        from kdcache.teacher.shard_maker import ShardMaker

        load_inherited()
        self._maker = maker = ShardMaker(self._config)
        if maker.done:  # refuses a damaged commit
            read_commits(maker.storage, maker.writer.manifest, sorted(maker.done))
        maker.create()
        plan = maker.inputs.plan
        return [[shard, plan.documents_of(shard)] for shard in range(len(plan)) if shard not in maker.done]

    def make(self, shard: int) -> tuple[bool, int, dict[str, float]]:
        """See `TaskWorker`; further numbers: `waited` seconds, and `reused_positions` and `reused_documents`."""
        waited, before = self._maker.stalled_seconds, dict(self._maker.reused)
        made = self._maker.make(shard, self._show)
        ours = made is not None and made.committed
        reused = {f"reused_{name}": after - before[name] for name, after in self._maker.reused.items()}
        return ours, made.labels if ours else 0, {"waited": self._maker.stalled_seconds - waited, **reused}

    def finish(self) -> dict[str, Any]:
        """See `TaskWorker`."""
        writer = self._maker.writer
        return {**writer.finish(), "extras": writer.manifest.extras}

    def _show(self, documents: float, positions: int) -> None:
        self.progress = (documents, positions)


def make_worker(fields: dict[str, Any]) -> ShardWorker:
    """A worker of the dump that the fields configure."""
    return ShardWorker(DumpConfig(**fields))


if __name__ == "__main__":
    serve(make_worker)
