"""Losses on a device: as exact as the textbook's formula there, no [N, V], and sharded by FSDP."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kdcache import Selection, select, sparse_kd_loss
from tests.bounds import require_close
from tests.distributed import ranks
from tests.objects import free_port
from tests.oracle import COMBINATIONS, step_loss, targets_of

N, D, V, K = 48, 32, 500, 9


def problem(device: str, dtype: torch.dtype) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states, head and bias; a teacher's logits in float64; labels. The same numbers on every device."""
    g = torch.Generator().manual_seed(0)
    leaves = [torch.randn(*shape, generator=g).to(device, dtype) for shape in ((N, D), (V, D), (V,))]
    teacher = 2 * torch.randn(N, V, generator=g, dtype=torch.float64)
    labels = torch.randint(V, (N,), generator=g)
    labels[::2], labels[::5] = teacher.argmax(-1)[::2], -100
    return leaves, teacher.to(device), labels.to(device)


@pytest.mark.filterwarnings("ignore:tail '.*' is (biased|blind):UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("loss", "tail"), COMBINATIONS)
def test_value_and_gradients_against_float64(loss: str, tail: str, dtype: torch.dtype, device: str) -> None:
    given, teacher, labels = problem(device, dtype)
    temperature = 1.0 if tail == "label-sample" else 2.0
    targets = targets_of(teacher, K, (1.0, 2.0), labels)

    def textbook(kind: torch.dtype) -> list[Tensor]:
        leaves = [x.to(kind).requires_grad_() for x in given]
        logits = torch.nn.functional.linear(*leaves)
        value = step_loss(logits, teacher, targets.ids, labels, loss, tail, temperature, 0.7)
        return [value.detach().double(), *(x.double() for x in torch.autograd.grad(value, leaves))]

    leaves = [x.clone().requires_grad_() for x in given]
    value = sparse_kd_loss(
        leaves[0], leaves[1], targets, labels=labels, bias=leaves[2], loss=loss, tail=tail, temperature=temperature,
        soft_weight=0.7,
    )  # fmt: skip
    ours = [value.detach().double(), *(x.double() for x in torch.autograd.grad(value, leaves))]
    names = ("value", "hidden", "weight", "bias")
    for name, mine, plain, true in zip(names, ours, textbook(dtype), textbook(torch.float64), strict=True):
        require_close(mine, true, dtype, plain, what=f"{name} of {loss}, {tail}")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_the_head_in_tiles_takes_little_memory() -> None:
    """Above what is there before and the two gradients: less than an eighth of the logits in float32."""
    n, d, v = 16_384, 1024, 128_256
    g = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(rows, d, generator=g, device="cuda", dtype=torch.bfloat16) for rows in (n, v))
    few = select(torch.randn(64, v, generator=g, device="cuda"), Selection(k=16))
    targets = type(few).cat([few] * (n // 64))
    for leaf in (hidden, weight):
        leaf.requires_grad_()
    sparse_kd_loss(hidden[:256], weight, targets[:256]).backward()  # what libraries keep from their first use
    hidden.grad = weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    sparse_kd_loss(hidden, weight, targets).backward()
    working = torch.cuda.max_memory_allocated() - before - 2 * (n + v) * d
    assert working < n * v * 4 / 8, f"{working / 2**20:.0f} MiB"


@pytest.mark.parametrize("way", ["ddp", "fsdp", "fsdp-tied"])
def test_one_rank_is_one_process(way: str, device_of_commands: str, tmp_path: Path) -> None:
    """Under DDP or FSDP2 of a single rank, over NCCL on a GPU: the gradients of the same step without it."""
    out = tmp_path / "gradients.pt"
    environment = {
        **os.environ, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.distributed.ranks", way, str(out), device_of_commands]
    done = subprocess.run(
        command,
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = torch.load(out, weights_only=True)
    model = ranks.make(way).to(device_of_commands)
    loss, _ = ranks.step(model, ranks.fuse_head(model, device_of_commands), slice(0, ranks.ROWS), 1)
    require_close(found["loss"].cpu(), loss.double().cpu(), torch.float32, what="the loss")
    for name, p in model.named_parameters():
        assert p.grad is not None
        require_close(found["gradients"][name], p.grad.double().cpu(), torch.float32, roundings=128, what=name)
