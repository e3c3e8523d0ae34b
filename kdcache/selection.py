"""Selection: which entries a position keeps, and the exact scalars over everything else.

Guarantee: log-probabilities are normalised over the whole vocabulary, and the tail is summed
over the complement itself, never formed as one minus the kept mass (in float32 that
cancels on peaked positions, and peaked positions are the common case).
Cost: for each tile of positions, one float32 copy of its logits and one pass over it for the
partition, the entropy, the entries, and the tail at each temperature.

Shapes: N positions, V vocabulary, K entries, n_T temperatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.errors import ConfigError, LogitsError
from kdcache.rows import IGNORE
from kdcache.targets import SparseTargets

KINDS = ("topk", "full")

_TILE_ELEMENTS = 1 << 22
"""Logits handled at once; a tile of this size stays near the cache on a CPU and is cheap on a GPU."""


@dataclass(frozen=True)
class Selection:
    """The rule that picks entries.

    Attributes:
        kind: `topk`, the k largest; `full`, every token of the vocabulary (the reference).
        k: entries kept at each position by `topk`.

    Raises:
        ConfigError: an unknown kind, or k below 1.
    """

    kind: str = "topk"
    k: int = 64

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"--select {self.kind} is not one of {', '.join(KINDS)}")
        if self.k < 1:
            raise ConfigError(f"--k is {self.k}, but a target needs at least 1 entry")

    def width(self, vocab_size: int) -> int:
        """K, the width of the targets over a vocabulary.

        Raises:
            ConfigError: k exceeds the vocabulary.
        """
        if self.kind == "full":
            return vocab_size
        if self.k > vocab_size:
            raise ConfigError(f"--k is {self.k}, above the vocabulary of {vocab_size} tokens")
        return self.k


def select(
    logits: Tensor,
    selection: Selection,
    *,
    labels: Tensor | None = None,
    temperatures: Sequence[float] = (1.0,),
) -> SparseTargets:
    """Turn a teacher's logits into sparse targets, on the device where they lie.

    Args:
        logits: `[N, V]`, any floating dtype; padded vocabulary rows already dropped.
        selection: the rule.
        labels: `[N]` true next tokens, -100 where unknown.
        temperatures: the T whose partition and tail are kept.

    Returns:
        SparseTargets over N positions; entries are ordered by falling probability.

    Raises:
        LogitsError: a NaN or infinite logit; its `position` is the first offending row.
        ConfigError: k above V, or a temperature outside 0.01 to 100.
    """
    check_temperatures(temperatures)
    width = selection.width(logits.shape[-1])
    rows = max(1, _TILE_ELEMENTS // logits.shape[-1])
    parts = []
    for start in range(0, max(1, logits.shape[0]), rows):
        tile = logits[start : start + rows].float()  # [n, V]
        tile_labels = None if labels is None else labels[start : start + rows]
        finite = torch.isfinite(tile).all(-1)
        if not finite.all():
            position = start + int((~finite).nonzero()[0])
            raise LogitsError(f"the teacher's logits at position {position} are not finite", position)
        parts.append(_select_tile(tile, width, selection.kind, tile_labels, tuple(map(float, temperatures))))
    return SparseTargets.cat(parts)


def check_temperatures(temperatures: Sequence[float]) -> None:
    """Refuse temperatures that are missing, repeated, or outside 0.01 to 100."""
    if not temperatures or len(set(temperatures)) != len(temperatures):
        raise ConfigError(f"temperatures must be named once each, got {list(temperatures)}")
    for t in temperatures:
        if not 0.01 <= t <= 100:
            raise ConfigError(f"temperature {t:g} is outside 0.01 to 100")


def _select_tile(
    logits: Tensor, width: int, kind: str, labels: Tensor | None, temperatures: tuple[float, ...]
) -> SparseTargets:
    # log_softmax accumulates in one running sum; logsumexp sums pairwise and is ten times closer.
    logp = logits - logits.logsumexp(-1, keepdim=True)  # [n, V]
    entropy = -(logp.exp() * logp).sum(-1)
    logprobs, ids = logp.topk(width, dim=-1)  # [n, K], falling
    if labels is None:
        label_logprob = torch.full_like(entropy, torch.nan)
    else:
        picked = logp.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        label_logprob = torch.where(labels == IGNORE, torch.nan, picked)
    complement = logp.scatter(-1, ids, -torch.inf)  # [n, V]
    partitions, tails = [], []
    for t in temperatures:
        tail = (complement if t == 1 else complement / t).logsumexp(-1)
        # p is normalised: at T = 1 its partition is 1, exactly.
        partition = torch.zeros_like(tail) if t == 1 else torch.logaddexp(tail, (logprobs / t).logsumexp(-1))
        partitions.append(partition)
        tails.append(tail - partition)
    return SparseTargets(
        ids=ids,
        logprobs=logprobs,
        weights=logprobs.exp(),
        count=torch.full_like(ids[:, 0], width),
        log_partition=torch.stack(partitions, -1),
        log_tail=torch.stack(tails, -1),
        entropy=entropy,
        label_logprob=label_logprob,
        temperatures=temperatures,
        kind=kind,
    )
