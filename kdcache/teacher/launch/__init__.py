"""Dumps by many workers that one command starts: processes of this machine, or actors of a Ray cluster.

`kdcache.crew` decides who makes which shard, for both, and has the workers of this machine; `shard_worker.py` is what
each worker does, on top of `ShardMaker`; `ray_actors.py` has workers of a cluster. The driver opens no teacher and no
corpus, and needs no GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdcache.ray_cluster import require_ray
from kdcache.teacher.config import DumpOptions

if TYPE_CHECKING:
    from kdcache.crew.assign import Progress, Run

_WORKER = "kdcache.teacher.launch.shard_worker"


def launch(options: DumpOptions, on_progress: Progress | None = None) -> dict[str, Any]:
    """Run a dump: in this process, or by the workers that the options ask for.

    Returns:
        The summary that `kdcache dump-teacher --json` prints.

    Raises:
        KdcacheError: see the exception tree; nothing already written is harmed.
    """
    if options.launch is None:
        from kdcache.teacher.dump import dump

        return dump(options.config, on_progress)
    from kdcache.crew.assign import run

    if options.launch == "local":
        from kdcache.crew.processes import local_workers

        with local_workers(_WORKER, options.config, options, options.device) as processes:
            return _summary(run(processes, on_progress))
    require_ray()
    from kdcache.teacher.launch.ray_actors import ray_workers

    with ray_workers(options) as actors:
        return _summary(run(actors, on_progress))


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
