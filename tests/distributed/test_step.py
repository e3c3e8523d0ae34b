"""Two ranks under DDP or FSDP2 make the gradients of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdcache.student.fused_head import fuse_head
from tests.bounds import require_close
from tests.distributed import ranks
from tests.processes import Ranks


@pytest.mark.slow
@pytest.mark.parametrize("way", ranks.WAYS)
def test_two_ranks_are_one_process(way: str, tmp_path: Path) -> None:
    model = ranks.make(way)
    loss, sums = ranks.step(model, fuse_head(model, "cpu"), slice(0, ranks.ROWS), 1)
    out = tmp_path / "gradients.pt"
    both = Ranks(2, "-m", "tests.distributed.ranks", way, out)
    _, words = both.communicate()
    assert both.returncode == 0, words
    found = torch.load(out, weights_only=True)
    require_close(found["loss"], loss.double(), torch.float32, what="the loss")
    assert found["sums"].keys() == sums.keys()
    for name, value in sums.items():
        require_close(found["sums"][name], value.double(), torch.float32, what=name)
    own = {name: p.grad for name, p in model.named_parameters()}
    assert found["gradients"].keys() == own.keys()
    for name, gradient in own.items():
        require_close(found["gradients"][name], gradient.double(), torch.float32, roundings=128, what=name)
