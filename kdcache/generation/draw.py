"""Draw: logits to the next token, and the log-probability that the token had.

The distribution that is drawn from: q = softmax(logits / T) over the vocabulary, cut to its nucleus, and normalised
again. The nucleus is the smallest set of most likely tokens whose mass is at least top_p (Holtzman et al. 2019, "The
Curious Case of Neural Text Degeneration", arXiv 1904.09751, section 3.1); of equally likely tokens the one of the lower
id comes first. T = 0 takes the most likely token.

Two log-probabilities are given. `logp` is that of the distribution which the token was drawn from, and is what an
importance ratio needs; at T = 0 it is 0. `model_logp` is that of the model itself: T = 1, the whole vocabulary. Without
temperature and top_p they are equal.
Cost: a few passes over the logits in float64; with top_p below 1 a sort of them.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdcache.selection.inverse_cdf import locate


@dataclass(frozen=True)
class Drawn:
    """Tokens and their log-probabilities.

    Attributes:
        tokens: `[N]` int64.
        logp: `[N]` float64, of the distribution that each was drawn from, in nats.
        model_logp: `[N]` float64, of the model at T = 1 over the whole vocabulary.
    """

    tokens: Tensor
    logp: Tensor
    model_logp: Tensor


def draw(logits: Tensor, uniforms: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Drawn:
    """Draw a token for each position.

    Args:
        logits: `[N, V]` of any float type, no NaN.
        uniforms: `[N]` float64 in [0, 1), one for each position.
        temperature: T, at least 0.
        top_p: mass of the nucleus, above 0 and up to 1.
    """
    exact = logits.double()
    model = exact.log_softmax(-1)
    if temperature == 0:
        tokens = logits.argmax(-1)
        return Drawn(tokens, torch.zeros_like(uniforms), _at(model, tokens))
    log_q = model if temperature == 1 else (exact / temperature).log_softmax(-1)
    if top_p < 1:
        log_q = log_q.masked_fill(~nucleus(log_q.exp(), top_p), -torch.inf).log_softmax(-1)
    tokens = locate(log_q.exp().cumsum(-1), uniforms[:, None])[:, 0]
    return Drawn(tokens, _at(log_q, tokens), _at(model, tokens))


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """`[N, V]` bool: the smallest set of most likely tokens whose mass is at least `top_p`; never empty.

    Args:
        probabilities: `[N, V]` float64.
        top_p: above 0 and up to 1.
    """
    ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return torch.empty_like(ids, dtype=torch.bool).scatter_(-1, ids, before < top_p)


def _at(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(-1, tokens[:, None])[:, 0]
