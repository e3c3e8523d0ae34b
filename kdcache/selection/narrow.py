"""Narrow: fewer entries from entries, for `kdcache convert`, without the teacher.

`topk` and `topp` keep the largest and move the rest into every stored tail, exactly; so does `full`, by
becoming one of them. `ipps` takes the stored weights for p and draws again: the weights are the same multiset
in every first draw, so tau is the one that a direct draw would have, and so is each id's variance. `sample` keeps
some of its draws, without replacement, which leaves draws with replacement from p.
Fresh numbers are needed: a uniform that decided who is here says nothing new about who should stay.

Shapes: N positions, K entries now, W after, D draws now, n_T temperatures.
"""

from __future__ import annotations

import dataclasses
import struct
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import ConfigError, TargetError
from kdcache.rows import IGNORE
from kdcache.selection.inverse_cdf import locate
from kdcache.selection.ipps import compose, expected_count, solve, systematic
from kdcache.selection.layout import lay
from kdcache.selection.rule import Selection
from kdcache.selection.truncated import keep, prefix
from kdcache.selection.uniforms import NARROW, default_keys, uniforms
from kdcache.targets import SAMPLED_KINDS, SparseTargets

_FROM = {
    "topk": ("topk", "full"),
    "topp": ("topp", "topk", "full"),
    "sample": ("sample",),
    "ipps": ("ipps",),
    "full": ("full",),
}
"""Kinds that each kind can be made from."""


@torch.no_grad()
def narrow(
    targets: SparseTargets,
    selection: Selection,
    *,
    source: Selection,
    labels: Tensor | None = None,
    seed: int = 0,
    keys: Tensor | None = None,
) -> SparseTargets:
    """Lower the number of entries.

    Args:
        targets: `[N]` positions; one with `count` 0 stays as it is.
        selection: the rule to obey from now on.
        source: the rule that made the targets.
        labels: `[N]` true next tokens, for rules with `force_label`.
        seed: of the sampled kinds.
        keys: `[N, 3]` int64 shard, row, position, as for `select`.

    Returns:
        The same scalars over fewer entries, in the order that `select` gives; no wider than the rule's width.

    Raises:
        ConfigError: the rule asks for entries that the source did not keep.
        TargetError: a forced label that is not among the entries, or weights that are no counts of draws.
    """
    require_narrower(selection, source, targets.ids.shape[-1])
    if selection.force_label and labels is None:
        raise ConfigError("--force-label needs the true next tokens")
    entries = _Entries.by_id(targets, labels if selection.force_label else None)
    if selection.kind not in SAMPLED_KINDS:
        return _truncate(targets, entries, selection)
    keys = default_keys(len(targets.count), targets.count.device) if keys is None else keys.to(targets.count.device)
    if selection.kind == "ipps":
        return _redraw(targets, entries, selection, uniforms(seed, keys, _domain(selection.tau or selection.k)))
    assert source.draws is not None and selection.draws is not None  # checked when built
    return _thin(
        targets, entries, selection, source.draws, uniforms(seed, keys, _domain(selection.draws), source.draws)
    )


def _domain(size: float) -> int:
    """Where the numbers come from: elsewhere for each size, so that entries narrowed twice see fresh ones twice."""
    (word,) = struct.unpack("<Q", struct.pack("<d", size))
    return NARROW ^ int(word)


def require_narrower(new: Selection, old: Selection, width: int) -> None:
    """Refuse a rule that asks for entries that another one, of `width` entries, did not keep.

    Raises:
        ConfigError: naming the option, its value and the limit.
    """
    if old.kind not in _FROM[new.kind]:
        raise ConfigError(f"--select {new.kind} cannot be made from the entries of {old.kind}; dump it anew")
    if old.kind != "full" and new.force_label != old.force_label:
        raise ConfigError("--force-label cannot be changed after the dump")
    if new.sample_temperature != old.sample_temperature:
        raise ConfigError(
            f"--sample-temperature is {new.sample_temperature:g}, "
            f"but the entries were drawn at {old.sample_temperature:g}"
        )
    if old.proposal_power != 1 or new.proposal_power != 1:
        raise ConfigError(
            "draws with --proposal-power cannot be thinned out, as their weights are no counts; dump them anew"
        )
    if new.tau is not None and (old.tau is None or new.tau < old.tau):
        stands = "--k, not with tau" if old.tau is None else f"tau {old.tau:g}"
        raise ConfigError(f"tau is {new.tau:g}, but the entries were kept with {stands}; it can only be raised")
    for name, kept in _limits(new, old, width).items():
        if getattr(new, name) > kept:
            raise ConfigError(
                f"--{name.replace('_', '-')} is {getattr(new, name):g}, but the entries were kept with {kept:g}; "
                "it can be lowered, not raised"
            )


