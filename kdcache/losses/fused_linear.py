"""Fused linear: the log-partition of an output head and its logits at given ids, without `[positions, vocabulary]`.

Two autograd functions go through a source of logits tile by tile. `linear_lse_gather` serves any loss: it learns the
loss's gradient only in the backward pass and makes each tile again. `fused_loss` knows the loss, so each tile gives its
gradient at once and is made a single time; the backward pass returns what is ready.

In a `Tile` the entries are taken out first. What is left, the ids that are not entries, is summed on its own, so the
tail is never one minus the kept mass; and the log-partition of everything is the sum of the two parts. Afterwards the
tile's memory holds e^(z - peak) of what is left, which is all that the gradient needs.

Guarantee: first-order gradients in every tensor of the source, the sums taken in float32 (float64 for float64). No
overflow, and no underflow of a tail however small; an entry that holds all the mass, or a tail without a single id, is
exact.
Cost: in memory, one buffer `[n, V]` for each view, used for all tiles in turn; in time, five passes over each tile in
place, among them one exponential, and three matrix products of N D V for `fused_loss` with its backward pass, as many
as for a loss over stored logits, or four for `linear_lse_gather`. docs/decisions/0011 has the figures.

Shapes: N positions, n positions of a tile, V vocabulary, D hidden, K ids of `linear_lse_gather`, G ids of a view.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kdcache.losses.logit_sources import Grads, LinearHead, LogitSource


@dataclass(frozen=True)
class StudentTile:
    """What the losses know of a student's logits z at one temperature, all less the largest of them, `origin`.

    No loss notices the shift, and the differences that losses are made of lose no digits to large logits.

    Attributes:
        lse: `[n]` log sum_j e^(z_j).
        tail: `[n]` the same over the ids that are not entries; -inf where there is none.
        gathered: `[n, G]` z at the ids asked for.
        tail_mean: `[n]` mean of z over the ids that are not entries, if it was asked for and there is one.
        peak: `[n]` largest z of the ids that are not entries; -inf where there is none. No gradient.
        origin: `[n]` what was taken from all of these. No gradient.
        entropy: `[n]` entropy of softmax(z), nats, if it was asked for. No gradient.
    """

    lse: Tensor
    tail: Tensor
    gathered: Tensor
    tail_mean: Tensor | None
    peak: Tensor
    origin: Tensor
    entropy: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        """The tensors that a loss is differentiated in."""
        return [x for x in (self.lse, self.tail, self.gathered, self.tail_mean) if x is not None]

    def require_grad(self) -> StudentTile:
        """The same values as new leaves of a graph."""
        mean = None if self.tail_mean is None else self.tail_mean.detach().requires_grad_()
        lse, tail, gathered = (x.detach().requires_grad_() for x in (self.lse, self.tail, self.gathered))
        return StudentTile(lse, tail, gathered, mean, self.peak, self.origin, self.entropy)


class Tile:
    """A tile, reduced.

    Args:
        logits: `[n, V]` float32 or float64; overwritten.
        ids: `[n, G]` ids to gather.
        kept: `[n, G]` bool: which of them are entries, each id once and the first always; None if there are no
            entries, and the tail is everything.
        tail_mean: whether the mean over the tail is wanted.
        entropy: whether the student's entropy is wanted.

    Attributes:
        student: what the losses need.
    """

    def __init__(
        self, logits: Tensor, ids: Tensor, kept: Tensor | None, tail_mean: bool = False, entropy: bool = False
    ) -> None:
        self._ids, self._kept, self._rest = ids, kept, logits
        gathered, mean = logits.gather(-1, ids), None
        if kept is not None:
            entries = torch.where(kept, ids, ids[:, :1])  # [n, G] a repeated id is taken out once
            if tail_mean:
                self._others = (logits.shape[-1] - kept.sum(-1)).to(logits.dtype)  # [n]
                mean = logits.scatter_(-1, entries, 0.0).sum(-1) / self._others.clamp(min=1)
            logits.scatter_(-1, entries, -torch.inf)
        peak = logits.amax(-1)
        own = torch.where(torch.isneginf(peak), 0.0, peak)
        energy = _exponentiate(logits.sub_(own[:, None]), entropy)
        self._total = logits.sum(-1)  # [n] at least 1, or 0 where no id is left
        origin = peak if kept is None else torch.maximum(peak, torch.where(kept, gathered, -torch.inf).amax(-1))
        gathered = gathered - origin[:, None]
        tail = (own - origin) + self._total.log()
        lse = tail if kept is None else torch.logaddexp(tail, _logsumexp(gathered, kept))
        mean = None if mean is None else mean - origin
        self.student = StudentTile(lse, tail, gathered, mean, peak - origin, origin)
        if energy is not None:
            mean_z = own - origin + energy / torch.where(self._total > 0, self._total, 1.0)
            self.student = dataclasses.replace(self.student, entropy=self._entropy(mean_z))

    def _entropy(self, mean: Tensor) -> Tensor:
        """`[n]` sum of q (lse - z), no term of which is negative.

        Args:
            mean: `[n]` of z, under the softmax of the ids that are left.
        """
        student = self.student
        some = self._total > 0
        found = torch.where(some, (student.tail - student.lse).exp() * (student.lse - mean), 0.0)
        if self._kept is not None:
            log_q = student.gathered - student.lse[:, None]
            q = log_q.exp()
            found = found + torch.where(self._kept & (q > 0), -q * log_q, 0.0).sum(-1)
        return found

    def gradient(self, d_lse: Tensor, d_tail: Tensor, d_gathered: Tensor, d_tail_mean: Tensor | None = None) -> Tensor:
        """`[n, V]` a loss's gradient in the logits, from its gradients in the student's values; in the same memory."""
        student, rest = self.student, self._rest
        coefficient = d_tail + d_lse * (student.tail - student.lse).exp()  # [n] of the tail's softmax
        rest.mul_(torch.where(self._total > 0, coefficient / self._total, 0.0)[:, None])
        if self._kept is not None:
            softmax = (student.gathered - student.lse[:, None]).exp()
            d_gathered = d_gathered + torch.where(self._kept, d_lse[:, None] * softmax, 0.0)
            if d_tail_mean is not None:
                share = d_tail_mean / self._others.clamp(min=1)
                rest.add_(share[:, None])
                d_gathered = d_gathered - torch.where(self._kept, share[:, None], 0.0)
        return rest.scatter_add_(-1, self._ids, d_gathered)


def _exponentiate(values: Tensor, energy: bool) -> Tensor | None:
    """Put e^z in the place of each z `[n, V]`; gives the `[n]` sums of z e^z if they are asked for."""
    if not energy:
        values.exp_()
        return None
    found = torch.zeros_like(values[:, 0])
    for part in torch.split(values, _ENTROPY_IDS, -1):
        given = part.clamp(min=_LEAST)  # of -inf: what weighs nothing has no product
        found += given.mul_(part.exp_()).sum(-1)
    return found


def _logsumexp(values: Tensor, chosen: Tensor) -> Tensor:
    """`[n]` log-sum-exp over the values in a mask that has at least one."""
    return torch.where(chosen, values, -torch.inf).logsumexp(-1)


TILE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}
"""Logits of a tile, by device; others do as a GPU does."""

_LEAST = -1e4
"""A logit below the largest by this much has no probability in any dtype."""

_ENTROPY_IDS = 1 << 13
"""Ids of a tile that an entropy is summed over at once: it needs a copy of them."""

LEAST_POSITIONS = 128
"""Positions of a tile at least, however large the vocabulary: each tile reads the head's weights and adds to their
gradient, which costs as much as the product itself when there are few positions to share it."""

F = TypeVar("F", bound=Callable[..., Any])

Rows = slice
"""Positions of a tile, among those that a view is over."""


def eager(function: F) -> F:
    """Keep a function out of torch.compile: which positions count depends on data, and a loss may be anyone's code."""
    wrapped: F = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return wrapped


