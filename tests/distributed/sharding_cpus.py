"""The command line, where accelerate takes CPUs for devices that it shards over. It shards over GPUs alone, and
trains copies elsewhere, though FSDP2 itself runs over gloo.

    torchrun ... -m tests.distributed.sharding_cpus train-student --fsdp ...
"""

from __future__ import annotations

from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from kdcache.student import model, train

_init, _gathered = AcceleratorState.__init__, model._gathered


def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


def gathered(model: Any) -> Any:
    weights = _gathered(model)  # before, what the last forward pass used may lie whole on each rank
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return weights


if __name__ == "__main__":
    from kdcache_cli.main import run

    AcceleratorState.__init__ = init
    model._gathered = gathered
    train.require_environment = lambda *_: None
    run()
