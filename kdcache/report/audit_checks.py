"""Audit checks: what compared rows say together of how a cache was made.

    distance   1 - sum min(share, p) over the stored entries, scaled to a sum of 1: of true ones the mass of the tail
    overlap    share of the stored entries that are among the teacher's most likely, as many
    error      mean |log share - log p| weighted by share, nats, without a constant that all entries of a position share

The slot and the context that fit best are found first; all other checks are made under these. An assumption other than
the right one must fit clearly better, by several standard errors, before it is called a fault.

Shapes: m targets of all rows of the sample, K entries.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdcache.interop.formats import LOGPROBS, WEIGHTS
from kdcache.report.compared_rows import SHIFTS, ComparedRow, distance

Check = dict[str, Any]

OK, FAULT, UNKNOWN = "ok", "fault", "unknown"

_SIGMAS = 4.0
"""By how many standard errors one assumption must fit better than another."""

_LEAST_SHIFT, _LEAST_LEAK = 0.02, 0.001
"""By how much, in distance, it must fit better, too."""

_LEAST_OVERLAP, _SURE_OVERLAP = 0.8, 0.95
"""Overlap below which entries are another teacher's; and above which they are this one's, whatever their values."""

_MOST_ERROR, _MOST_ZEROS = 0.05, 1e-3
_ZERO, _SOME = 1e-12, 1e-6
"""A stored share that is nothing, and a probability of the teacher that is something."""

_MOST_SLOPE, _LEAST_CORRELATION = 0.05, 0.98
"""A slope of log share over log p that is further from 1, on so straight a line, is a temperature."""


class Evidence:
    """What the rows of a sample say together, under the assumption that fits best."""

    def __init__(self, compared: Sequence[ComparedRow], values: str, vocab_size: int) -> None:
        self._rows, self._values, self._uniform = compared, values, math.log(vocab_size)
        self.positions = sum(len(one.row.slots) for one in compared)
        self._distances = {
            (name, shift): torch.cat([distance(one.shares, getattr(one, name).logp[shift]) for one in compared])
            for name in ("alone", "together")
            for shift in SHIFTS
        }
        self._context, self._shift = min(self._distances, key=lambda each: float(self._distances[each].mean()))
        later = torch.cat([one.later for one in compared])
        self._later = later
        if not self._better(("alone", self._shift), (self._context, self._shift), _LEAST_LEAK, later):
            self._context = "alone"
        if not self._better((self._context, 0), (self._context, self._shift), _LEAST_SHIFT):
            self._shift = 0
        self._distance = self._distances[self._context, self._shift]
        self._overlap = self._joined(lambda one: getattr(one, self._context).overlap[self._shift])
        self._slope, self._error = self._fit()

    def _joined(self, of: Callable[[ComparedRow], Tensor]) -> Tensor:
        return torch.cat([of(one) for one in self._rows])

    def _better(self, one: tuple[str, int], two: tuple[str, int], least: float, where: Tensor | None = None) -> bool:
        """Whether the second assumption fits clearly better than the first."""
        gain = self._distances[one] - self._distances[two]
        gain = gain if where is None else gain[where]
        if len(gain) < 2:
            return False
        mean, error = float(gain.mean()), float(gain.std()) / math.sqrt(len(gain))
        return mean > least and mean > _SIGMAS * error

    def _fit(self) -> tuple[float, float]:
        """Slope of log share over log p, 1 where it is near that or no line fits; and the error that is left."""
        sums, parts = np.zeros(3), []
        for one in self._rows:
            logp = getattr(one, self._context).logp[self._shift]
            seen = torch.from_numpy(one.row.used) & (one.shares > _ZERO)
            x, y = (torch.where(seen, each, 0.0) for each in (logp, one.shares.clamp(min=_ZERO).log()))
            each = seen.sum(-1, keepdim=True).clamp(min=1)
            dx, dy = (torch.where(seen, v - v.sum(-1, keepdim=True) / each, 0.0) for v in (x, y))
            sums += [float((a * b).sum()) for a, b in ((dx, dx), (dx, dy), (dy, dy))]
            parts.append((torch.where(seen, one.shares, 0.0), x, y))
        xx, xy, yy = sums.tolist()
        straight = xx > 0 and yy > 0 and xy > _LEAST_CORRELATION * math.sqrt(xx * yy)
        slope = xy / xx if straight and abs(xy / xx - 1) > _MOST_SLOPE else 1.0
        errors = []
        for share, x, y in parts:
            weight = share / share.sum(-1, keepdim=True).clamp(min=_ZERO)
            rest = y - slope * x
            errors.append((weight * (rest - (weight * rest).sum(-1, keepdim=True)).abs()).sum(-1))
        return slope, float(torch.cat(errors).mean())

    def shift(self) -> Check:
        """Whether targets stand a slot early or late."""
        figures = {f"distance_at_{shift:+d}": float(self._distances[self._context, shift].mean()) for shift in SHIFTS}
        if self._shift == 0:
            return check("shift", OK, "targets stand at the slot that they belong to", **figures)
        what = "early" if self._shift > 0 else "late"
        return check(
            "shift", FAULT, f"targets stand one slot {what}: they are the teacher's of the slot "
            f"{'after' if self._shift > 0 else 'before'} theirs", **figures,
        )  # fmt: skip

    def leak(self, isolated: bool | None) -> Check:
        """Whether a packed piece was seen by the next."""
        if not self._later.any():
            return check("leak", UNKNOWN, "no row of the sample holds several pieces")
        names = {"alone": "distance_alone", "together": "distance_together"}
        figures = {
            figure: float(self._distances[name, self._shift][self._later].mean()) for name, figure in names.items()
        }
        if self._context == "alone":
            return check("leak", OK, "each piece was seen alone", **figures)
        if isolated is False:
            return check("leak", OK, "pieces of a row saw each other, as the cache says", **figures)
        return check("leak", FAULT, "pieces saw those before them in their row", **figures)

    def teacher(self) -> Check:
        """Whether the entries are this teacher's."""
        overlap, far = float(self._overlap.mean()), float(self._distance.mean())
        if self._values == WEIGHTS:
            control = self._joined(lambda one: one.alone.control)
            drawn = float(control[control.isfinite()].mean()) if control.isfinite().any() else math.nan
            figures = {"distance": far, "distance_of_a_fresh_draw": drawn}
            if far > drawn + _MOST_ERROR:
                return check("teacher", FAULT, "the draws are not of this teacher", **figures)
            return check("teacher", OK, "the draws are of this teacher", **figures)
        figures = {"overlap": overlap, "error": self._error, "distance": far}
        if overlap < _LEAST_OVERLAP or (overlap < _SURE_OVERLAP and self._error > 5 * _MOST_ERROR):
            return check("teacher", FAULT, "the entries are not those of this teacher", **figures)
        return check("teacher", OK, "the entries are those of this teacher", **figures)

    def tokenizer(self, other: bool) -> Check:
        """Whether the token ids mean to the teacher what they meant to who made the cache."""
        label = self._joined(lambda one: getattr(one, self._context).label_logp)
        known = label[~label.isnan()]
        nll = float(-known.mean()) if len(known) else math.nan
        figures = {"teacher_nll": nll, "uniform_nll": self._uniform}
        if other:
            return check("tokenizer", FAULT, "the tokenizer in the cache is not the teacher's", **figures)
        if nll > self._uniform and self.teacher()["verdict"] == OK:  # it read the same ids when the cache was made
            return check(
                "tokenizer", UNKNOWN, "the teacher finds the tokens less likely than chance: it does not know such "
                "text, or the ids were another tokenizer's when the cache was made", **figures,
            )  # fmt: skip
        if nll > self._uniform:
            return check(
                "tokenizer", FAULT, "the teacher finds the tokens less likely than chance: their ids are another "
                "tokenizer's", **figures,
            )  # fmt: skip
        return check("tokenizer", OK, "the tokens are text to the teacher", **figures)

    def temperature(self) -> Check:
        """Whether values were softened."""
        if self._values == WEIGHTS:
            return check("temperature", UNKNOWN, "shares of draws do not show a temperature of their own")
        if self._slope == 1.0:
            return check("temperature", OK, "values are at T = 1", temperature=1.0)
        t = 1 / self._slope
        return check("temperature", FAULT, f"values are softened: they are the teacher's at T = {t:.2f}", temperature=t)

    def renormalised(self) -> Check:
        """Whether the entries were scaled to a sum of 1."""
        if self._values != LOGPROBS:
            return check("renormalised", UNKNOWN, "the format keeps no log-probabilities")
        stored = self._joined(lambda one: torch.from_numpy(one.row.mass))
        figures = {"stored_mass": float(stored.mean()), "teacher_mass": float(self._mass().mean())}
        if float((stored - 1).abs().mean()) < 2e-3 and figures["teacher_mass"] < 0.99:
            return check("renormalised", FAULT, "the entries were renormalised over those that are kept", **figures)
        return check("renormalised", OK, "the entries have the teacher's own probabilities", **figures)

    def tail(self) -> Check:
        """Whether what was not kept is known."""
        teacher = float((1 - self._mass()).clamp(min=0).mean())
        if self._values == WEIGHTS:
            return check("tail", OK, "draws estimate the whole distribution and leave no tail", teacher_tail=teacher)
        if self._values != LOGPROBS:
            return check(
                "tail", UNKNOWN, "the format keeps logits without their normaliser: whoever trains on them "
                f"renormalises over the entries, and loses a tail of {teacher:.3f}", teacher_tail=teacher,
            )  # fmt: skip
        told = [one.row.log_tail for one in self._rows]
        stored = (
            1 - self._joined(lambda one: torch.from_numpy(one.row.mass))
            if any(each is None for each in told)
            else torch.cat([torch.from_numpy(np.exp(each)) for each in told if each is not None])
        )
        figures = {"stored_tail": float(stored.clamp(min=0).mean()), "teacher_tail": teacher}
        if self.teacher()["verdict"] == FAULT:
            return check("tail", UNKNOWN, "the tail of another teacher is not known here", **figures)
        if teacher > 5e-3 and figures["stored_tail"] < 0.5 * teacher:
            return check("tail", FAULT, "the mass that was not kept is missing", **figures)
        return check("tail", OK, "the mass that was not kept is known", **figures)

    def rounding(self) -> Check:
        """Whether values were rounded away."""
        zeros = self._joined(
            lambda one: (
                (one.shares < _ZERO)
                & torch.from_numpy(one.row.used)
                & (getattr(one, self._context).logp[self._shift] > math.log(_SOME))
            ).double().sum(-1)
        )  # fmt: skip
        entries = sum(int(one.row.count.sum()) for one in self._rows)
        figures = {"zero_share": float(zeros.sum()) / entries}
        if self._values != WEIGHTS:
            figures["error"] = self._error
        if figures["zero_share"] > _MOST_ZEROS:
            return check("rounding", FAULT, "kept entries are stored with a probability of nothing", **figures)
        if self._values != WEIGHTS and self._error > _MOST_ERROR and float(self._overlap.mean()) >= _SURE_OVERLAP:
            return check("rounding", FAULT, "the entries are the teacher's, and their values are not", **figures)
        return check("rounding", OK, "no kept entry is rounded to nothing", **figures)

    def _mass(self) -> Tensor:
        """`[m]` the teacher's mass on the stored entries."""
        return self._joined(
            lambda one: torch.where(
                torch.from_numpy(one.row.used), getattr(one, self._context).logp[self._shift].exp(), 0.0
            ).sum(-1)
        )


def check(name: str, verdict: str, what: str, **figures: float) -> Check:
    """A check as plain values; a figure that is not known is None."""
    return {
        "name": name, "verdict": verdict, "what": what,
        **{key: None if math.isnan(value) else value for key, value in figures.items()},
    }  # fmt: skip
