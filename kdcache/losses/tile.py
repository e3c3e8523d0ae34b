"""One tile of logits: what the losses need of it, and then, in the same memory, its gradient.

The entries are taken out first. What is left, the ids that are not entries, is summed on its own, so the tail is never
one minus the kept mass; and the log-partition of everything is the sum of the two parts. The tile holds e^(z - peak)
of what is left afterwards, which is all that the gradient needs: there is no second pass over the logits.

Guarantee: no overflow, and no underflow of a tail however small; an entry that holds all the mass, or a tail without
a single id, is exact.
Cost: five passes over `[n, V]` in place, among them one exponential; no second tensor of that size.

Shapes: n positions of the tile, V vocabulary, G ids asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Student:
    """What the losses know of a student's logits z at one temperature, all less the largest of them, `origin`.

    No loss notices the shift, and the differences that losses are made of lose no digits to large logits.

    Attributes:
        lse: `[n]` log sum_j e^(z_j).
        tail: `[n]` the same over the ids that are not entries; -inf where there is none.
        gathered: `[n, G]` z at the ids asked for.
        tail_mean: `[n]` mean of z over the ids that are not entries, if it was asked for and there is one.
        peak: `[n]` largest z of the ids that are not entries; -inf where there is none. No gradient.
        origin: `[n]` what was taken from all of these. No gradient.
    """

    lse: Tensor
    tail: Tensor
    gathered: Tensor
    tail_mean: Tensor | None
    peak: Tensor
    origin: Tensor

    def leaves(self) -> list[Tensor]:
        """The tensors that a loss is differentiated in."""
        return [x for x in (self.lse, self.tail, self.gathered, self.tail_mean) if x is not None]

    def require_grad(self) -> Student:
        """The same values as new leaves of a graph."""
        mean = None if self.tail_mean is None else self.tail_mean.detach().requires_grad_()
        lse, tail, gathered = (x.detach().requires_grad_() for x in (self.lse, self.tail, self.gathered))
        return Student(lse, tail, gathered, mean, self.peak, self.origin)


class Tile:
    """A tile, reduced.

    Args:
        logits: `[n, V]` float32 or float64; overwritten.
        ids: `[n, G]` ids to gather.
        kept: `[n, G]` bool: which of them are entries, each id once and the first always; None if there are no
            entries, and the tail is everything.
        tail_mean: whether the mean over the tail is wanted.

    Attributes:
        student: what the losses need.
    """

    def __init__(self, logits: Tensor, ids: Tensor, kept: Tensor | None, tail_mean: bool = False) -> None:
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
        logits.sub_(own[:, None]).exp_()
        self._total = logits.sum(-1)  # [n] at least 1, or 0 where no id is left
        origin = peak if kept is None else torch.maximum(peak, torch.where(kept, gathered, -torch.inf).amax(-1))
        gathered = gathered - origin[:, None]
        tail = (own - origin) + self._total.log()
        lse = tail if kept is None else torch.logaddexp(tail, _logsumexp(gathered, kept))
        self.student = Student(lse, tail, gathered, None if mean is None else mean - origin, peak - origin, origin)

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


def _logsumexp(values: Tensor, chosen: Tensor) -> Tensor:
    """`[n]` log-sum-exp over the chosen ones, of which there is at least one."""
    return torch.where(chosen, values, -torch.inf).logsumexp(-1)
