"""Dumps by many workers that one command starts: processes of this machine, or actors of a Ray cluster.

`assign.py` decides who makes which shard, for both; `shard_worker.py` is what each worker does, on top of `ShardMaker`;
`local.py` and `ray_actors.py` are two ways to have workers. The driver, which runs `assign`, opens no teacher and no
corpus, and needs no GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kdcache.ray_cluster import require_ray
from kdcache.teacher.config import DumpOptions

if TYPE_CHECKING:
    from kdcache.teacher.dump import Progress


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
    from kdcache.teacher.launch.assign import run

    if options.launch == "local":
        from kdcache.teacher.launch.local import local_workers

        with local_workers(options) as processes:
            return run(processes, on_progress)
    require_ray()
    from kdcache.teacher.launch.ray_actors import ray_workers

    with ray_workers(options) as actors:
        return run(actors, on_progress)
