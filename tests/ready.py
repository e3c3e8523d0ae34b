"""What a ready-made process has imported when it begins (tests/processes.py).

Importing this runs nothing of kdcache's and starts no thread, but for one of pyarrow's allocator, which minds forks.
"""

from __future__ import annotations

import gc
import importlib
import os

from kdcache_cli.frame import _set_library_defaults

MODULES = (
    "datasets", "matplotlib.backends.backend_agg", "matplotlib.figure", "pydantic.main", "s3fs", "torch._dynamo",
    "torch.distributed.tensor", "transformers.models.llama.modeling_llama",
    "kdcache.convert", "kdcache.report.evaluate", "kdcache.report.inspect", "kdcache.student.train",
    "kdcache.teacher.dump", "kdcache.teacher.shard_maker", "kdcache.verify", "kdcache_cli.main", "kdcache_cli.tables",
)  # fmt: skip


def get_ready() -> None:
    """Import all that a command may import, with what it sets before that."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # the streams of these processes are files
    _set_library_defaults()
    for name in MODULES:
        importlib.import_module(name)
    from numba.core.registry import cpu_target

    from kdcache.student import data_workers
    from tests.processes import READY

    cpu_target.typing_context.refresh()  # what numba imports for its first call
    cpu_target.target_context.refresh()
    data_workers.START = READY  # the readers of such a process are ready-made as well
    gc.collect()
    gc.freeze()  # what all processes share is neither looked through nor copied


get_ready()