def _limits(new: Selection, old: Selection, width: int) -> dict[str, Any]:
    """The most that each setting may be."""
    if new.kind == "full":
        return {}
    if new.kind == "sample":
        return {"draws": old.draws}
    limits: dict[str, Any] = {"k": width if old.kind in ("topk", "full") else old.k}
    if old.kind == "topp":
        limits |= {"top_p": old.top_p, "min_k": old.min_k}
    if new.tau is not None:
        limits |= {"min_k": old.min_k}
    return limits


@dataclass(frozen=True)
class _Entries:
    """Entries in some order, float64; unused ones weigh nothing. `column` is a forced label's, K for none."""

    ids: Tensor  # [N, K]
    logprobs: Tensor  # [N, K]
    weights: Tensor  # [N, K]
    column: Tensor  # [N]
    labels: Tensor  # [N]

    @classmethod
    def by_id(cls, targets: SparseTargets, labels: Tensor | None) -> _Entries:
        """The entries of targets in id order, the unused ones last, with the labels found among them.

        Raises:
            TargetError: a label is not there.
        """
        valid = targets.valid
        if labels is None:
            labels = torch.full_like(targets.count, IGNORE)
        labels = labels.to(targets.ids)
        found = (targets.ids == labels[:, None]) & valid
        missing = (labels != IGNORE) & ~found.any(-1) & (targets.count > 0)
        if missing.any():
            raise TargetError(f"the label of position {int(missing.nonzero()[0])} is not among its entries")
        weights = torch.where(valid, targets.weights, 0).double()
        column = torch.where(found.any(-1), found.long().argmax(-1), valid.shape[-1])
        given = cls(targets.ids.long(), targets.logprobs.double(), weights, column, labels.long())
        return given.take(torch.where(valid, given.ids, torch.iinfo(torch.int64).max).argsort(dim=-1, stable=True))

    def take(self, order: Tensor) -> _Entries:
        """The same entries in another order, `[N, K]` columns."""
        ids, logprobs, weights = (x.gather(-1, order) for x in (self.ids, self.logprobs, self.weights))
        at = order == self.column[:, None]
        return _Entries(
            ids, logprobs, weights, torch.where(self.forced, at.long().argmax(-1), self.column), self.labels
        )

    @property
    def forced(self) -> Tensor:
        """`[N]` whether a label must stay."""
        return self.column < self.ids.shape[-1]

    @property
    def label(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`[N]` each: the label's id, log-probability and weight (of no meaning unless forced); and whether it is."""
        column = self.column.clamp(max=self.ids.shape[-1] - 1)[:, None]
        return self.labels, self.logprobs.gather(-1, column)[:, 0], self.weights.gather(-1, column)[:, 0], self.forced

    @property
    def others(self) -> Tensor:
        """`[N, K]` weights without the forced label's."""
        columns = torch.arange(self.ids.shape[-1], device=self.ids.device)
        return self.weights.masked_fill(columns == self.column[:, None], 0.0)


def _width(entries: _Entries, rule: Selection) -> int:
    return min(entries.ids.shape[-1], rule.width(torch.iinfo(torch.int32).max))


def _truncate(targets: SparseTargets, entries: _Entries, rule: Selection) -> SparseTargets:
    ranked = entries.take(entries.logprobs.argsort(dim=-1, descending=True, stable=True))
    count = prefix(ranked.logprobs, rule).minimum(targets.count)
    labels, logprob, _, forced = ranked.label
    ids, logprobs, moved = keep(ranked.ids, ranked.logprobs, count, (labels, logprob, ranked.column, forced))
    left = torch.where(moved, ranked.logprobs, -torch.inf)
    joining = torch.stack([(left / t).logsumexp(-1) for t in targets.temperatures], -1)  # [N, n_T]
    width = _width(entries, rule)
    return dataclasses.replace(
        targets,
        ids=ids[:, :width],
        logprobs=logprobs[:, :width].float(),
        weights=logprobs[:, :width].float().exp(),
        count=count,
        log_tail=torch.logaddexp(targets.log_tail.double(), joining - targets.log_partition).float(),
        kind=rule.kind,
    )


def _redraw(targets: SparseTargets, entries: _Entries, rule: Selection, uniform: Tensor) -> SparseTargets:
    labels, logprob, own, forced = entries.label
    own, one = torch.where(forced, own, 0.0), forced.long()
    order = entries.others.argsort(dim=-1, descending=True, stable=True)
    ranked, mass = entries.take(order), entries.others.gather(-1, order)
    nothing = torch.zeros_like(own)
    width = _width(entries, rule)
    if rule.tau is None:
        budget = torch.full_like(one, width)
    else:
        expected = expected_count(mass, nothing, own, torch.full_like(own, rule.tau)).round().long()
        budget = expected.maximum((1 + one).clamp(min=rule.min_k)).clamp(max=width)
    heavy, light_mass = solve(mass, nothing, budget - one)
    lights = torch.where(light_mass > 0, budget - one - heavy, 0)
    points, _ = systematic(uniform, lights, width)
    column = torch.arange(mass.shape[-1], device=own.device)
    light = torch.ones_like(order, dtype=torch.bool).scatter_(-1, order, column >= heavy[:, None])
    drawn = locate(torch.where(light, entries.others, 0.0).cumsum(-1), points)
    made = compose(
        (ranked.ids[:, :width], ranked.logprobs[:, :width], mass[:, :width], heavy),
        (labels, logprob, own, forced),
        (entries.ids.gather(-1, drawn), torch.where(lights > 0, light_mass / lights, 0.0), lights),
    )
    return dataclasses.replace(targets, **made)


def _thin(targets: SparseTargets, entries: _Entries, rule: Selection, before: int, uniform: Tensor) -> SparseTargets:
    """Of `[N, D]` draws keep those with the smallest numbers: every subset of that size is equally likely."""
    assert rule.draws is not None  # checked when built
    labels, logprob, own, forced = entries.label
    mass = entries.others.sum(-1, keepdim=True)
    some = mass > 0
    counts = torch.where(some, entries.others / mass * before, 0.0).round().long()  # [N, K]
    wrong = some[:, 0] & (counts.sum(-1) != before)
    if wrong.any():
        raise TargetError(f"the weights of position {int(wrong.nonzero()[0])} are not shares of {before} draws")
    draw = torch.arange(before, device=counts.device).expand(len(counts), -1).contiguous()
    owner = torch.searchsorted(counts.cumsum(-1), draw, right=True).clamp(max=counts.shape[-1] - 1)  # [N, D]
    stay = owner.gather(-1, uniform.topk(rule.draws, largest=False).indices)
    left = torch.zeros_like(counts).scatter_add_(-1, stay, torch.ones_like(stay)) * some
    width = _width(entries, rule)
    one = forced.long()[:, None]
    place = torch.cat([
        torch.where(forced, 0, width)[:, None],
        torch.where(left > 0, (left > 0).cumsum(-1) - 1 + one, width),
    ], -1)  # fmt: skip
    weights = torch.cat([own[:, None], mass * left / rule.draws], -1)
    logprobs = torch.cat([logprob[:, None], torch.full_like(mass * left, torch.nan)], -1)
    return dataclasses.replace(
        targets,
        ids=lay(place, torch.cat([labels[:, None], entries.ids], -1), width, 0),
        logprobs=lay(place, logprobs, width, -torch.inf).float(),
        weights=lay(place, weights, width, 0).float(),
        count=(left > 0).sum(-1) + one[:, 0],
    )
