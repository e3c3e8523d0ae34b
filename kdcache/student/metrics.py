"""Calibration of a model, and the acceptance of its drafts: further figures of a report, computed a tile at a time.

**Calibration**: whether a model that says 0.7 is right seven times in ten. The expected calibration error of Guo et al.
2017 (arXiv 1706.04599, eq. 3): positions are sorted by the largest probability that the model gives any token, its
confidence, into 15 bins of equal width, and

    ECE = sum_b n_b / N |accuracy_b - confidence_b|

where a position counts as right if no token is more likely than the true next one. Even a perfectly calibrated model
has an ECE above 0, of up to sqrt(bins / 4N): the noise of each bin's accuracy enters with its absolute value.

**Acceptance**: the share of a student's drafts that the teacher accepts, as far as stored targets show. Speculative
decoding accepts a draft with probability sum_v min(p_v, q_v) (Leviathan et al. 2023, arXiv 2211.17192, corollary 3.6).
Truncated targets know p on the entries and the mass r of the rest, so with s the student's mass there

    sum_K min(p, q)  <=  acceptance  <=  sum_K min(p, q) + min(r, s)

and both ends meet where everything is kept. Sampled targets bound nothing: a weight is a random number whose mean is
p, and min(w, q) is concave in w, so its mean lies below min(p, q) by an unknown amount.

Cost: operations on `[n, K]` of a tile; nothing of the size of its logits.

Shapes: M positions, n positions of a tile, K entries.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcache.losses import StudentTile
from kdcache.targets import SparseTargets

BINS = 15


def confidence(student: StudentTile, _targets: object) -> dict[str, Tensor]:
    """`confidence`: the largest probability of any token; `correct`: 1 where no token is likelier than the label.

    The label is the last id that the tile gathered, and all values of a tile are less the largest logit.
    """
    return {
        "confidence": (-student.lse).exp().clamp(max=1),
        "correct": (student.gathered[:, -1] >= 0).to(student.lse.dtype),
    }


def acceptance_bounds(student: StudentTile, targets: SparseTargets) -> dict[str, Tensor]:
    """`acceptance_low`, `acceptance_high`: the least and the most that the acceptance at each position can be at T = 1.

    Without meaning where there is no target; empty for targets of a sampled kind.
    """
    if targets.sampled:
        return {}
    log_p, log_tail = targets.at_temperature(1.0)
    kept = targets.valid
    entries = student.gathered[:, : targets.ids.shape[-1]]
    q = torch.where(kept, (entries - student.lse[:, None]).exp(), 0.0)
    low = torch.minimum(torch.where(kept, log_p.exp(), 0.0), q).sum(-1)
    rest = torch.minimum(log_tail.exp(), (student.tail - student.lse).exp())
    return {"acceptance_low": low, "acceptance_high": low + rest}


class Calibration:
    """Counts and sums by bin, in float64, of any number of batches."""

    def __init__(self) -> None:
        self._sums = torch.zeros(3, BINS, dtype=torch.float64)  # positions, confidence, right ones

    def add(self, confidence: Tensor, correct: Tensor) -> None:
        """Count the positions of a batch.

        Args:
            confidence: `[M]` largest probability of any token.
            correct: `[M]` 1 where the label is one of the most likely tokens, else 0.
        """
        sure = confidence.cpu().double()
        bins = ((sure * BINS).ceil().long() - 1).clamp(0, BINS - 1)  # a bin holds its upper edge
        self._sums.index_add_(1, bins, torch.stack([torch.ones_like(sure), sure, correct.cpu().double()]))

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
