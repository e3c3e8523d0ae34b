"""A dump, by this process or by the workers that one command starts.

`kdcache.crew` has the workers, of this machine or of a Ray cluster, and decides who makes which shard;
`shard_worker.py` is what each of them does. The driver opens no teacher and no corpus, and needs no GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdcache.teacher.config import DumpOptions

if TYPE_CHECKING:
    from kdcache.crew.assign import Progress, Run

_WORKER = "kdcache.teacher.shard_worker"


def launch(options: DumpOptions, on_progress: Progress | None = None) -> dict[str, Any]:
    """Run a dump: in this process, or by the workers that the options ask for.

    Returns:
        The summary that `kdcache dump-teacher --json` prints.

    Raises:
        KdcacheError: see the exception tree; nothing already written is harmed.
    """
    if options.launch is None:
        from kdcache.teacher.dump import dump

        return dump(options.config, on_progress, create_only=options.create_only)
    from kdcache.crew.assign import run
    from kdcache.crew.launch import launched

    with launched(_WORKER, options.config, options, options.device) as crew:
        return _summary(run(crew, on_progress))


def _summary(done: Run) -> dict[str, Any]:
    """What a crew has dumped."""
    done.summary["shards"]["by_this_worker"] = done.made
    return {
        **done.summary,
        "worker": "0/1",
        "workers": done.workers,
        "replaced": done.replaced,
        "seconds": done.seconds,
        "waited_seconds": done.totals["waited"],
        "reused": {name: int(done.totals[f"reused_{name}"]) for name in ("positions", "documents")},
        "positions_per_second": done.amount / done.seconds,
    }
