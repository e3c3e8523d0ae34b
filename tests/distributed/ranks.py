"""One rank of a distributed step, for test_step.py: WAY OUT [DEVICE]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kdcache import Selection, SparseTargets, select
from kdcache.isolation import packed_forward
from kdcache.losses import Figures, Objective, distil
from kdcache.student.fused_head import fuse_head
from tests.distributed.leaving import leave

VOCAB, ROWS, LENGTH = 90, 4, 16
OBJECTIVE = Objective(loss="forward-kl", temperature=2.0, soft_weight=0.7)
WAYS = ("ddp", "ddp-tied", "fsdp", "fsdp-tied", "fsdp-own-head")


def make(way: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=way.endswith("tied"),
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def batch() -> tuple[Tensor, Tensor, SparseTargets]:
    """Four rows with very different numbers of labels; the targets of the labelled slots, half of which carry one."""
    g = torch.Generator().manual_seed(0)
    tokens, labels = torch.randint(VOCAB, (2, ROWS, LENGTH), generator=g).unbind()
    labels[0, 3:], labels[3, ::2] = -100, -100
    teacher = 3 * torch.randn(int((labels != -100).sum()), VOCAB, generator=g)
    targets = select(teacher, Selection(k=8), temperatures=(1.0, 2.0))
    chosen = targets.entropy > targets.entropy.median()
    return tokens, labels, targets[chosen].spread(chosen.nonzero()[:, 0], len(chosen))


def step(model: Any, head: Any, rows: slice, world: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of some rows, each term divided by its positions in all rows (and by 1 / world: ranks are averaged)."""
    device = next(model.parameters()).device
    tokens, labels, targets = (value.to(device) for value in batch())
    mask = labels != -100
    place = mask.nonzero()[:, 0]
    mine = targets[(place >= rows.start) & (place < rows.stop)]
    figures, chosen, told = Figures(), mask[rows], labels[rows]

    def on_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        source = head.source(hidden[chosen], weight, bias, VOCAB)
        counts = {"num_items": int(mask.sum()) / world, "num_targets": int((targets.count > 0).sum()) / world}
        return distil(source, mine, told[chosen], OBJECTIVE, **counts, figures=figures)

    positions = torch.arange(LENGTH, device=device).repeat(len(told), 1)
    loss = packed_forward(model, tokens[rows], positions, on_head=on_head)
    loss.backward()
    return loss.detach(), {name: values.sum() for name, values in figures.values().items()}


def main(way: str, out: Path, device: str = "cpu") -> None:
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    dist.init_process_group("gloo" if device == "cpu" else "nccl")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = make(way).to(device)
    head = fuse_head(model, device)
    wrapped = model
    if way.startswith("ddp"):
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device, (world,))
        parts = [*model.model.layers, *([model.lm_head] if way == "fsdp-own-head" else [])]
        for part in [*parts, model]:
            fully_shard(part, mesh=mesh)
        assert all(isinstance(p, DTensor) for p in model.parameters())
    share = ROWS // world
    loss, sums = step(wrapped, head, slice(rank * share, (rank + 1) * share), world)
    gradients = {}
    for name, p in model.named_parameters():
        assert isinstance(p.grad, DTensor) == way.startswith("fsdp")
        gradients[name] = (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).cpu()
    for value in (loss, *sums.values()):
        dist.all_reduce(value)
    if rank == 0:
        torch.save({"loss": loss / world, "sums": sums, "gradients": gradients}, out)
    leave()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
