"""Train a student from a cache in plain PyTorch: in one process, or sharded over ranks with FSDP2.

    python examples/plain_pytorch.py CACHE STUDENT OUT STEPS
    torchrun --nproc-per-node 2 examples/plain_pytorch.py CACHE STUDENT OUT STEPS

Prints one line of JSON for each step. The steps are the same for any number of ranks.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from kdcache import open_cache
from kdcache.losses import Objective
from kdcache.student import (
    Collator,
    Mixture,
    RowDataset,
    RunOrder,
    compute_loss,
    count_items,
    fuse_head,
    load_student,
    save_student,
)

ROWS_PER_STEP, LR, SEED = 8, 1e-3, 0  # rows of all ranks together


def main(cache_path, student, out, steps):
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    cache = open_cache(cache_path)
    model = load_student(student, cache, torch.device(device), SEED).train()  # refused if it does not fit the cache
    head = fuse_head(model, device)  # before the model is wrapped or sharded
    if world > 1:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        for part in [*model.base_model.layers, model]:
            fully_shard(part)
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR)

    order = list(RunOrder(Mixture([len(cache)], SEED), steps * ROWS_PER_STEP))
    mine = [order[first + rank : first + ROWS_PER_STEP : world] for first in range(0, len(order), ROWS_PER_STEP)]
    data = RowDataset([cache], [range(len(cache))])
    for step, batch in enumerate(DataLoader(data, batch_sampler=mine, collate_fn=Collator([cache]))):
        items = count_items(batch).to(device)  # positions of the whole step, not of this rank
        if world > 1:
            dist.all_reduce(items)
        loss = compute_loss(  # FSDP takes the mean over ranks where a sum is needed, hence items / world
            model, head, batch, Objective(soft_weight=0.9),
            vocab_size=cache.manifest.vocab_size, num_items=items / world,
        )  # fmt: skip
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        loss = loss.detach() / world
        if world > 1:
            dist.all_reduce(loss)
        if rank == 0:
            print(json.dumps({"step": step + 1, "loss": loss.item()}), flush=True)

    save_student(model, cache, out)  # on every rank: it gathers the sharded weights
    return model


if __name__ == "__main__":
    main(*sys.argv[1:4], steps=int(sys.argv[4]))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
