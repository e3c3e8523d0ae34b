"""Losses for a student whose tokenizer is not the teacher's, beside the divergences, which need ids in common.

    uld         sum_i |p_(i) - q_(i)| over ranks: i-th largest against i-th largest, whatever the tokens are
    gold[:w]    w times JSD over the tokens in common, and (1 - w) times the sum of uld over the others
    alm[:tau]   tau times KL(P ‖ Q) of two outcomes: the text of a chunk with P = p^(1/tau), or another text

**uld** (Boizard et al. 2024, arXiv 2402.12030, equation 3). Of sparse targets the K entries are the K largest, and the
rest is one bucket: |r - s|, where r is the teacher's tail and s the student's mass outside its own K largest. By the
triangle inequality that is at most the sum over the ranks beyond K, so the loss is a lower bound of the dense one, and
equal to it where everything is kept.

**gold** (TRL's GOLD trainer). w is the share of the teacher's tokens that the student has, unless it is given. The JSD,
beta = 1/2, has each entry in common as an outcome, and one more for all the rest. Of the F entries that the student has
not, the i-th largest is compared with the i-th most likely of the student's tokens that the teacher has not; what is
beyond F on either side is left to the JSD's last outcome. TRL has no such outcome (it has the whole distributions), and
multiplies both distributions by the likelihood of the further tokens of a chunk; here they stay what they are.

**alm** (Minixhofer et al. 2025, arXiv 2503.20083, equation 5, f = KL, without the debiasing of chunk ends): P and Q are
made of the likelihoods of a chunk's tokens on either side, p exactly as stored. With a = -log p, b = -log q, and a
large tau, the loss is b - a - a log(b / a) and its gradient in log q is a / b - 1: that of the label, less what the
teacher found unlikely, too. The factor tau keeps it of that size.

At T, uld and the second part of gold are multiplied by T, as `tvd` is, and the JSD by T^2; alm is for T = 1.

Cost: uld and gold a pass of `topk` over each tile and one more exponential, each with a buffer of its own; alm nothing,
but a tile ends where a chunk does. No `[positions, V]` is kept.

Shapes: N positions, n positions of a tile, V vocabulary, K entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.aligned_targets import AlignedTargets
from kdcache.errors import TargetError
from kdcache.losses.divergence_registry import ALM, GOLD, ULD, Constants
from kdcache.losses.fused_linear import StudentTile
from kdcache.losses.target_losses import TargetLoss
from kdcache.targets import SparseTargets

_CONSTANTS = {
    ULD: Constants((), lambda: True, "no constant"),
    GOLD: Constants((0.5,), lambda w: 0 <= w <= 1, "a weight between 0 and 1, or none"),
    ALM: Constants((100.0,), lambda tau: tau > 0, "a tau above 0"),
}
_LEAST = 1e-7
"""Nats of a chunk, at least: the most that a float32 says of a text that is certain."""


def read_aligned(name: str) -> tuple[str, tuple[float, ...]] | None:
    """`(uld, gold or alm, its constants)`, none for a `gold` without a weight; None of any other loss.

    Raises:
        ConfigError: a constant that it does not take.
    """
    base, *given = name.split(":")
    if base not in _CONSTANTS:
        return None
    found = _CONSTANTS[base].read(name, given)
    return base, found if given or base != GOLD else ()


def weight_in_common(constants: tuple[float, ...], targets: SparseTargets) -> float:
    """The w of `gold`."""
    if constants:
        return constants[0]
    return targets.overlap.share if isinstance(targets, AlignedTargets) else 1.0


@dataclass(frozen=True)
class SortedLoss:
    """`uld`, or the second part of `gold`: largest against largest.

    Attributes:
        log_p: `[N, K]` log-probabilities of the teacher, falling; -inf past the last.
        log_tail: `[N]` log of the mass beyond, for a bucket; None for no bucket.
        banned: `[V]` bool, ids of the student that are not compared; None for none.
        factor: of the loss.
    """

    log_p: Tensor
    log_tail: Tensor | None
    banned: Tensor | None
    factor: float

    @staticmethod
    def uld(targets: SparseTargets, temperature: float, factor: float, vocab: int) -> SortedLoss:
        """All entries, and the tail as a bucket.

        Raises:
            TargetError: the targets do not store T.
        """
        log_p, log_tail = targets.at_temperature(temperature)
        if isinstance(targets, AlignedTargets) and not torch.isneginf(targets.foreign).all():
            log_p = torch.cat([log_p, targets.foreign_at(temperature)], -1)
            log_tail = targets.unkept_at(temperature)
        log_p = log_p.sort(-1, descending=True).values[:, : targets.ids.shape[-1]]
        if log_p.shape[-1] > vocab:  # the student has no more ranks: what the teacher has beyond is compared with 0
            log_tail = torch.logaddexp(log_tail, log_p[:, vocab:].logsumexp(-1))
        return SortedLoss(log_p[:, :vocab], log_tail, None, factor)

    @staticmethod
    def gold(targets: SparseTargets, temperature: float, factor: float, vocab: int) -> SortedLoss | None:
        """The entries that the student has not against its own tokens that the teacher has not; None if there are none.

        Raises:
            TargetError: the targets do not store T.
        """
        if not isinstance(targets, AlignedTargets) or targets.overlap.common[:vocab].all():
            return None
        most = int((~torch.isneginf(targets.foreign)).sum(-1).amax(0)) if len(targets.foreign) else 0
        if not most:
            return None
        log_p = targets.foreign_at(temperature)[:, :most]
        banned = targets.overlap.mask(log_p.device)
        return SortedLoss(log_p[:, : int((~banned[:vocab]).sum())], None, banned, factor)

    def pick(self, logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """The student's most likely ids among those that are compared, `[n, K]`, and which of them the loss uses."""
        if self.banned is not None:
            logits = logits.masked_fill(self.banned[: logits.shape[-1]], -torch.inf)
        ids = logits.topk(self.log_p.shape[-1], dim=-1).indices
        used = ~torch.isneginf(self.log_p[rows])
        used[:, 0] = True  # a tile takes out one entry at least
        return ids, used

    def losses(self, student: StudentTile, rows: slice) -> Tensor:
        """`[n]` sums of absolute differences."""
        log_p = self.log_p[rows]
        used = ~torch.isneginf(log_p)
        q = torch.where(used, (student.gathered - student.lse[:, None]).exp(), 0.0)
        found = (torch.where(used, log_p.exp(), 0.0) - q).abs().sum(-1)
        if self.log_tail is not None:
            s = (student.tail - student.lse).exp()
            found = found + (self.log_tail[rows].exp() - s).abs()
        return self.factor * found


