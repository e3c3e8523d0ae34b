"""Losses on sparse targets, from one primitive that never keeps `[positions, vocabulary]`.

The primitive walks the student's head in tiles of positions. A tile yields the log-partition
of the logits, the log-partition of the tail (every id that is not an entry) and the logits at
the entries; the backward pass makes the tile again. The tail is summed over the complement
itself, so no loss ever forms `1 - b`.

Guarantee: arithmetic is float32 (float64 for float64 inputs) whatever dtype the parameters have.
Cost: `[tile, V]` of memory at any moment; time of two head products forward-equivalent more
than a loss over stored logits.

Shapes: N positions, V vocabulary, D hidden, K entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import ConfigError, TargetError
from kdcache.rows import IGNORE
from kdcache.targets import SAMPLED_KINDS, SparseTargets

LOSSES = ("forward-kl",)
TAILS = ("bucket",)

_TILE_ELEMENTS = 1 << 22


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _tile_forward(logits: Tensor, ids: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`(lse [n], tail_lse [n], gathered [n, K])` of logits `[n, V]`; tail_lse is over ids not in `kept`."""
    gathered = logits.gather(-1, ids)
    lse = logits.logsumexp(-1)
    if kept is None:
        return lse, lse, gathered
    tail = logits.scatter(-1, kept, -torch.inf).logsumexp(-1)
    return lse, tail, gathered


def _tile_backward(
    logits: Tensor, ids: Tensor, kept: Tensor | None, lse: Tensor, tail: Tensor, grads: tuple[Tensor, Tensor, Tensor]
) -> Tensor:
    """Gradient with respect to the logits of one tile, `[n, V]`."""
    d_lse, d_tail, d_gathered = grads
    grad = (logits - lse[:, None]).exp_().mul_(d_lse[:, None])  # [n, V]
    if kept is not None:
        # exp(logit - tail) could overflow on kept ids, and an empty tail is -inf: mask before exp.
        safe = torch.where(torch.isneginf(tail), 0.0, tail)
        soft = (logits - safe[:, None]).scatter_(-1, kept, -torch.inf).exp_()
        grad += soft.mul_(torch.where(torch.isneginf(tail), 0.0, d_tail)[:, None])
    return grad.scatter_add_(-1, ids, d_gathered)


