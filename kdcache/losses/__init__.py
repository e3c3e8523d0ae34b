"""Losses on sparse targets, from one primitive that never keeps `[positions, vocabulary]`.

    divergence_registry.py  divergences by name, and the terms of a loss
    divergences.py          those that come along
    target_losses.py        the loss of each position, by kind of target and by what is made of the tail
    aligned_losses.py       those for a student with another tokenizer
    rollout_loss.py         that of a token which the student's earlier self drew
    pool.py                 targets of several teachers, and the weight of each
    union.py                the entries of several targets, gathered once
    logit_sources.py        where logits come from: an output head, or logits that exist
    fused_linear.py         the primitive: tiles of logits, reduced and turned into their gradient in place
    position_metrics.py     a student's figures at each position, from the same tiles
    given_faults.py         checks of targets and labels that a caller gives by hand
    step_loss.py            the loss of an optimiser step
    position_weights.py     how much each position counts in it

docs/mathematics.md derives each loss and its gradient.
"""

from __future__ import annotations

import kdcache.losses.divergences  # noqa: F401 - registers those that come along
from kdcache.losses.divergence_registry import Constants, TeacherDistribution, divergence_names, register_divergence
from kdcache.losses.fused_linear import StudentTile, linear_lse_gather
from kdcache.losses.logit_sources import LinearHead, LogitSource, StoredLogits
from kdcache.losses.pool import Pool
from kdcache.losses.position_metrics import Figures, divisor_of, measure, measure_labels, measure_positions, of_teacher
from kdcache.losses.position_weights import PositionWeights
from kdcache.losses.step_loss import Objective, distil, sparse_kd_loss, sparse_kd_loss_from_logits
from kdcache.losses.target_losses import TAILS

__all__ = [
    "TAILS",
    "Constants",
    "Figures",
    "LinearHead",
    "LogitSource",
    "Objective",
    "Pool",
    "PositionWeights",
    "StoredLogits",
    "StudentTile",
    "TeacherDistribution",
    "distil",
    "divergence_names",
    "divisor_of",
    "linear_lse_gather",
    "measure",
    "measure_labels",
    "measure_positions",
    "of_teacher",
    "register_divergence",
    "sparse_kd_loss",
    "sparse_kd_loss_from_logits",
]
