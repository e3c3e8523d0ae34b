"""What a worker of a launched generation does: it holds the model open, and makes the shards that the driver names."""

from __future__ import annotations

from typing import Any

from kdcache.crew.processes import serve
from kdcache.crew.tasks import TaskWorker
from kdcache.generation.options import GenerateConfig
from kdcache.plugins import load_inherited


class CorpusWorker(TaskWorker):
    """A worker of a generation. The size of a shard is its completions; the amount is the tokens that were written."""

    def __init__(self, config: GenerateConfig) -> None:
        super().__init__()
        self._config = config
        self._maker: Any = None

    def open(self) -> list[list[int]]:
        """See `TaskWorker`."""
        from kdcache.generation.corpus_maker import CorpusMaker

        load_inherited()
        self._maker = maker = CorpusMaker(self._config)
        return [[shard, maker.completions_of(shard)] for shard in maker.missing()]

    def make(self, shard: int) -> tuple[bool, int, dict[str, float]]:
        """See `TaskWorker`; further numbers: those of `CorpusMaker.make`."""
        ours, counts = self._maker.make(shard, self._show)
        return ours, counts.pop("tokens", 0), dict(counts)

    def finish(self) -> dict[str, Any]:
        """See `TaskWorker`."""
        found: dict[str, Any] = self._maker.describe()
        return found

    def _show(self, completions: float, tokens: int) -> None:
        self.progress = (completions, tokens)


def make_worker(fields: dict[str, Any]) -> CorpusWorker:
    """A worker of the generation that the fields configure."""
    return CorpusWorker(GenerateConfig(**fields))


if __name__ == "__main__":
    serve(make_worker)