@dataclass(frozen=True)
class ChunkLoss(TargetLoss):
    """`alm`. A tile must not begin inside a chunk.

    Attributes:
        targets: over the same positions.
        log_p: `[N]` log-likelihood of the chunk that begins at a position.
        length: `[N]` positions of it; 0 where none begins.
        tau: of the loss.
        factor: of the loss.
    """

    targets: SparseTargets
    log_p: Tensor
    length: Tensor
    tau: float
    factor: float = 1.0

    @staticmethod
    def of(targets: SparseTargets, tau: float, factor: float) -> ChunkLoss:
        """The loss of aligned targets; of others each label is a chunk.

        Raises:
            TargetError: the log-probability of the labels is unknown.
        """
        if isinstance(targets, AlignedTargets):
            log_p, length = targets.chunk_logprob, targets.chunk_length
            if torch.isnan(log_p).any():
                raise TargetError("this cache does not know the teacher's log-probability of the labels, for loss alm")
        else:
            log_p = targets.require("label_logprob", "loss alm")
            length = targets.has_target.long()
        return ChunkLoss(targets, torch.where(length > 0, log_p, 0.0), length, tau, factor)

    def losses(self, student: StudentTile, rows: slice) -> Tensor:
        """`[n]` the loss of each chunk where it begins, 0 elsewhere; the label is the last id that was gathered."""
        length, log_q = self.length[rows], student.gathered[:, -1] - student.lse
        place = torch.arange(len(length), device=length.device)
        start = torch.where(length > 0, place, -1).cummax(0).values.clamp(min=0)
        inside = place - start < length[start]
        likelihood = torch.zeros_like(log_q).index_add(0, start, torch.where(inside, log_q, 0.0))
        found = _binary_kl(-self.log_p[rows], -likelihood, self.tau)
        return self.factor * torch.where(length > 0, found, 0.0)


def _binary_kl(a: Tensor, b: Tensor, tau: float) -> Tensor:
    """tau KL(P ‖ Q) of two outcomes with P = e^(-a / tau), Q = e^(-b / tau)."""
    a, b = a.clamp(min=0) / tau, b.clamp(min=_LEAST) / tau
    rest, other = -torch.expm1(-a), -torch.expm1(-b)  # 1 - P, 1 - Q
    some = rest > 0
    ratio = torch.where(some, torch.where(some, rest, 1.0) / other, 1.0)
    return tau * ((b - a) * torch.exp(-a) + rest * ratio.log())
