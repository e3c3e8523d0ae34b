"""Sample: draws with replacement, each entry weighing its share of them.

RS-KD ("Sparse Logit Sampling", arXiv 2503.16870). A forced label weighs its own p, and the draws come from the
rest, weighing (1 - p_label) count / N: put among the draws, it would count twice.

With a proposal power t the draws come from q in proportion to p^t, and an entry weighs count / N times p / q: unbiased
(importance sampling), though the weights of a position sum to 1 in the mean only.

Shapes: n positions, V vocabulary, N draws, K width of the targets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdcache.selection.inverse_cdf import CategoricalSampler
from kdcache.selection.layout import lay, tally
from kdcache.selection.rule import Selection
from kdcache.selection.scan import Scan
from kdcache.targets import SparseTargets


def sample(x: Tensor, seen: Scan, rule: Selection, temperatures: tuple[float, ...], uniform: Tensor) -> SparseTargets:
    """Draw the entries of a tile.

    Args:
        x: `[n, V]` logits.
        seen: their scan, with a head of 1.
        rule: of kind `sample`.
        temperatures: those to store.
        uniform: `[n, N]` in [0, 1).
    """
    n, draws = uniform.shape
    width, t = rule.width(x.shape[-1]), rule.drawn_temperature
    forced, alone = seen.forced, seen.column == 0
    head = torch.where(alone, 0.0, (seen.head[:, 0] / t).exp())
    others = head + seen.rest_at(t).exp()
    own = torch.where(forced, (seen.label / t).exp(), 0.0)
    some = others > 0
    crowd = CategoricalSampler(x, seen, None, t)
    drawn = crowd.find(uniform, some[:, None].expand(-1, draws))
    distinct, counts, number = tally(drawn)
    number = torch.where(some, number, 0)  # a forced label may be the whole support
    column = torch.arange(draws, device=x.device)
    first = torch.where(forced, 0, width)[:, None]  # of the label
    places = torch.where(column < number[:, None], column + forced[:, None].long(), width)
    places = torch.cat([first, places], -1)
    share = counts * (others / draws)[:, None]
    log_total = seen.log_total(1.0)
    logprobs = torch.cat([(seen.label - log_total)[:, None], torch.full_like(share, torch.nan)], -1)
    weights = torch.cat([own[:, None], share], -1) / (own + others)[:, None]
    if rule.proposal_power != 1:
        weights, logprobs = _importance(x, seen, rule, distinct, share), torch.full_like(logprobs, torch.nan)
    return SparseTargets(
        ids=lay(places, torch.cat([seen.labels[:, None], distinct], -1), width, 0),
        logprobs=lay(places, logprobs, width, -torch.inf).float(),
        weights=lay(places, weights, width, 0).float(),
        count=number + forced.long(),
        log_tail=seen.rest.new_full((n, len(temperatures)), torch.nan, dtype=torch.float32),
        **seen.scalars(temperatures),
        temperatures=temperatures,
        kind=rule.kind,
        sample_temperature=rule.sample_temperature,
    )


def _importance(x: Tensor, seen: Scan, rule: Selection, distinct: Tensor, share: Tensor) -> Tensor:
    """`[n, 1 + N]` weights of the forced label, which is p_T, and of `[n, N]` distinct ids, count / N times p_T / q.

    `share` holds count / N times the mass that q is a part of, both in units of the largest logit's.
    """
    t, total = rule.sample_temperature, seen.log_total(rule.sample_temperature)[:, None]
    logits = x.gather(-1, distinct).float().double() - seen.values[:, :1].double()
    ratio = (logits / t - total - logits / rule.drawn_temperature).exp()
    own = torch.where(seen.forced[:, None], seen.label[:, None] / t - total, -torch.inf).exp()
    return torch.cat([own, (share * ratio).clamp(min=torch.finfo(torch.float32).tiny)], -1)
