"""The output head of a model on its own: hidden states in, the model's own logits out.

Guarantee: every logit comes out of the model's own forward code, so all that a model does between its hidden states and
its logits (a bias, soft-capping, scaling, a cast) is done; and `[R, L, V]` never exists. The body runs once; then the
model's forward runs again for each tile of positions with its body replaced, for that call, by a stub that returns the
tile's hidden states. No class is changed, and no forward stays replaced. `require_same_logits` compares the two.
Cost: the head over the wanted slots only; in memory `[R, L, D]` and the logits of one tile.

Shapes: R rows, L slots, D hidden, V vocabulary of the model (padding included), n slots of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.isolation import finite_tokens, packed_forward, rounding
from kdcache.pretrained import one_line

_CHECKED_TOKENS = 48
_REMEDY = "use tile_head=False, which holds the logits of a whole batch in memory"


class TiledHead:
    """A causal language model in two parts: the body, and all that comes after it.

    Args:
        model: a transformers causal language model.
        device: where its inputs go.

    Raises:
        ModelError: no part of the model returns hidden states.
    """

    def __init__(self, model: nn.Module, device: torch.device | str) -> None:
        self._model = model
        self._body, self._output = _find_body(model, device)

    def hidden(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """`[R, L, D]` what the head is given, by one forward pass whose head sees a single slot."""
        kept: list[Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> Any:  # noqa: ARG001 - torch's signature
            kept.append(output.last_hidden_state)
            return self._output(last_hidden_state=kept[-1][:1, :1])

        handle = self._body.register_forward_hook(keep)
        try:
            packed_forward(self._model, tokens, positions)
        finally:
            handle.remove()
        return kept[-1]

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, V]` the model's logits for `[n, D]` hidden states of any slots."""
        unused = torch.arange(len(hidden), device=hidden.device)[None]  # as of one piece, which needs no mask
        with _forward_replaced(self._body, lambda *_, **__: self._output(last_hidden_state=hidden[None])):
            logits: Tensor = packed_forward(self._model, torch.zeros_like(unused), unused).logits[0]
        return logits


@torch.inference_mode()
def require_same_logits(model: nn.Module, head: TiledHead, vocab_size: int, seq_len: int, device: Any) -> None:
    """Refuse a model whose logits over tiles are not those of its own forward pass.

    A row of tokens is run whole, and its slots shuffled in two tiles. They may differ by as much as the logits of
    a prefix differ when it is the whole input (a sum over D is then cut otherwise, too), and by some roundings.
    Cost: three forward passes over at most 48 tokens, one over 64 single tokens, and the head twice.

    Raises:
        ModelError: they differ by more, or the model cannot be run in tiles at all.
    """
    tokens = finite_tokens(model, vocab_size, device)[None, : min(seq_len, _CHECKED_TOKENS)].to(device)
    length = tokens.shape[1]
    if length < 2:  # nothing to divide: the first position of real text will be refused, and named
        return
    positions, cut = torch.arange(length, device=device)[None], length // 3 or 1
    own = packed_forward(model, tokens, positions).logits[0].float()
    prefix = packed_forward(model, tokens[:, :cut], positions[:, :cut]).logits[0].float()
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0)).to(own.device)
    name = type(model).__name__
    try:
        hidden = head.hidden(tokens, positions)[0]
        tiled = torch.cat([head.logits(hidden[part.to(hidden.device)]) for part in (order[:cut], order[cut:])])
        moved = (tiled.to(own.device).float() - own[order]).abs().max().item()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ModelError(
            f"{name} cannot run its output head over tiles of positions ({one_line(error)}); {_REMEDY}"
        ) from error
    allowed = 4 * (prefix - own[:cut]).abs().max().item() + 4 * rounding(model) * own.abs().max().item()
    if not moved <= allowed:
        raise ModelError(
            f"the logits of {name} over tiles of positions differ from those of its own forward pass by {moved:.2g} "
            f"(noise allows {allowed:.2g}); {_REMEDY}"
        )


@torch.inference_mode()
def _find_body(model: nn.Module, device: torch.device | str) -> tuple[nn.Module, type]:
    """The outermost part that returns hidden states, which is the last to return them; and the type of its output."""
    found: list[tuple[nn.Module, type]] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:  # noqa: ARG001 - torch's signature
        if isinstance(getattr(output, "last_hidden_state", None), Tensor):
            found.append((module, type(output)))

    handles = [part.register_forward_hook(note) for part in model.modules() if part is not model]
    try:
        token = torch.zeros(1, 1, dtype=torch.long, device=device)
        packed_forward(model, token, token)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ModelError(
            f"{type(model).__name__} cannot run its output head over tiles of positions, as no part of it returns "
            f"hidden states; {_REMEDY}"
        )
    return found[-1]


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace an instance's forward for a while; a hook of accelerate in the same place is put back."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
