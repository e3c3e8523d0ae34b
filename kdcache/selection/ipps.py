"""Ipps: exactly k entries, unbiased, with the least variance that exactly k entries can have.

Inclusion probability proportional to size, by systematic sampling (Madow 1949, "On the theory of systematic
sampling, II"); the threshold is that of VarOpt (Cohen, Duffield, Kaplan, Lund and Thorup 2009, arXiv 0803.0473). tau
solves sum min(1, p / tau) = k. An id with p >= tau is heavy: it is kept, with its own p. Each other is light: it is
kept with probability p / tau, and weighs tau = (mass of the lights) / (their number in the target).

Guarantee: exactly min(k, support) distinct entries; weights sum to 1; E[w] = p. The support is what is above 0 in
float64. Ids within 1e-5 of tau count as heavy: that is unbiased too, and makes a light's share of the line
shorter than the distance between two points, whatever rounding does, so no id is drawn twice.

Narrowing takes the stored weights for p and draws again: the weights are the same multiset in every first draw, so tau
is the one that a direct draw would have, and so is each id's variance.

Shapes: n positions, V vocabulary, W width of the head and of the targets, K entries before narrowing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from kdcache.entry_form import EntryForm
from kdcache.errors import ConfigError
from kdcache.lazy_torch import torch
from kdcache.selection.entries import Entries, Heavies, Lights, join_entries
from kdcache.selection.inverse_cdf import CategoricalSampler, locate
from kdcache.selection.kind import Selection, Uniforms, register_kind, setting
from kdcache.selection.scan import Scan
from kdcache.selection.threshold import expected_count, find_heavies, solve_adaptive_tau
from kdcache.selection.truncated import require_k
from kdcache.targets import SparseTargets

if TYPE_CHECKING:
    from torch import Tensor


@register_kind
@dataclass(frozen=True, kw_only=True)
class Ipps(Selection):
    """Exactly k entries, unbiased, with the least variance.

    Attributes:
        k: entries of a position; their mean, where one tau holds for the whole cache.
        min_k: the fewest entries of a position, with `tau`.
        adaptive: one tau for the whole cache instead of one k; a pilot finds it unless it is given.
        tau: that threshold.
        force_label: the true next token is always among the entries.
        sample_temperature: T of the p_T that weights estimate.
    """

    kind: ClassVar[str] = "ipps"
    pilot_settings: ClassVar[tuple[str, ...]] = ("tau",)

    k: int = setting(64, least=1, always=True)
    min_k: int = setting(1, least=1)
    adaptive: bool = False
    tau: float | None = setting(None, above=0, most=1)
    force_label: bool = False
    sample_temperature: float = setting(1.0, least=0.01, most=100)

    def check(self) -> None:
        """Refuse bounds that leave no number of entries; a tau without more means that it is adaptive."""
        if self.min_k > self.k:
            raise ConfigError(f"min_k is {self.min_k}, above k, which is {self.k}")
        if self.force_label and self.k < 2:
            raise ConfigError("force_label needs k to be at least 2 in kind ipps: one for the label, one drawn")
        object.__setattr__(self, "adaptive", self.adaptive or self.tau is not None)

    @property
    def form(self) -> EntryForm:
        """Any entry may be heavy; lights weigh the same. Fewer than k entries where the support is smaller."""
        return EntryForm(sampled=True, ragged=True, most_heavies=None)

    def width(self, vocab_size: int) -> int:
        """k; with `tau`, the most that any position can get."""
        require_k(self.k, vocab_size)
        if self.tau is None:
            return self.k
        # sum min(1, p / tau) is at most 1 / tau; it is rounded to the nearest count.
        return min(vocab_size, max(self.min_k, 1 + self.force_label, math.floor(1 / self.tau) + 1))

    @property
    def random_shape(self) -> tuple[int, ...]:
        """One number a position."""
        return ()

    @property
    def needs_pilot(self) -> bool:
        """Where tau is still to be found."""
        return self.adaptive and self.tau is None

    def fit(self, logits: Iterable[Tensor]) -> Self:
        """With the tau that gives the pilot's positions k entries in the mean."""
        return dataclasses.replace(self, tau=solve_adaptive_tau(logits, self.k, self.sample_temperature))

    def entries(self, x: Tensor, tile: Scan, temperatures: tuple[float, ...], uniform: Tensor | None) -> SparseTargets:
        """Draw the entries of a tile; see `Selection.entries`."""
        assert uniform is not None  # by `random_shape`
        width, t, forced = tile.head.shape[-1], self.sample_temperature, tile.forced
        ids, logits = _head_without_label(tile)  # [n, W]
        mass, rest = (logits / t).exp(), tile.rest_at(t).exp()  # in units of the likeliest id's
        own = torch.where(forced, (tile.label.logprobs / t).exp(), 0.0)
        total = mass.sum(-1) + rest + own
        budget = self._budget(mass, rest, own, total, width, forced)
        heavy, light_mass = find_heavies(mass, rest, budget - forced.long())
        lights = torch.where(light_mass > 0, budget - forced.long() - heavy, 0)
        points, used = systematic_points(uniform, lights, width)
        # In the head, a label that is among the heavies shifts them by one.
        first = heavy + (tile.label.column < heavy).long()
        drawn = CategoricalSampler(x, tile, first, t).find(points, used)
        each = torch.where(lights > 0, light_mass / lights, 0.0)
        log_total = tile.log_total(1.0)
        label = dataclasses.replace(tile.label, logprobs=tile.label.logprobs - log_total)
        entries = join_entries(
            Heavies(ids, logits - log_total[:, None], mass / total[:, None], heavy),
            label,
            own / total,
            Lights(drawn, each / total, lights),
        )
        return SparseTargets(
            **entries,
            **tile.scalars(temperatures),
            temperatures=temperatures,
            kind=self.kind,
            sample_temperature=t,
        )

    def _budget(self, mass: Tensor, rest: Tensor, own: Tensor, total: Tensor, width: int, forced: Tensor) -> Tensor:
        """`[n]` entries of each position, a forced label included; masses in the unit of `total`."""
        if self.tau is None:
            return torch.full_like(forced, width, dtype=torch.int64)
        least = (1 + forced.long()).clamp(min=self.min_k)  # next to a forced label one entry represents the rest
        return expected_count(mass, rest, own, self.tau * total).round().long().maximum(least).clamp(max=width)

    def fewer(self, k: int) -> Selection:
        """k entries at every position."""
        return dataclasses.replace(self, k=k, min_k=min(self.min_k, k), adaptive=False, tau=None)

    def limits(self, old: Selection, width: int) -> dict[str, float]:
        """No more entries than are there, and no lower threshold."""
        assert isinstance(old, Ipps)  # by `made_from`
        if self.tau is None:
            return {"k": old.k}
        if old.tau is None or self.tau < old.tau:
            by = "k, not with tau" if old.tau is None else f"tau {old.tau:g}"
            raise ConfigError(f"tau is {self.tau:g}, but the entries were kept with {by}; it can only be raised")
        return {"k": old.k, "min_k": old.min_k}

    def narrow(self, targets: SparseTargets, entries: Entries, old: Selection, uniforms: Uniforms) -> SparseTargets:
        """Draw again, with the stored weights for p; see `Selection.narrow`."""
        uniform, label = uniforms(self.tau or self.k, None), entries.label
        forced = label.forced
        own = torch.where(forced, entries.label_weight, 0.0)
        order = entries.others.argsort(dim=-1, descending=True, stable=True)
        ranked, mass = entries.take(order), entries.others.gather(-1, order)
        width = min(mass.shape[-1], self.width((1 << 31) - 1))
        budget = self._budget(mass, torch.zeros_like(own), own, torch.ones_like(own), width, forced)
        heavy, light_mass = find_heavies(mass, torch.zeros_like(own), budget - forced.long())
        lights = torch.where(light_mass > 0, budget - forced.long() - heavy, 0)
        points, _ = systematic_points(uniform, lights, width)
        column = torch.arange(mass.shape[-1], device=own.device)
        light = torch.ones_like(order, dtype=torch.bool).scatter_(-1, order, column >= heavy[:, None])
        drawn = locate(torch.where(light, entries.others, 0.0).cumsum(-1), points)
        made = join_entries(
            Heavies(ranked.ids[:, :width], ranked.logprobs[:, :width], mass[:, :width], heavy),
            label,
            own,
            Lights(entries.ids.gather(-1, drawn), torch.where(lights > 0, light_mass / lights, 0.0), lights),
        )
        return dataclasses.replace(targets, **made)


def _head_without_label(tile: Scan) -> tuple[Tensor, Tensor]:
    """`[n, W]` ids and logits of the head without a forced label; where it was in the head, the last is -inf."""
    width = tile.head.shape[-1]
    column = torch.arange(width, device=tile.head.device)
    shifted = column + (column >= tile.label.column[:, None]).long()
    source = shifted.clamp(max=width - 1)
    return tile.ids.gather(-1, source), tile.head.gather(-1, source).masked_fill(shifted == width, -torch.inf)


def systematic_points(uniform: Tensor, lights: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Points (u + j) / L, j < L, of the line on which the lights follow one another.

    Args:
        uniform: `[n]` u.
        lights: `[n]` L.
        width: of the result.

    Returns:
        `[n, width]` points, and which of them are in use.
    """
    column = torch.arange(width, device=uniform.device)
    used = column < lights[:, None]
    return torch.where(used, (uniform[:, None] + column) / lights.clamp(min=1)[:, None], 0.0), used