@dataclass(frozen=True)
class View:
    """What is asked of the logits at one temperature.

    Attributes:
        temperature: logits are divided by it.
        ids: `[N, G]` ids to gather.
        kept: `[N, G]` bool, which of them are entries; see `Tile`.
        loss: `(student, rows) -> [n]` summands of the loss; None if the view is only looked at.
        look: called with (student, rows) of each tile.
        tail_mean: whether `loss` needs `StudentTile.tail_mean`.
        entropy: whether `look` needs `StudentTile.entropy`.
        pick: `(logits [n, V], rows) -> (ids [n, G], kept [n, G])` of each tile, in the place of `ids` and `kept`: for a
            loss that looks at the student's most likely ids.
    """

    temperature: float
    ids: Tensor
    kept: Tensor | None = None
    loss: Callable[[StudentTile, Rows], Tensor] | None = None
    look: Callable[[StudentTile, Rows], None] | None = None
    tail_mean: bool = False
    entropy: bool = False
    pick: Callable[[Tensor, Rows], tuple[Tensor, Tensor]] | None = None

    def reduce(self, logits: Tensor, rows: Rows) -> Tile:
        """The tile of some positions; overwrites their logits `[n, V]`."""
        if self.temperature != 1:
            logits.div_(self.temperature)
        if self.pick is not None:
            return Tile(logits, *self.pick(logits, rows), self.tail_mean, self.entropy)
        kept = None if self.kept is None else self.kept[rows]
        return Tile(logits, self.ids[rows], kept, self.tail_mean, self.entropy)

    def scan(self, tile: Tile, rows: Rows, needs_gradient: bool) -> tuple[Tensor | None, Tensor | None]:
        """`[n]` summands of the loss and `[n, V]` their gradient in the logits, None where there is none."""
        if self.look is not None:
            self.look(tile.student, rows)
        if self.loss is None:
            return None, None
        if not needs_gradient:
            return self.loss(tile.student, rows), None
        student = tile.student.require_grad()
        with torch.enable_grad():
            summands = self.loss(student, rows)
            found = torch.autograd.grad(summands.sum(), student.leaves(), materialize_grads=True)
        return summands.detach(), tile.gradient(*(d / self.temperature for d in found))


