"""Head: a student's body, output head and loss in one forward pass, so that `[positions, V]` never exists in training.

The forward of the model is replaced on the instance, not by a wrapper (which breaks the saving of tied weights) and not
by another class (which would write its name into `config.json`). DDP and FSDP wrap the module whose forward holds body,
head and loss, so parameters are gathered where they are used. Without a loss to apply, the forward is the model's own.

A head by hand loses what the model does to its logits afterwards. Known are a factor and a soft cap, found by the names
that transformers gives them, and `fuse_head` compares with the model's own logits, those of ordinary size and those
where a cap bends. A model that does anything else is refused.

Shapes: R rows, L slots, D hidden, V rows of the head.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.isolation import packed_forward
from kdcache.losses import LinearHead

OnHead = Callable[[Tensor, Tensor, Tensor | None], Any]
"""`(hidden [R, L, D], weight [V, D], bias [V] or None)` to anything that holds the loss."""

_CAPS = ("final_logit_softcapping", "output_logit_soft_cap")
# The second of these divides in some models and multiplies in others; the check tells which.
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier")

_CHECKED_TOKENS = 16
_WIDE = 40.0
"""Size to which logits are blown up for the check: a cap of 30 bends them, whatever the weights are."""


@dataclass(frozen=True)
class FusedHead:
    """What a student does after its output head, as `LinearHead` takes it.

    Attributes:
        scale: a factor of the logits.
        softcap: their soft cap, if any.
    """

    scale: float = 1.0
    softcap: float | None = None

    def source(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, vocab: int | None = None) -> LinearHead:
        """The logits of hidden states `[N, D]`, over the first `vocab` ids."""
        return LinearHead(hidden, weight, bias, vocab=vocab, scale=self.scale, softcap=self.softcap)


def fuse_head(model: Any, device: torch.device | str) -> FusedHead:
    """Let a model's forward take `on_head`, a function that makes the loss of its last hidden states.

    `packed_forward(model, tokens, positions, on_head=f)` then returns what f returns. To be called before the model is
    wrapped; the model stays what it is otherwise, and saves as it did.

    Args:
        model: a transformers causal language model.
        device: where its inputs go.

    Raises:
        ModelError: the model's logits are not those of a linear head, scaled and capped.
    """
    body, head = model.base_model, model.get_output_embeddings()
    name = type(model).__name__
    if body is model or type(head) is not nn.Linear:
        raise ModelError(
            f"the student {name} has no linear output head over hidden states of its own ({type(head).__name__}), "
            "which its loss needs"
        )
    found = _matching(model, body, head, device)
    if isinstance(found, float):
        raise ModelError(
            f"the student {name} does something between its hidden states and its logits that is not known here; known "
            f"are a factor ({', '.join(_FACTORS)}) and a soft cap ({', '.join(_CAPS)}), which leave {found:.2g} of them"
        )
    _patch(model, body, head)
    return found


def _patch(model: Any, body: nn.Module, head: nn.Linear) -> None:
    own_forward, own_head = model.forward, head.forward

    def forward(_self: Any, *args: Any, on_head: OnHead | None = None, **kwargs: Any) -> Any:
        if on_head is None:
            return own_forward(*args, **kwargs)
        # By a call of the head itself, so that a head that FSDP shards apart is gathered for it.
        return head(body(*args, **kwargs).last_hidden_state, on_head)

    def head_forward(self: nn.Linear, hidden: Tensor, on_head: OnHead | None = None) -> Any:
        return own_head(hidden) if on_head is None else on_head(hidden, self.weight, self.bias)

    model.forward = types.MethodType(forward, model)
    head.forward = types.MethodType(head_forward, head)  # type: ignore[method-assign]


@torch.no_grad()
def _matching(model: Any, body: nn.Module, head: nn.Linear, device: torch.device | str) -> FusedHead | float:
    """What the model does after its head; or, if that is not known, by how much the best guess is off."""
    training = model.training
    model.eval()
    try:
        tokens = torch.arange(_CHECKED_TOKENS, device=device)[None] % head.weight.shape[0]
        places = torch.arange(_CHECKED_TOKENS, device=device)[None]
        hidden = packed_forward(body, tokens, places).last_hidden_state
        size = head(hidden).abs().max().item()
        cases = [_own_logits(model, head, tokens, places, x) for x in (1.0, _WIDE / max(size, 1e-6))]
    finally:
        model.train(training)
    if not torch.allclose(cases[0][0].float(), hidden.float(), rtol=1e-3, atol=1e-3 * hidden.abs().max().item()):
        return float((cases[0][0] - hidden).abs().max())
    best = float("inf")
    for guess in _guesses(model.config.get_text_config()):
        off = 0.0
        for given, logits in cases:
            mine = guess.source(given.flatten(0, -2), head.weight, head.bias).logits(slice(None))
            own = logits.flatten(0, -2).float()
            off = max(off, ((mine - own).abs().max() / own.abs().max().clamp(min=1e-6)).item())
        if off < max(1e-4, 4 * torch.finfo(logits.dtype).eps):
            return guess
        best = min(best, off)
    return best


def _own_logits(model: Any, head: nn.Module, tokens: Tensor, places: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    """What the model's own forward gives its head, made larger, and the logits that it makes of it."""
    given: list[Tensor] = []

    def enlarge(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        given.append(inputs[0] * factor)
        return (given[-1], *inputs[1:])

    handle = head.register_forward_pre_hook(enlarge)
    try:
        logits: Tensor = packed_forward(model, tokens, places).logits
    finally:
        handle.remove()
    return given[-1], logits


def _guesses(config: Any) -> Iterator[FusedHead]:
    """What a configuration may mean by the names that it gives its factors and caps; that it means nothing, last."""
    factors = [y for x in _numbers(config, _FACTORS) for y in (x, 1 / x)]
    caps: list[float | None] = [*_numbers(config, _CAPS), None]
    yield from (FusedHead(scale, cap) for scale, cap in itertools.product([*factors, 1.0], caps))


def _numbers(config: Any, names: tuple[str, ...]) -> list[float]:
    values = (getattr(config, name, None) for name in names)
    return [float(x) for x in values if isinstance(x, int | float) and x]
