"""Launch: a crew of the kind that `--launch` names, for as long as a command needs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from kdcache.crew.assign import Crew
from kdcache.launcher import LaunchOptions
from kdcache.ray_cluster import require_ray


@contextlib.contextmanager
def launched(module: str, config: Any, options: LaunchOptions, device: str) -> Iterator[Crew]:
    """The workers that the options ask for, which all end with the context.

    Args:
        module: its `make_worker` makes a `TaskWorker` of the fields of the configuration, and it can be run,
            `python -m module`, as a worker that serves its driver.
        config: a dataclass, whose fields each worker is given.
        options: who starts the workers, how many, and what each may use.
        device: that the workers run on.

    Raises:
        ConfigError: more GPUs for a worker than there are; Ray is not installed, or no cluster answers.
    """
    if options.launch == "local":
        from kdcache.crew.processes import local_workers

        with local_workers(module, config, options, device) as processes:
            yield processes
        return
    require_ray()
    from kdcache.crew.actors import ray_workers

    with ray_workers(module, config, options, device) as actors:
        yield actors
