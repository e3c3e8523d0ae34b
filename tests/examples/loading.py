"""The examples as modules; and, run under torchrun, the plain one with a look at what it trained.

torchrun ... -m tests.examples.loading CACHE STUDENT OUT STEPS
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    from torch.distributed.tensor import DTensor, Shard

    from tests.distributed.leaving import leave

    model = example("plain_pytorch").main(*sys.argv[1:4], steps=int(sys.argv[4]))
    assert all(isinstance(p, DTensor) and p.placements == (Shard(0),) for p in model.parameters())
    assert sum(p.to_local().numel() for p in model.parameters()) < sum(p.numel() for p in model.parameters())
    leave()
