"""Student: everything that learns from a cache. Nothing here imports the teacher's side.

    what is asked for   config.py          the options of a training run
                        row_filter.py      the fields `rows` and `where`, as values
                        preflight.py       what a run needs of the machine and its packages
    rows                caches.py          the caches of a run, their weights, and whether they can be mixed
                        multi_teacher.py   caches of several teachers over the same rows, read as one
                        split.py           which rows are trained on and which are measured
                        row_set.py         sets of rows, a bit each
                        mixture.py         one sequence of rows out of several caches
                        permutation.py     an order of rows, of which any place can be computed by itself
                        data.py            rows of caches as batches, in the order of a run
                        aligned.py         runs with `align`: which tokenizers, which losses
                        rollouts.py        what a run on text of its student's earlier self needs
                        data_workers.py    processes that read batches ahead
    the student         model.py           a student from a checkpoint, a hub name or a config.json; adapters; saving
                        own_tokenizer.py   its own tokenizer, checked against the cache's and kept
                        fused_head.py      body, output head and loss in one forward pass
                        from_teacher/      a student that is cut out of its teacher
    training            train.py           one run, from a cache to a checkpoint; the place where it resumes
                        launch.py          the ranks that Ray Train starts for it
                        schedule.py        the objective of each step
                        trainer.py         transformers.Trainer with our loss and our order of rows
                        private_api.py     the private names of transformers and accelerate that are used
                        distributed.py     what the ranks of a run exchange
                        training_advice.py the facts that advice on a run is given on
                        resume.py          what a run is, so that the same run is resumed or refused
    measuring           evaluation.py      figures over rows: nll, kl, agreement, and those of the next file
                        metrics.py         calibration, and the acceptance of drafts
                        curves.py          the curves of a run
                        model_card.py      its model card, and the versions of what it ran with

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
