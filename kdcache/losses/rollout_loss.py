"""Rollouts: reverse KL from one sampled token a position, of which only three log-probabilities are known.

A writer mu, an earlier state of the student, wrote the text. Of its token a at a position, the rollout keeps log mu(a)
and the cache log p(a); the student's own log q(a) is made by its forward pass. With x = log q(a) - log p(a) and the
importance ratio rho = q(a) / mu(a),

    loss = min(rho, c) x^2 / 2           the ratio without a gradient
    gradient = min(rho, c) x grad log q(a)

Unclipped, its mean over a ~ mu is sum_a q(a) x(a) grad log q(a), which is the gradient of KL(q ‖ p) at that position,
as sum_a q(a) grad log q(a) = 0. So the expected gradient is exact for any writer that gives no token of q the
probability 0; the value is no estimate of the KL, but it is never negative and 0 only where q(a) = p(a). The ratio is
clipped from above at c, so that one token cannot decide a step: where rho > c, the gradient is biased towards 0 and its
sign is kept.

Each position is one state of given text, as for every loss here: no credit is given for what a token leads to, and the
ratio corrects the token's probability, not that of the text before it. docs/mathematics.md derives this and the form
that is not built.

Sources: the gradient of the squared log-ratio, Schulman 2020, "Approximating KL Divergence" (k2); truncated importance
sampling, Ionides 2008; rollouts with stored teacher log-probabilities, Wu et al. 2026, arXiv 2604.13010.

Shapes: N positions, n positions of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.errors import ConfigError
from kdcache.losses.divergence_registry import SAMPLED_REVERSE_KL, Constants
from kdcache.losses.fused_linear import StudentTile
from kdcache.losses.target_losses import TargetLoss
from kdcache.targets import SparseTargets

_CLIP = Constants((2.0,), lambda c: c >= 1, "a clip of at least 1")


def read_clip(name: str) -> float | None:
    """The clip of a loss that learns from rollouts, `sampled-reverse-kl[:c]`; None of any other.

    Raises:
        ConfigError: a clip below 1.
    """
    base, *given = name.split(":")
    return _CLIP.read(name, given)[0] if base == SAMPLED_REVERSE_KL else None


@dataclass(frozen=True)
class RolloutLoss(TargetLoss):
    """The loss above.

    Attributes:
        targets: over the same positions.
        label_logprob: `[N]` the teacher's log-probability of the label, at the temperature of the loss.
        writer_logp: `[N]` the writer's log-probability of the label, of the distribution that it was drawn from.
        clip: c.
        factor: of the loss.
    """

    targets: SparseTargets
    label_logprob: Tensor
    writer_logp: Tensor
    clip: float
    factor: float = 1.0

    @staticmethod
    def of(
        targets: SparseTargets, temperature: float, writer_logp: Tensor | None, clip: float, factor: float
    ) -> RolloutLoss:
        """The loss of targets of any kind that know the label's log-probability.

        Raises:
            ConfigError: there is no log-probability of a writer.
            TargetError: that of the label is unknown at this temperature.
        """
        if writer_logp is None:
            raise ConfigError(
                f"loss {SAMPLED_REVERSE_KL} needs writer_logp, the writer's log-probability of each label"
            )
        own = targets.label_at_temperature(temperature, f"loss {SAMPLED_REVERSE_KL}")
        return RolloutLoss(targets, torch.where(targets.count > 0, own, 0.0), writer_logp, clip, factor)

    def losses(self, student: StudentTile, rows: slice) -> Tensor:
        """`[n]` the loss; the label is the last id that was gathered."""
        log_q = student.gathered[:, -1] - student.lse
        ratio = (log_q.detach() - self.writer_logp[rows]).clamp(max=math.log(self.clip)).exp()
        gap = torch.where(ratio > 0, log_q - self.label_logprob[rows], 0.0)  # which is infinite where q is 0
        return self.factor * ratio * gap.square() / 2
