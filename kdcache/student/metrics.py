"""Acceptance: the share of a student's drafts that the teacher takes, as far as stored targets tell.

Speculative decoding accepts a draft with probability sum_v min(p_v, q_v) (Leviathan et al. 2023, arXiv 2211.17192,
corollary 3.6). Truncated targets know p on the entries and the mass r of the rest, so with s the student's mass there

    sum_K min(p, q)  <=  acceptance  <=  sum_K min(p, q) + min(r, s)

and both ends meet where everything is kept. Sampled targets bound nothing: a weight is a random number whose mean is
p, and min(w, q) is concave in w, so its mean lies below min(p, q) by an amount that nobody knows.

Shapes: M positions, V vocabulary, K entries.

Calibration: whether a model that says 0.7 is right seven times in ten.

The expected calibration error of Guo et al. 2017 (arXiv 1706.04599, eq. 3): positions are sorted by the largest
probability that the model gives any token, its confidence, into 15 bins of equal width, and

    ECE = sum_b n_b / N |accuracy_b - confidence_b|

where a position counts as right if no token is more likely than the true next one. Even a perfectly calibrated model
has an ECE above 0, of up to sqrt(bins / 4N): the noise of each bin's accuracy enters with its absolute value.

Shapes: M positions, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.targets import SparseTargets

BINS = 15


class Calibration:
    """Counts and sums by bin, in float64, of any number of batches."""

    def __init__(self) -> None:
        self._sums = torch.zeros(3, BINS, dtype=torch.float64)  # positions, confidence, right ones

    def add(self, logits: Tensor, log_partition: Tensor, labels: Tensor) -> None:
        """Count the positions of a batch.

        Args:
            logits: `[M, V]`.
            log_partition: `[M]` log sum_v e^(z_v) of them.
            labels: `[M]` true next tokens.
        """
        peak = logits.amax(-1)  # a fifth of the time of `max`, which looks for the place as well
        right = logits.gather(-1, labels[:, None])[:, 0] >= peak
        confidence = (peak.float() - log_partition).exp().clamp(max=1).cpu().double()
        bins = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)  # a bin holds its upper edge
        columns = torch.stack([torch.ones_like(confidence), confidence, right.cpu().double()])
        self._sums.index_add_(1, bins, columns)

    def join(self, other: Calibration) -> None:
        """Add what another counted."""
        self._sums += other._sums

    @property
    def error(self) -> float:
        """The expected calibration error; 0 if nothing was counted."""
        positions, confidence, right = self._sums
        return float((right - confidence).abs().sum() / positions.sum().clamp(min=1))

    def bins(self) -> list[dict[str, Any]]:
        """Each bin: `low`, `high`, `positions`, and the means `confidence` and `accuracy`, None where it is empty."""
        found = []
        for number, (positions, confidence, right) in enumerate(self._sums.T.tolist()):
            some = positions > 0
            found.append({
                "low": number / BINS, "high": (number + 1) / BINS, "positions": int(positions),
                "confidence": confidence / positions if some else None,
                "accuracy": right / positions if some else None,
            })  # fmt: skip
        return found


def acceptance_bounds(logits: Tensor, log_partition: Tensor, targets: SparseTargets) -> tuple[Tensor, Tensor] | None:
    """The least and the most that the acceptance at each position can be, at T = 1.

    Args:
        logits: `[M, V]` of the student.
        log_partition: `[M]` log sum_v e^(z_v) of them.
        targets: over the same positions.

    Returns:
        `[M]` each; None for sampled targets.
    """
    if targets.sampled:
        return None
    log_p, log_tail = targets.at_temperature(1.0)
    kept = targets.valid
    q = torch.where(kept, (logits.gather(-1, targets.ids.long()) - log_partition[:, None]).exp(), 0.0)
    low = torch.minimum(torch.where(kept, log_p.exp(), 0.0), q).sum(-1)
    rest = (1 - q.sum(-1)).clamp(min=0)  # rounded by some 1e-7, which a sum of masses does not notice
    return low, low + torch.minimum(log_tail.exp(), rest)
