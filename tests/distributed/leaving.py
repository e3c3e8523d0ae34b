"""How a rank of a test ends: once all ranks have done all they do together, and without a teardown.

The teardown of gloo's groups and of the interpreter hangs or aborts now and then, and a rank that just leaves may take
with it what another still waits for. The launcher's store outlives both.
"""

from __future__ import annotations

import os
import sys


def leave() -> None:
    """End this process."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    store.set(f"left/{dist.get_rank()}", "")
    store.wait([f"left/{rank}" for rank in range(dist.get_world_size())])
    sys.stdout.flush()
    os._exit(0)