def fused_loss(
    source: LogitSource, views: Sequence[View], index: Tensor | None = None, inside: Tensor | None = None
) -> Tensor:
    """The sum of the losses of some views, differentiable in the tensors of the source.

    Args:
        source: where the logits come from.
        views: what is asked of them; all over the same positions.
        index: `[N]` rows of the source that these positions are; None for all of them, in order.
        inside: `[N]` bool, positions at which no tile may begin; None if it may anywhere. A tile is then as much larger
            as a run of such positions is long.

    Returns:
        A scalar in the source's dtype.
    """
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in source.tensors)
    total: Tensor = _Fused.apply(source, views, index, inside, needed, *source.tensors)  # type: ignore[no-untyped-call]
    return total


def _scan_tile(
    source: LogitSource,
    views: Sequence[View],
    rows: Rows,
    where: Tensor | slice,
    needed: bool,
    buffers: Sequence[Tensor],
) -> Tensor:
    """The loss of one tile of positions, its gradient given to the source; `buffers` hold the logits of each view."""
    count = rows.stop - rows.start
    logits, gradient = source.logits(where, buffers[0][:count]), None
    total = torch.zeros((), dtype=source.dtype, device=logits.device)
    for buffer in buffers[1:]:
        buffer[:count].copy_(logits)
    for buffer, view in zip(buffers, views, strict=True):
        tile = view.reduce(buffer[:count], rows)
        summands, part = view.scan(tile, rows, needed)
        if summands is not None:
            total += summands.sum()
        if part is not None:
            gradient = part if gradient is None else gradient.add_(part)
    if gradient is not None:
        source.pull(where, gradient)
    return total


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        source: LogitSource,
        views: Sequence[View],
        index: Tensor | None,
        inside: Tensor | None,
        needed: bool,
        *_tensors: Tensor | None,
    ) -> Tensor:
        ids = views[0].ids
        total = torch.zeros((), dtype=source.dtype, device=ids.device)
        with _no_autocast(ids.device):
            if needed:
                source.require(ctx.needs_input_grad[5:])
            tiles = _tiles(len(ids), source.vocab, len(views), ids.device, inside)
            buffers = [_buffer(source, tiles) for _ in views]
            for rows in tiles:
                total += _scan_tile(source, views, rows, rows if index is None else index[rows], needed, buffers)
        if needed:
            ctx.save_for_backward(*source.gradients())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        grads: Grads = ctx.saved_tensors
        if d_total != 1:  # a copy of the weight's gradient, and so worth a look
            grads = tuple(None if grad is None else grad * d_total.to(grad.dtype) for grad in grads)
        return (None, None, None, None, None, *grads)


