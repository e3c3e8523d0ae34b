"""Isolation: pieces packed in one row must not see each other, and a probe that proves it.

Teacher and student both run through `packed_forward`, the only place that decides how a model
is called. In transformers, position ids that restart build the block mask only with
`attention_mask=None` and `use_cache=False`; a default cache or any 2-D mask silently lets the
neighbour in. transformers may change this, so `probe` checks each model: it changes one
piece and looks whether the logits of the next one move.

Cost of a probe: five forward passes over two rows of at most 96 tokens, and one over 64 single tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.errors import IsolationError, ModelError
from kdcache.rows import position_ids

_PROBE_SLOTS = 96
_PROBE_TOKENS = 64


def packed_forward(model: nn.Module, tokens: Tensor, positions: Tensor, **more: Any) -> Any:
    """Run a causal language model over packed rows so that each piece sees only itself.

    Args:
        model: a transformers causal language model, wrapped or not.
        tokens: `[R, L]` token ids.
        positions: `[R, L]` position of each token inside its piece (`rows.position_ids`).
        more: for the model's forward, as it is.

    Returns:
        The model's own output, with `.logits [R, L, V]`.
    """
    return model(input_ids=tokens, position_ids=positions, attention_mask=None, use_cache=False, **more)


def probe(model: nn.Module, vocab_size: int, seq_len: int, device: torch.device | str, *, isolate: bool = True) -> None:
    """Refuse a model that leaks between packed pieces, or from a token to those before it.

    Row 0 holds two pieces. The first is replaced, and the logits of the second must not move
    by more than they move for reasons that have nothing to do with it: repeating the call, and
    replacing the other row of the batch (which shifts, for one, how experts are batched). Likewise the
    last token is replaced, and nothing before it must move. With `isolate` false only that is asked.

    Raises:
        IsolationError: they moved by more.
        ModelError: the logits are not finite.
    """
    slots = min(seq_len, _PROBE_SLOTS)
    first = slots // 3
    if first < 1:  # a row of two slots cannot hold two pieces
        return
    segments = np.repeat(np.arange(2), (first, slots - first))[None].repeat(2, 0)
    positions = torch.from_numpy(position_ids(segments if isolate else np.zeros_like(segments))).to(device)

    def second_piece(tokens: Tensor) -> Tensor:
        logits = packed_forward(model, tokens.to(device), positions).logits
        kept: Tensor = logits[0, first:].detach().float().cpu().clone()  # a view would keep the logits of both rows
        return kept

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            known = finite_tokens(model, vocab_size, device)
            if not len(known):  # the first position of real text will be refused, and named
                return
            index = torch.from_numpy(np.random.default_rng(0).integers(0, len(known), (2, slots)))
            base, other = known[index], known[(index + 1) % len(known)]
            neighbour, other_row, last = base.clone(), base.clone(), base.clone()
            neighbour[0, :first] = other[0, :first]
            other_row[1] = other[1]
            last[0, -1] = other[0, -1]
            reference, again = second_piece(base), second_piece(base)
            moved = (second_piece(neighbour) - reference).abs().max().item() if isolate else 0.0
            backward = (second_piece(last) - reference)[:-1].abs().max().item()
            noise = max((x - reference).abs().max().item() for x in (again, second_piece(other_row)))
    finally:
        model.train(training)
    if not torch.isfinite(reference).all():
        raise ModelError(f"{type(model).__name__} gives NaN or infinite logits for plain tokens; try another dtype")
    allowed = 4 * noise + 0.25 * rounding(model) * reference.abs().max().item()
    name = type(model).__name__
    if backward > allowed:
        raise IsolationError(f"{name} is not causal: changing a token moved the logits before it by {backward:.2g}")
    if moved > allowed:
        raise IsolationError(
            f"{name} lets packed pieces see each other: changing one piece moved the next one's logits by {moved:.2g} "
            f"(noise allows {allowed:.2g}); it needs attention that honours position_ids, or a cache dumped with "
            "isolate=False, whose rows are one context each"
        )


def rounding(model: nn.Module) -> float:
    """The relative spacing of numbers in a model's dtype."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return torch.finfo(dtype).eps


def finite_tokens(model: nn.Module, vocab_size: int, device: torch.device | str) -> Tensor:
    """`[<= 64]` token ids, in a fixed order; the model's logits are finite after each of them, taken alone."""
    ids = torch.from_numpy(np.random.default_rng(1).permutation(vocab_size)[:_PROBE_TOKENS])
    logits = packed_forward(
        model, ids[:, None].to(device), torch.zeros(len(ids), 1, dtype=torch.long, device=device)
    ).logits
    return ids[torch.isfinite(logits).all(-1).all(-1).cpu()]
