"""Sample: draws with replacement, each entry weighing its share of them.

RS-KD ("Sparse Logit Sampling", arXiv 2503.16870). A forced label weighs its own p, and the draws come from the
rest, weighing (1 - p_label) count / N: put among the draws, it would count twice.

With a proposal power t the draws come from q in proportion to p^t, and an entry weighs count / N times p / q: unbiased
(importance sampling), though the weights of a position sum to 1 in the mean only.

Narrowing keeps some of the draws, without replacement, which leaves draws with replacement from p.

Shapes: n positions, V vocabulary, N draws, K width of the targets.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kdcache.entry_form import EntryForm
from kdcache.errors import ConfigError, TargetError
from kdcache.lazy_torch import torch
from kdcache.selection.entries import Entries, count_draws, scatter_entries
from kdcache.selection.inverse_cdf import CategoricalSampler
from kdcache.selection.kind import Selection, Uniforms, register_kind, setting
from kdcache.selection.scan import Scan
from kdcache.targets import SparseTargets

if TYPE_CHECKING:
    from torch import Tensor


@register_kind
@dataclass(frozen=True, kw_only=True)
class Sample(Selection):
    """Draws with replacement.

    Attributes:
        draws: N.
        force_label: the true next token is always among the entries, in addition to the draws.
        sample_temperature: T of the p_T that weights estimate.
        proposal_power: t of the distribution in proportion to p_T^t that is drawn from; where it is not 1, importance
            weights make up for it.
    """

    kind: ClassVar[str] = "sample"

    draws: int = setting(least=1)
    force_label: bool = False
    sample_temperature: float = setting(1.0, least=0.01, most=100)
    proposal_power: float = setting(1.0, least=0.5, most=2)

    @property
    def form(self) -> EntryForm:
        """Lights weigh how often they were drawn; with importance weights each entry has a weight of its own."""
        return EntryForm(
            sampled=True, ragged=True, most_heavies=int(self.force_label), draws=self.draws,
            free_weights=self.proposal_power != 1,
        )  # fmt: skip

    def width(self, vocab_size: int) -> int:
        """N and the label, where the vocabulary has so many tokens."""
        return min(vocab_size, self.draws + self.force_label)

    def head(self, vocab_size: int) -> int:
        """The largest logit alone."""
        return 1

    @property
    def drawn_temperature(self) -> float:
        """T of the p_T that is drawn from; the weights make up for the difference to `sample_temperature`."""
        return self.sample_temperature / self.proposal_power

    @property
    def random_shape(self) -> tuple[int, ...]:
        """A number a draw."""
        return (self.draws,)

    def entries(self, x: Tensor, tile: Scan, temperatures: tuple[float, ...], uniform: Tensor | None) -> SparseTargets:
        """Draw the entries of a tile; see `Selection.entries`."""
        assert uniform is not None  # by `random_shape`
        draws, width, t = self.draws, self.width(x.shape[-1]), self.drawn_temperature
        forced, alone = tile.forced, tile.label.column == 0
        head = torch.where(alone, 0.0, (tile.head[:, 0] / t).exp())
        others = head + tile.rest_at(t).exp()
        own = torch.where(forced, (tile.label.logprobs / t).exp(), 0.0)
        some = others > 0
        drawn = CategoricalSampler(x, tile, None, t).find(uniform, some[:, None].expand(-1, draws))
        distinct, counts, number = count_draws(drawn)
        number = torch.where(some, number, 0)  # a forced label may be the whole support
        column = torch.arange(draws, device=x.device)
        first = torch.where(forced, 0, width)[:, None]  # of the label
        places = torch.where(column < number[:, None], column + forced[:, None].long(), width)
        places = torch.cat([first, places], -1)
        share = counts * (others / draws)[:, None]
        label_logprob = tile.label.logprobs - tile.log_total(1.0)
        logprobs = torch.cat([label_logprob[:, None], torch.full_like(share, torch.nan)], -1)
        weights = torch.cat([own[:, None], share], -1) / (own + others)[:, None]
        if self.proposal_power != 1:
            weights, logprobs = self._importance(x, tile, distinct, share), torch.full_like(logprobs, torch.nan)
        return SparseTargets(
            ids=scatter_entries(places, torch.cat([tile.label.ids[:, None], distinct], -1), width, 0),
            logprobs=scatter_entries(places, logprobs, width, -torch.inf).float(),
            weights=scatter_entries(places, weights, width, 0).float(),
            count=number + forced.long(),
            **tile.scalars(temperatures),
            temperatures=temperatures,
            kind=self.kind,
            sample_temperature=self.sample_temperature,
        )

    def _importance(self, x: Tensor, tile: Scan, distinct: Tensor, share: Tensor) -> Tensor:
        """`[n, 1 + N]` weights: of the forced label p_T, and of `[n, N]` distinct ids count / N times p_T / q.

        `share` holds count / N times the mass that q is a part of, both in units of the largest logit's.
        """
        t, total = self.sample_temperature, tile.log_total(self.sample_temperature)[:, None]
        logits = x.gather(-1, distinct).float().double() - tile.values[:, :1].double()
        ratio = (logits / t - total - logits / self.drawn_temperature).exp()
        own = torch.where(tile.forced[:, None], tile.label.logprobs[:, None] / t - total, -torch.inf).exp()
        return torch.cat([own, (share * ratio).clamp(min=torch.finfo(torch.float32).tiny)], -1)

    def fewer(self, k: int) -> Selection:
        """k draws."""
        return dataclasses.replace(self, draws=k)

    def limits(self, old: Selection, width: int) -> dict[str, float]:
        """No more draws than were made, and none with importance weights."""
        assert isinstance(old, Sample)  # by `made_from`
        if old.proposal_power != 1 or self.proposal_power != 1:
            raise ConfigError(
                "draws with a proposal_power cannot be thinned out, as their weights are no counts; dump them anew"
            )
        return {"draws": old.draws}

    def narrow(self, targets: SparseTargets, entries: Entries, old: Selection, uniforms: Uniforms) -> SparseTargets:
        """Keep the draws with the smallest numbers: every subset of that size is equally likely.

        Raises:
            TargetError: weights that are no counts of draws.
        """
        assert isinstance(old, Sample)  # by `made_from`
        before, label = old.draws, entries.label
        mass = entries.others.sum(-1, keepdim=True)
        some = mass > 0
        counts = torch.where(some, entries.others / mass * before, 0.0).round().long()  # [n, K]
        wrong = some[:, 0] & (counts.sum(-1) != before)
        if wrong.any():
            raise TargetError(f"the weights of position {int(wrong.nonzero()[0])} are not shares of {before} draws")
        draw = torch.arange(before, device=counts.device).expand(len(counts), -1).contiguous()
        owner = torch.searchsorted(counts.cumsum(-1), draw, right=True).clamp(max=counts.shape[-1] - 1)  # [n, N]
        stay = owner.gather(-1, uniforms(self.draws, before).topk(self.draws, largest=False).indices)
        left = torch.zeros_like(counts).scatter_add_(-1, stay, torch.ones_like(stay)) * some
        width = min(entries.ids.shape[-1], self.draws + self.force_label)
        one = label.forced.long()[:, None]
        place = torch.cat([
            torch.where(label.forced, 0, width)[:, None],
            torch.where(left > 0, (left > 0).cumsum(-1) - 1 + one, width),
        ], -1)  # fmt: skip
        weights = torch.cat([entries.label_weight[:, None], mass * left / self.draws], -1)
        logprobs = torch.cat([label.logprobs[:, None], torch.full_like(mass * left, torch.nan)], -1)
        return dataclasses.replace(
            targets,
            ids=scatter_entries(place, torch.cat([label.ids[:, None], entries.ids], -1), width, 0),
            logprobs=scatter_entries(place, logprobs, width, -torch.inf).float(),
            weights=scatter_entries(place, weights, width, 0).float(),
            count=(left > 0).sum(-1) + one[:, 0],
        )