class _LseGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> tuple[Tensor, Tensor]:
        view, parts, source = View(1.0, ids), [], LinearHead(hidden, weight, bias)
        with _no_autocast(ids.device):
            tiles = _tiles(len(ids), source.vocab, 1, ids.device)
            buffer = _buffer(source, tiles)
            for rows in tiles:
                logits = source.logits(rows, buffer[: rows.stop - rows.start])
                gathered = logits.gather(-1, ids[rows])
                student = view.reduce(logits, rows).student
                parts.append((student.origin + student.lse, gathered))
        ctx.save_for_backward(hidden, weight, bias, ids)
        ctx.operand = source.operand
        lse, gathered = (torch.cat(column) for column in zip(*parts, strict=True))
        return lse, gathered

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_lse: Tensor, d_gathered: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids = ctx.saved_tensors
        view, source = View(1.0, ids), LinearHead(hidden, weight, bias, operand=ctx.operand)
        with _no_autocast(ids.device):
            source.require(ctx.needs_input_grad[:3])
            tiles = _tiles(len(ids), source.vocab, 1, ids.device)
            buffer = _buffer(source, tiles)
            for rows in tiles:
                tile = view.reduce(source.logits(rows, buffer[: rows.stop - rows.start]), rows)
                source.pull(rows, tile.gradient(d_lse[rows], torch.zeros_like(d_lse[rows]), d_gathered[rows]))
        return (*source.gradients(), None)


@eager
def linear_lse_gather(hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Log-partition of a linear head's logits, and the logits at given ids.

    Args:
        hidden: `[N, D]`.
        weight: `[V, D]`, the output head.
        ids: `[N, K]` ids in [0, V).
        bias: `[V]`, optional.

    Returns:
        `lse [N]`, `gathered [N, K]`, in float32 (float64 for float64 inputs); differentiable in
        hidden, weight and bias. `[N, V]` never exists at once.
    """
    lse, gathered = _LseGather.apply(hidden, weight, bias, ids.long())  # type: ignore[no-untyped-call]
    return lse, gathered


def _tiles(positions: int, vocab: int, views: int, device: torch.device, inside: Tensor | None = None) -> list[Rows]:
    """Positions in tiles of about equal size; a last one of a few would cost as much as a full one.

    A tile that would begin `inside` begins at the next position that is not.
    """
    elements = TILE_ELEMENTS.get(device.type, TILE_ELEMENTS["cuda"])
    most = max(LEAST_POSITIONS, elements // max(1, vocab)) // views
    count = max(1, -(-positions // most))  # one empty tile, so that no figure is missing where no position counts
    bounds = [positions * i // count for i in range(count + 1)]
    if inside is not None and count > 1:
        free = torch.cat([(~inside).nonzero()[:, 0], torch.tensor([positions], device=inside.device)])
        bounds = free[torch.searchsorted(free, torch.tensor(bounds, device=inside.device))].tolist()
        bounds = [0, *sorted(set(bounds) - {0})]
    return [slice(start, end) for start, end in itertools.pairwise(bounds)]


def _buffer(source: LogitSource, tiles: Sequence[Rows]) -> Tensor:
    """`[n, V]` memory for the largest of some tiles, used for each in turn.

    Memory that is taken anew for each tile costs time, as a kernel clears it, and space: tiles differ by a position,
    and a heap has no use for a hole that is one position too small.
    """
    most = max(rows.stop - rows.start for rows in tiles)
    return torch.empty(most, source.vocab, dtype=source.dtype, device=source.device)


def _no_autocast(device: torch.device) -> Any:
    return torch.autocast(device.type, enabled=False)
