"""Generate: write a corpus, in this process or by workers that are started for it."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from kdcache.crew.assign import Progress, run
from kdcache.crew.launch import launched
from kdcache.generation.corpus_maker import CorpusMaker
from kdcache.generation.options import GenerateConfig, GenerateOptions
from kdcache.worker import find_worker

_WORKER = "kdcache.generation.corpus_worker"
_DROPPED = "dropped."


def generate(options: GenerateOptions, on_progress: Progress | None = None) -> dict[str, Any]:
    """Write the shards that are not there yet, or this worker's share of them.

    Args:
        options: of the command.
        on_progress: called with completions done, completions to do, and tokens written so far.

    Returns:
        The summary that `kdcache generate --json` prints.

    Raises:
        KdcacheError: see the exception tree; nothing already written is harmed.
        Stopped: a signal came; the shard is written if that took no longer than the grace time.
    """
    if options.launch is None:
        return _by_this_process(options.config, on_progress)
    with launched(_WORKER, options.config, options, options.device) as crew:
        done = run(crew, on_progress)
    more = {"workers": done.workers, "replaced": done.replaced}
    return _summary(done.summary, done.made, {**done.totals, "tokens": done.amount}, "0/1", done.seconds) | more


def _by_this_process(config: GenerateConfig, on_progress: Progress | None) -> dict[str, Any]:
    started = time.perf_counter()
    worker = find_worker(config.worker, os.environ)
    maker = CorpusMaker(config)
    mine = [shard for shard in maker.missing() if worker.owns(shard)]
    total, done, made = sum(maker.completions_of(shard) for shard in mine), 0, 0
    counts: Counter[str] = Counter()

    def showing(done: int, tokens: int) -> Callable[[float, int], None]:
        def show(completions: float, more: int) -> None:
            if on_progress:
                on_progress(done + int(completions), total, tokens + more)

        return show

    for shard in mine:
        ours, found = maker.make(shard, showing(done, counts["tokens"]))
        counts.update(found)
        made, done = made + ours, done + maker.completions_of(shard)
    if on_progress and mine:
        on_progress(done, total, counts["tokens"])
    return _summary(maker.describe(), made, counts, str(worker), time.perf_counter() - started)


def _summary(
    described: dict[str, Any], made: int, counts: Mapping[str, float], worker: str, seconds: float
) -> dict[str, Any]:
    """What there is of a corpus, and what was written of it now."""
    described["shards"]["by_this_worker"] = made
    dropped = {name.removeprefix(_DROPPED): int(counts[name]) for name in sorted(counts) if name.startswith(_DROPPED)}
    return {
        **described,
        **{name: int(counts.get(name, 0)) for name in ("completions", "tokens", "ended")},
        "dropped": dropped,
        "worker": worker,
        "seconds": seconds,
        "tokens_per_second": counts.get("tokens", 0) / seconds,
    }
