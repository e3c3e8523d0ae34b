"""Losses on sparse targets, from one primitive that never keeps `[positions, vocabulary]`.

    divergences.py   the registry: forward and reverse KL, their skewed forms, JSD, TVD
    aims.py          what targets ask of a student: buckets, other tails, sampled weights
    pool.py          targets of several teachers, and the weight of each
    union.py         the entries of several targets, gathered once
    tile.py          one tile of logits, reduced and turned into its gradient in place
    heads.py         where logits come from: an output head, or logits that exist
    primitive.py     the functions of autograd that walk the tiles
    figures.py       how a student does at each position, from the same tiles
    weights.py       how much each position counts
    distillation.py  the loss of a step

docs/mathematics.md derives each loss and its gradient.
"""

from __future__ import annotations

from kdcache.losses.divergences import TeacherDistribution, divergence_names, register_divergence
from kdcache.losses.fused_linear import StudentTile, linear_lse_gather
from kdcache.losses.logit_sources import LinearHead, LogitSource, StoredLogits
from kdcache.losses.pool import Pool
from kdcache.losses.position_metrics import Figures, divisor_of, measure, measure_labels, measure_positions, of_teacher
from kdcache.losses.step_loss import Objective, PositionWeights, distil, sparse_kd_loss, sparse_kd_loss_from_logits
from kdcache.losses.target_losses import TAILS

__all__ = [
    "TAILS",
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
