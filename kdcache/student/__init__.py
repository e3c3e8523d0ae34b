"""Student: everything that learns from a cache. Nothing here imports the teacher's side.

config.py       what a training run is asked to do
choice.py       what --rows and --where say
sources.py      the caches of a run, their weights, and whether they can be mixed
teachers.py     caches of several teachers over the same rows, read as one
split.py        which rows are trained on and which are measured on
mixture.py      one sequence of rows out of several caches
data.py         rows of caches as batches, the order of a run, the rows held out
model.py        a student from a checkpoint, a hub name or a config.json
measure.py      figures over rows: nll, kl, agreement, and those of the next two
calibration.py  expected calibration error
acceptance.py   what stored targets say of speculative decoding
checkpoints.py  checkpoints that exist whole or not at all
readers.py      processes that read batches ahead
waiting.py      the share of the time that the step waited for rows
lines.py        JSON lines that a run appends to and cuts back
record.py       what a run is, so that it is gone on with as itself
ranks.py        what the processes of a run tell each other
head.py         body, output head and loss in one forward pass
adapters.py     low-rank updates, instead of all weights
loss.py         the loss of one batch
schedule.py     the objective of each step
trainer.py      transformers.Trainer with our loss and our order of rows
surroundings.py what a run needs of the machine and its packages
saving.py       a trained student on disk
train.py        one run, from a cache to a checkpoint
run_record.py   its model card, and the versions of what it ran with
curves.py       its curves

The names below are the pieces for a loop of one's own (docs/own-loop.md); they are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kdcache.student.data import Collator, RowDataset, RunOrder, labelled, split_heldout
    from kdcache.student.fused_head import FusedHead, compute_loss, count_items, fuse_head
    from kdcache.student.mixture import Mixture
    from kdcache.student.model import load_student, save_student
    from kdcache.student.trainer import DistillationTrainer

__all__ = [
    "Collator",
    "DistillationTrainer",
    "FusedHead",
    "Mixture",
    "RowDataset",
    "RunOrder",
    "compute_loss",
    "count_items",
    "fuse_head",
    "labelled",
    "load_student",
    "save_student",
    "split_heldout",
]

_HOMES = {
    "Collator": "data",
    "DistillationTrainer": "trainer",
    "FusedHead": "fused_head",
    "Mixture": "mixture",
    "RowDataset": "data",
    "RunOrder": "data",
    "compute_loss": "fused_head",
    "count_items": "fused_head",
    "fuse_head": "fused_head",
    "labelled": "data",
    "load_student": "model",
    "save_student": "model",
    "split_heldout": "data",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kdcache.student' has no attribute {name!r}")
    return getattr(importlib.import_module(f"kdcache.student.{_HOMES[name]}"), name)