def _tiles(positions: int, vocab: int) -> range:
    return range(0, max(1, positions), max(1, _TILE_ELEMENTS // max(1, vocab)))


class _LogitsLse(torch.autograd.Function):
    """The primitive over logits that already exist."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, kept: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        tiles = _tiles(*logits.shape)
        parts = [
            _tile_forward(
                _wide(logits[i : i + tiles.step]),
                ids[i : i + tiles.step],
                None if kept is None else kept[i : i + tiles.step],
            )
            for i in tiles
        ]
        lse, tail, gathered = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(logits, ids, kept, lse, tail)
        return lse, tail, gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, kept, lse, tail = ctx.saved_tensors
        out = torch.empty_like(logits)
        tiles = _tiles(*logits.shape)
        for i in tiles:
            s = slice(i, i + tiles.step)
            tile_grads = (grads[0][s], grads[1][s], grads[2][s])
            out[s] = _tile_backward(
                _wide(logits[s]), ids[s], None if kept is None else kept[s], lse[s], tail[s], tile_grads
            )
        return out, None, None


class _LinearLse(torch.autograd.Function):
    """The primitive over hidden states and an output head."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, kept: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = _wide(weight)
        wide_bias = None if bias is None else _wide(bias)
        tiles = _tiles(hidden.shape[0], weight.shape[0])
        parts = []
        for i in tiles:
            s = slice(i, i + tiles.step)
            logits = torch.nn.functional.linear(_wide(hidden[s]), head, wide_bias)  # [n, V]
            parts.append(_tile_forward(logits, ids[s], None if kept is None else kept[s]))
        lse, tail, gathered = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, ids, kept, lse, tail)
        return lse, tail, gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        hidden, weight, bias, ids, kept, lse, tail = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        head = _wide(weight)
        wide_bias = None if bias is None else _wide(bias)
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(head) if needs_weight else None
        d_bias = torch.zeros_like(wide_bias) if needs_bias and wide_bias is not None else None
        tiles = _tiles(hidden.shape[0], weight.shape[0])
        for i in tiles:
            s = slice(i, i + tiles.step)
            h = _wide(hidden[s])
            logits = torch.nn.functional.linear(h, head, wide_bias)  # [n, V]
            tile_grads = (grads[0][s], grads[1][s], grads[2][s])
            d_logits = _tile_backward(logits, ids[s], None if kept is None else kept[s], lse[s], tail[s], tile_grads)
            if d_hidden is not None:
                d_hidden[s] = d_logits @ head
            if d_weight is not None:
                d_weight.addmm_(d_logits.T, h)
            if d_bias is not None:
                d_bias += d_logits.sum(0)
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


def linear_lse_gather(hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-partition of a linear head's logits, and the logits at chosen ids.

    Args:
        hidden: `[N, D]`.
        weight: `[V, D]`, the output head.
        ids: `[N, K]` ids in [0, V).
        bias: `[V]`, optional.

    Returns:
        `lse [N]`, `gathered [N, K]`, in float32 (float64 for float64 inputs); differentiable in
        hidden, weight and bias. `[N, V]` never exists at once.
    """
    lse, _, gathered = _LinearLse.apply(hidden, weight, bias, ids.long(), None)  # type: ignore[no-untyped-call]
    return lse, gathered


@dataclass(frozen=True)
class _Student:
    """What the losses need to know of a student's logits at one temperature."""

    lse: Tensor  # [N]
    tail: Tensor  # [N] log-partition over ids that are not entries
    gathered: Tensor  # [N, K]


def forward_kl(student: _Student, targets: SparseTargets, temperature: float) -> Tensor:
    """`[N]` KL(teacher ‖ student) over the entries and one bucket for the tail, in nats.

    sum_i p_i (log p_i - log q_i) + r (log r - log tail_q): the KL of the two distributions
    coarsened to K + 1 outcomes, hence a lower bound of the dense KL (data processing
    inequality), exact when everything is kept.
    """
    logp, log_tail = targets.at_temperature(temperature)
    p, r = logp.exp(), log_tail.exp()
    logq = student.gathered - student.lse[:, None]
    # Padded entries and empty tails have p = 0 and contribute 0, not 0 * inf.
    kept = torch.where(p > 0, p * (logp - logq), 0.0).sum(-1)
    some = r > 0
    log_tail_q = torch.where(some, student.tail, student.lse) - student.lse
    return kept + torch.where(some, r * (torch.where(some, log_tail, 0.0) - log_tail_q), 0.0)


def sampled_cross_entropy(student: _Student, targets: SparseTargets) -> Tensor:
    """`[N]` sum_i w_i (log-partition - logit_i): the cross-entropy of the student under sampled weights, in nats.

    Its mean over draws is the dense cross-entropy with p_T, whose gradient is q - p; here it is q - w. It does not
    change when a constant is added to the logits, and is never negative. The dense KL is this less the entropy of
    p_T: a constant, so the loss leaves it out.
    """
    return (targets.weights * (student.lse[:, None] - student.gathered)).sum(-1)


def _kept(targets: SparseTargets) -> Tensor:
    """`[N, K]` entries with padding replaced by the first entry, so that a mask built from it is exact."""
    return torch.where(targets.valid, targets.ids, targets.ids[:, :1]).long()


def _check(targets: SparseTargets, loss: str, tail: str, temperature: float, soft_weight: float) -> None:
    if loss not in LOSSES:
        raise ConfigError(f"loss {loss!r} is not one of {', '.join(LOSSES)}")
    if tail not in TAILS:
        raise ConfigError(f"tail {tail!r} is not one of {', '.join(TAILS)}")
    if not temperature > 0:
        raise ConfigError(f"temperature {temperature:g} is not positive")
    if targets.kind in SAMPLED_KINDS and temperature != targets.sample_temperature:
        raise TargetError(
            f"{targets.kind} targets drawn at temperature {targets.sample_temperature:g} say nothing of temperature "
            f"{temperature:g}: their weights cannot be softened without bias"
        )
    if not 0 <= soft_weight <= 1:
        raise ConfigError(f"soft_weight is {soft_weight:g}, outside [0, 1]")


def _mix(
    soft: Tensor | None, hard: Tensor | None, soft_weight: float, temperature: float, num_items: Tensor | float | None
) -> Tensor:
    """soft_weight T^2 mean(soft) + (1 - soft_weight) mean(hard), each over its own count or `num_items`."""
    total: Tensor | None = None
    for term, scale in ((soft, soft_weight * temperature**2), (hard, 1 - soft_weight)):
        if term is not None:
            items = max(1, term.numel()) if num_items is None else num_items
            part = scale * term.sum() / items
            total = part if total is None else total + part
    if total is None:
        raise ConfigError("nothing to learn from: soft_weight is 0 and no labels were given")
    return total


def _loss(
    student_at: Any,
    targets: SparseTargets,
    labels: Tensor | None,
    loss: str,
    tail: str,
    temperature: float,
    soft_weight: float,
    num_items: Tensor | float | None,
) -> Tensor:
    """The loss, given `student_at(keep, ids, kept, T) -> _Student` over the positions in `keep`."""
    _check(targets, loss, tail, temperature, soft_weight)
    labelled = None if labels is None else labels != IGNORE
    soft = hard = None
    if soft_weight > 0:
        keep = targets.count > 0 if labelled is None else (targets.count > 0) & labelled
        chosen = targets[keep]
        ids = _kept(chosen)
        if targets.kind in SAMPLED_KINDS:
            soft = sampled_cross_entropy(student_at(keep, ids, None, temperature), chosen)
        else:
            soft = forward_kl(student_at(keep, ids, ids, temperature), chosen, temperature)
    if soft_weight < 1 and labels is not None and labelled is not None:
        view = student_at(labelled, labels[labelled][:, None].long(), None, 1.0)
        hard = view.lse - view.gathered[:, 0]
    return _mix(soft, hard, soft_weight, temperature, num_items)


def sparse_kd_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: SparseTargets,
    *,
    labels: Tensor | None = None,
    loss: str = "forward-kl",
    tail: str = "bucket",
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    bias: Tensor | None = None,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Distillation loss of a student with a linear head, without its logits in memory.

    `soft_weight * T^2 * KL(teacher_T ‖ student_T) + (1 - soft_weight) * cross-entropy(label)`
    (T^2: Hinton et al. 2015, arXiv 1503.02531, section 2). For sampled targets the KL is an unbiased estimate of
    the cross-entropy: the KL and a constant.

    Args:
        hidden: `[N, D]` the student's last hidden states.
        weight: `[V, D]` its output head, cut to the cache's vocabulary.
        targets: SparseTargets over the same N positions.
        labels: `[N]` true next tokens; a position whose label is -100 counts for neither term.
        loss: `forward-kl`.
        tail: `bucket`: everything not kept is one more outcome, its mass known exactly. Sampled targets have no tail.
        temperature: T; it must be one that the targets store, unless they keep everything; for sampled targets,
            the one that they were drawn at.
        soft_weight: weight of the distillation term; the label term gets the rest.
        bias: `[V]`, optional.
        num_items: divisor of both sums, for accumulation over micro-batches and ranks; by default
            each term is divided by its own number of positions.

    Returns:
        A scalar, nats.

    Raises:
        TargetError: the targets cannot give that temperature exactly.
        ConfigError: an unknown loss or tail, or a weight outside [0, 1].
    """

    def student_at(keep: Tensor, ids: Tensor, kept: Tensor | None, t: float) -> _Student:
        # hidden and bias scaled by 1/T give the logits scaled by 1/T.
        scaled_bias = bias if bias is None or t == 1 else _wide(bias) / t
        scaled = hidden[keep] if t == 1 else _wide(hidden[keep]) / t
        return _Student(*_LinearLse.apply(scaled, weight, scaled_bias, ids, kept))  # type: ignore[no-untyped-call]

    return _loss(student_at, targets, labels, loss, tail, temperature, soft_weight, num_items)


def sparse_kd_loss_from_logits(
    logits: Tensor,
    targets: SparseTargets,
    *,
    labels: Tensor | None = None,
    loss: str = "forward-kl",
    tail: str = "bucket",
    temperature: float = 1.0,
    soft_weight: float = 1.0,
    num_items: Tensor | float | None = None,
) -> Tensor:
    """`sparse_kd_loss` for a student whose logits `[N, V]` exist, cut to the cache's vocabulary."""

    def student_at(keep: Tensor, ids: Tensor, kept: Tensor | None, t: float) -> _Student:
        chosen = logits if bool(keep.all()) else logits[keep]
        scaled = chosen if t == 1 else _wide(chosen) / t
        return _Student(*_LogitsLse.apply(scaled, ids, kept))  # type: ignore[no-untyped-call]

    return _loss(student_at, targets, labels, loss, tail, temperature, soft_weight, num_items)


def measure_positions(logits: Tensor, targets: SparseTargets, labels: Tensor) -> dict[str, Tensor]:
    """Figures at T = 1 for each position, for reports: no gradient, nothing averaged.

    Args:
        logits: `[N, V]` the student's, cut to the cache's vocabulary.
        targets: over the same positions, each with a target.
        labels: `[N]` true next tokens, none masked.

    Returns:
        `[N]` each: `nll` and `teacher_nll` of the label, `kl` (teacher to student; tail as one
        bucket) and `top1_agreement` (1 where both have the same most likely token). For sampled targets `kl` is an
        unbiased estimate that may be negative, there only if they were drawn at T = 1, and the teacher's token is
        the entry with the most weight.
    """
    ids = _kept(targets)
    sampled = targets.kind in SAMPLED_KINDS
    with torch.no_grad():
        wanted = torch.cat([ids, labels[:, None]], -1)
        student = _Student(*_LogitsLse.apply(logits, wanted, None if sampled else ids))  # type: ignore[no-untyped-call]
        entries = _Student(student.lse, student.tail, student.gathered[:, :-1])
        best = ids.gather(-1, targets.weights.argmax(-1, keepdim=True))[:, 0]
        figures = {
            "nll": student.lse - student.gathered[:, -1],
            "teacher_nll": -targets.label_logprob,
            "top1_agreement": (logits.argmax(-1) == best).float(),
        }
        if not sampled:
            figures["kl"] = forward_kl(entries, targets, 1.0)
        elif targets.sample_temperature == 1:
            figures["kl"] = sampled_cross_entropy(entries, targets) - targets.entropy
        return figures
