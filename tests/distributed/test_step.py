"""Two ranks under DDP or FSDP2 make the gradients of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdcache.student.fused_head import fuse_head
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
    assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert found["sums"].keys() == sums.keys()
    for name, value in sums.items():
        assert found["sums"][name].item() == pytest.approx(value.item(), rel=1e-6), name
    own = {name: p.grad for name, p in model.named_parameters()}
    assert found["gradients"].keys() == own.keys()
    for name, gradient in own.items():
        off = (found["gradients"][name] - gradient).abs().max() / gradient.abs().max()
        assert off <= 1e-6, f"{name} is off by {off:.2g}"
