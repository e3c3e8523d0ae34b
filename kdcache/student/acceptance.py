"""Acceptance: the share of a student's drafts that the teacher takes, as far as stored targets tell.

Speculative decoding accepts a draft with probability sum_v min(p_v, q_v) (Leviathan et al. 2023, arXiv 2211.17192,
corollary 3.6). Truncated targets know p on the entries and the mass r of the rest, so with s the student's mass there

    sum_K min(p, q)  <=  acceptance  <=  sum_K min(p, q) + min(r, s)

and both ends meet where everything is kept. Sampled targets bound nothing: a weight is a random number whose mean is
p, and min(w, q) is concave in w, so its mean lies below min(p, q) by an amount that nobody knows.

Shapes: M positions, V vocabulary, K entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.targets import SAMPLED_KINDS, SparseTargets


def acceptance_bounds(logits: Tensor, log_partition: Tensor, targets: SparseTargets) -> tuple[Tensor, Tensor] | None:
    """The least and the most that the acceptance at each position can be, at T = 1.

    Args:
        logits: `[M, V]` of the student.
        log_partition: `[M]` log sum_v e^(z_v) of them.
        targets: over the same positions.

    Returns:
        `[M]` each; None for sampled targets.
    """
    if targets.kind in SAMPLED_KINDS:
        return None
    log_p, log_tail = targets.at_temperature(1.0)
    kept = targets.valid
    q = torch.where(kept, (logits.gather(-1, targets.ids.long()) - log_partition[:, None]).exp(), 0.0)
    low = torch.minimum(torch.where(kept, log_p.exp(), 0.0), q).sum(-1)
    rest = (1 - q.sum(-1)).clamp(min=0)  # rounded by some 1e-7, which a sum of masses does not notice
    return low, low + torch.minimum(log_tail.exp(), rest)
