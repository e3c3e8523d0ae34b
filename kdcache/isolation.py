"""Isolation: what shares a row or a batch with a piece must not move its logits, and a probe that proves it.

Teacher and student both run through `packed_forward`, the only place that decides how a model
is called. In transformers, position ids that restart build the block mask only with
`attention_mask=None` and `use_cache=False`; a default cache or any 2-D mask silently lets the
neighbour in. transformers may change this, so `probe` checks each model: it changes what is around a
piece, and looks whether the logits of the piece move.

Cost of a probe: five forward passes over two rows of at most 96 tokens, and one over 64 single tokens; four more for a
model that needs prepared masks. Of rows that are not packed, seven over one to three rows.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kdcache.errors import IsolationError, ModelError
from kdcache.prepared_mask import prepare_masks
from kdcache.rows import position_ids

_PROBE_SLOTS = 96
_PROBE_TOKENS = 64


def packed_forward(model: nn.Module, tokens: Tensor, position_ids: Tensor, **more: Any) -> Any:
    """Run a causal language model over packed rows so that each piece sees only itself.

    Args:
        model: a transformers causal language model, wrapped or not.
        tokens: `[R, L]` token ids.
        position_ids: `[R, L]` position of each token inside its piece (`rows.position_ids`). A model that knows of no
            positions (Mamba) is not given them.
        more: for the model's forward, as it is.

    Returns:
        The model's own output, with `.logits [R, L, V]`.
    """
    if _takes_positions(_unwrapped(model)):
        more["position_ids"] = position_ids
    return model(input_ids=tokens, attention_mask=None, use_cache=False, **more)


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model of transformers inside adapters, DDP or a compiled module."""
    from transformers import PreTrainedModel

    return next((part for part in model.modules() if isinstance(part, PreTrainedModel)), model)


def _takes_positions(model: nn.Module) -> bool:
    return _has_parameter(type(model).forward, "position_ids")  # that of an instance may hand on whatever it is given


@functools.cache
def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(function).parameters


def probe(
    model: nn.Module,
    vocab_size: int,
    seq_len: int,
    device: torch.device | str,
    *,
    isolate: bool = True,
    packed: bool = True,
) -> None:
    """Refuse a model whose logits depend on more than the tokens of a context, up to each.

    Packed rows: row 0 holds two pieces. The first is replaced, and the logits of the second must not move by more than
    they move for reasons that have nothing to do with it: repeating the call, and replacing the other row of the batch
    (which shifts, for one, how experts are batched). A model that fails is tried again with prepared masks, and keeps
    them if it then passes and gives a packed piece the logits that it has alone. Likewise the last token is replaced,
    and nothing before it must move. With `isolate` false only that is asked.

    A row for each document: the logits of a row must be the same, up to the rounding that another shape of batch
    brings, whether it is alone or in a batch, with padding behind it and other rows, as long as rows can be, around it;
    and nothing that is put in the place of the padding may move them.

    Args:
        model: a transformers causal language model, on the device.
        vocab_size: token ids lie below it.
        seq_len: the most slots of a row.
        device: where its inputs go.
        isolate: whether the pieces of a row must be kept apart.
        packed: whether rows hold several pieces; otherwise each is one.

    Raises:
        IsolationError: they moved by more.
        ModelError: the logits are not finite.
    """
    if seq_len < 3:  # a row of two slots cannot hold two pieces
        return
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            known = finite_tokens(model, vocab_size, device)
            if len(known):  # otherwise the first position of real text will be refused, and named
                probing = _Probe(model, known, seq_len, device)
                if packed:
                    probing.packed_rows(isolate)
                else:
                    probing.single_rows()
    finally:
        model.train(training)


class _Probe:
    """A model, and rows of tokens `[3, slots]` of which parts are replaced."""

    def __init__(self, model: nn.Module, known: Tensor, seq_len: int, device: torch.device | str) -> None:
        slots = min(seq_len, _PROBE_SLOTS)
        self._model, self._seq_len, self._device, self._first = model, seq_len, device, slots // 3
        index = torch.from_numpy(np.random.default_rng(0).integers(0, len(known), (3, slots)))
        self._base, self._other = known[index], known[(index + 1) % len(known)]
        self._name = type(model).__name__

    def packed_rows(self, isolate: bool) -> None:
        """Two rows, the first of two pieces."""
        first, base, other = self._first, self._base[:2], self._other[:2]
        segments = np.repeat(np.arange(2), (first, base.shape[1] - first))[None].repeat(2, 0)
        positions = torch.from_numpy(position_ids(segments if isolate else np.zeros_like(segments)))

        def second_piece(tokens: Tensor) -> Tensor:
            return self._logits(tokens, positions, 0, slice(first, None))

        neighbour, other_row, last = base.clone(), base.clone(), base.clone()
        neighbour[0, :first] = other[0, :first]
        other_row[1] = other[1]
        last[0, -1] = other[0, -1]
        reference = self._finite(second_piece(base))
        noise = max(most_moved(second_piece(base), reference), most_moved(second_piece(other_row), reference))
        allowed = 4 * noise + 0.25 * rounding(self._model) * reference.abs().max().item()
        self._require_causal(most_moved(second_piece(last)[:-1], reference[:-1]), allowed)
        moved = most_moved(second_piece(neighbour), reference) if isolate else 0.0
        if moved <= allowed:
            return
        masks = prepare_masks(self._model)
        try:
            reference, (alone, rounded) = second_piece(base), self._alone(base[:1, first:])
            apart = (
                most_moved(second_piece(neighbour), reference) <= allowed and most_moved(reference, alone) <= rounded
            )
        except torch.OutOfMemoryError:
            raise
        except Exception:  # it takes no such masks, and may say so in any way
            apart = False
        if not apart:
            masks.remove()
            raise IsolationError(
                f"{self._name} lets packed pieces see each other: changing one piece moved the next one's logits by "
                f'{moved:.2g} (noise allows {allowed:.2g}); it needs a cache dumped with pack="none", where each '
                "document has a row of its own, or with isolate=False, where the documents of a row see each other"
            )

    def single_rows(self) -> None:
        """Three rows; the one in the middle is short, and followed by padding."""
        length, base = self._base.shape[1] - self._first, self._base.clone()
        base[1, length:] = 0
        positions = torch.arange(base.shape[1]).repeat(3, 1)
        late = positions.clone()
        late[[0, 2]] += self._seq_len - base.shape[1]  # as in a batch of the longest rows

        def middle(tokens: Tensor, positions: Tensor = positions) -> Tensor:
            return self._logits(tokens, positions, 1, slice(length))

        behind, around = base.clone(), base.clone()
        behind[1, length:] = self._other[1, length:]
        around[[0, 2]] = self._other[[0, 2]]
        reference = self._finite(middle(base))
        noise = max(most_moved(middle(base), reference), most_moved(middle(around), reference))
        allowed = 4 * noise + 0.25 * rounding(self._model) * reference.abs().max().item()
        self._require_causal(most_moved(middle(behind), reference), allowed)
        alone, rounded = self._alone(base[1:2, :length])
        moved = max(most_moved(logits, alone) for logits in (reference, middle(around), middle(around, late)))
        if moved > rounded:
            raise IsolationError(
                f"{self._name} gives a row other logits in a batch than alone: they move by {moved:.2g} (noise allows "
                f"{rounded:.2g}) with the padding behind it, with other rows, or with the length of the longest of "
                f"them, up to {self._seq_len} tokens"
            )

    def _logits(self, tokens: Tensor, positions: Tensor, row: int, part: slice) -> Tensor:
        """Those of some slots of one row."""
        logits: Tensor = packed_forward(self._model, tokens.to(self._device), positions.to(self._device)).logits
        return logits[row, part].detach().float().cpu().clone()  # a view would keep the logits of all rows

    def _finite(self, logits: Tensor) -> Tensor:
        if not torch.isfinite(logits).all():
            raise ModelError(f"{self._name} gives NaN or infinite logits for plain tokens; try another dtype")
        return logits

    def _require_causal(self, moved: float, allowed: float) -> None:
        if moved > allowed:
            raise IsolationError(
                f"{self._name} is not causal: changing a token moved the logits before it by {moved:.2g}"
            )

    def _alone(self, tokens: Tensor) -> tuple[Tensor, float]:
        """The logits of tokens `[1, n]` alone, and by how much the rounding of another batch may move them."""
        positions = torch.arange(tokens.shape[1])[None]
        alone = self._logits(tokens, positions, 0, slice(None))
        copies = self._logits(tokens.expand(3, -1), positions.expand(3, -1), 1, slice(None))
        return alone, allowed_rounding(self._model, alone, copies)


def allowed_rounding(model: nn.Module, alone: Tensor, copies: Tensor) -> float:
    """By how much the rounding of a batch of another shape may move a model's logits.

    Allowed are 128 spacings of the largest logit, or a quarter of it where that is less; and as much again if a batch
    of copies shows that it is needed.

    Args:
        model: a transformers causal language model.
        alone: its logits of a row that is alone.
        copies: its logits of the same row in a batch of equal rows.
    """
    # Numbers of a quantised model are spaced by its weights and by what it rounds them to, not by its dtype.
    spacing = max(rounding(model), 2**-7 if getattr(model, "is_quantized", False) else 0.0)
    allowed = min(128 * spacing, 0.25) * alone.abs().max().item()
    return allowed + min(4 * most_moved(copies, alone), allowed)


def most_moved(one: Tensor, two: Tensor) -> float:
    """The largest difference between two logits; infinite where one is not a number."""
    return (one - two).abs().nan_to_num(torch.inf).max().item() if one.numel() else 0.0


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
