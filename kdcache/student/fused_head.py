"""A student's body, output head and loss in one forward pass: `[positions, V]` exists neither in training nor after.

Two forwards are replaced on their instances: the output head's hands its input to the loss instead of multiplying it,
and the model's returns that loss. All that a model does up to its head is its own code, run as ever. There is no
wrapper (which breaks the saving of tied weights) and no other class (which would write its name into `config.json`).
DDP and FSDP wrap the module whose forward holds body, head and loss, so parameters are gathered where they are used,
also those of a head that is sharded on its own. Without a loss to apply, both forwards are what they were.

What a model does to its logits after the head is lost that way. Known are a factor and a soft cap, found by the names
that transformers gives them, and `fuse_head` compares with the model's own logits, those of ordinary size and those
where a cap bends. A model that does anything else is refused.

`compute_loss` is the loss of one batch for any loop, and `with_logits` what measuring uses.

Shapes: R rows, L slots, M labelled slots, D hidden, V rows of the head.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kdcache.errors import ModelError
from kdcache.extras import WRITER_LOGP
from kdcache.isolation import packed_forward
from kdcache.losses import Figures, LinearHead, LogitSource, Objective, PositionWeights, StoredLogits, distil
from kdcache.pretrained import one_line
from kdcache.student.data import extra_of_labels, labelled

T = TypeVar("T")

OnHead = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""`(hidden [R, L, D], weight [V, D], bias [V] or None)` to a scalar loss."""

Auxiliary = Callable[[Tensor, dict[str, Any]], Tensor]
"""`(hidden [R, L, D], batch)` to a scalar that is added to the loss: a term that learns from `batch["extras"]`.

`hidden` is what the output head is given, with its gradient; `batch` is the collator's, on the device that it came on.
"""

_CAPS = ("final_logit_softcapping", "output_logit_soft_cap", "logits_soft_cap", "softcap")
# The second of these divides in some models and multiplies in others; the check tells which.
_FACTORS = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier", "output_multiplier")

_KNOWN = "_kdcache_fused_head"
"""Where a model keeps what was found: its forward must not be replaced twice."""

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
    """Let a model's forward take `on_head`, a function that makes the loss of what its output head is given.

    `packed_forward(model, tokens, position_ids, on_head=f)` then returns the loss that f returns. To be called before
    the model is wrapped; the model stays what it is otherwise, and saves as it did.

    Args:
        model: a transformers causal language model.
        device: where its inputs go.

    Raises:
        ModelError: the model's logits are not those of a linear head, scaled and capped.
    """
    known: FusedHead | None = vars(model).get(_KNOWN)
    if known is not None:
        return known
    head, name = model.get_output_embeddings(), type(model).__name__
    if type(head) is not nn.Linear:
        raise ModelError(f"the student {name} has no linear output head, which its loss needs ({type(head).__name__})")
    tokens = torch.arange(_CHECKED_TOKENS, device=device)[None] % head.weight.shape[0]
    places = torch.arange(_CHECKED_TOKENS, device=device)[None]
    training = model.training
    model.eval()
    try:
        found = _matching(model, head, tokens, places)
        _patch(model, head)
        with torch.no_grad():
            packed_forward(model, tokens, places, on_head=lambda hidden, *_: hidden.new_zeros(()))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"the student {name} cannot make its loss at its output head: {one_line(error)}") from error
    finally:
        model.train(training)
    setattr(model, _KNOWN, found)
    return found


def _patch(model: Any, head: nn.Linear) -> None:
    own_forward, own_head = model.forward, head.forward
    waiting: list[OnHead] = []

    def forward(_self: Any, *args: Any, on_head: OnHead | None = None, **kwargs: Any) -> Any:
        if on_head is None:
            return own_forward(*args, **kwargs)
        made: list[Tensor] = []

        def make(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            # In the place of logits [R, L, V], so that the model's code continues with it. It is this very tensor that
            # FSDP hooks to know when the backward of the head begins, which an in-place change of a view would undo.
            made.append(on_head(hidden, weight, bias).reshape(1, 1, 1).clone())
            return made[-1]

        waiting.append(make)
        try:
            own_forward(*args, **kwargs)
        finally:
            waiting.clear()
        (loss,) = made
        return loss.sum()  # of one number; no view, as above

    def head_forward(self: nn.Linear, hidden: Tensor) -> Tensor:
        return waiting[-1](hidden, self.weight, self.bias) if waiting else own_head(hidden)

    model.forward = types.MethodType(forward, model)
    head.forward = types.MethodType(head_forward, head)  # type: ignore[method-assign]


@torch.no_grad()
def _matching(model: Any, head: nn.Linear, tokens: Tensor, places: Tensor) -> FusedHead:
    """What the model does after its head.

    Raises:
        ModelError: that is not known.
    """
    given, logits = _own_logits(model, head, tokens, places, 1.0)
    size = head(given).abs().max().clamp(min=1e-6).item()
    cases = [(given, logits), _own_logits(model, head, tokens, places, _WIDE / size)]
    least = float("inf")
    for guess in _guesses(model.config.get_text_config()):
        off = 0.0
        for given, logits in cases:
            mine = guess.source(given.flatten(0, -2), head.weight, head.bias).all_logits()
            own = logits.flatten(0, -2).float()
            off = max(off, ((mine - own).abs().max() / own.abs().max().clamp(min=1e-6)).item())
        if off <= max(1e-4, 4 * torch.finfo(logits.dtype).eps):
            return guess
        least = min(least, off)
    raise ModelError(
        f"the student {type(model).__name__} does something to its logits that is not known here; known are a factor "
        f"({', '.join(_FACTORS)}) and a soft cap ({', '.join(_CAPS)}), and {least:.2g} of the logits is left over"
    )


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


def with_logits(
    model: Any,
    head: FusedHead | None,
    batch: dict[str, Any],
    device: torch.device,
    vocab_size: int,
    use: Callable[[LogitSource], T],
) -> T:
    """Run a model over a batch and hand the logits of its M labelled slots, by tiles, to a function.

    The function is called inside the model's forward, where weights that are sharded are gathered.

    Args:
        model: a causal language model, sharded by FSDP2 or not.
        head: what `fuse_head` gave for it; without one its logits `[R, L, V]` are made whole.
        batch: of `Collator`.
        device: where the model is.
        vocab_size: of the cache; later rows of the head are padding.
        use: given the source of the logits.

    Returns:
        What the function returns.
    """
    mask = labelled(batch).to(device)
    tokens, positions = batch["input_ids"].to(device), batch["position_ids"].to(device)
    if head is None:
        return use(StoredLogits(packed_forward(model, tokens, positions).logits[mask][:, :vocab_size]))
    made: list[T] = []

    def on_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made.append(use(head.source(hidden[mask], weight, bias, vocab_size)))
        return hidden.new_zeros(())

    packed_forward(model, tokens, positions, on_head=on_head)
    return made[0]


def count_items(batch: dict[str, Any]) -> Tensor:
    """`[2]` how many positions of a batch have a label, and how many a target."""
    return torch.stack([labelled(batch).sum(), batch["targets"].has_target.sum().to(batch["labels"].device)])


def compute_loss(
    model: nn.Module,
    head: FusedHead,
    batch: dict[str, Any],
    objective: Objective,
    *,
    vocab_size: int,
    num_items: Tensor | None = None,
    weights: PositionWeights | None = None,
    figures: Figures | None = None,
    auxiliary: Auxiliary | None = None,
) -> Tensor:
    """Distillation and label loss of one batch: a sum over its positions, divided once.

    Args:
        model: the student, or DDP or FSDP around it.
        head: what `fuse_head` gave for that student.
        batch: of `Collator`, on any device.
        objective: divergence, tail, temperature, soft weight.
        vocab_size: of the cache; rows of the head beyond it are padding.
        num_items: `[2]` the divisors of the label and of the distillation term, for accumulation and ranks:
            `count_items` of the whole optimiser step, divided by the number of ranks, since DDP and FSDP average over
            them. By default, those of this batch.
        weights: how much the distillation term of each position counts; all the same by default.
        figures: filled with the student's figures at each position.
        auxiliary: gives a further term, added to the loss as it is; it divides by its own count of what it sums.

    Returns:
        A scalar, nats.

    Raises:
        TargetError: the targets cannot give that objective exactly, or a labelled token has no `writer_logp`.
    """
    device = next(model.parameters()).device
    mask = labelled(batch).to(device, non_blocking=True)
    tokens, positions, labels = (
        batch[name].to(device, non_blocking=True) for name in ("input_ids", "position_ids", "labels")
    )
    targets = batch["targets"].to(device, non_blocking=True)

    writer_logp = None
    if objective.takes_rollouts:
        writer_logp = extra_of_labels(batch, WRITER_LOGP).to(device, non_blocking=True)
    items, with_target = (None, None) if num_items is None else num_items.to(device).clamp(min=1e-9)  # of none, none

    def on_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        loss = distil(
            head.source(hidden[mask], weight, bias, vocab_size), targets, labels[mask], objective,
            num_items=items, num_targets=with_target, figures=figures,
            position_weights=weights, writer_logp=writer_logp,
        )  # fmt: skip
        return loss if auxiliary is None else loss + auxiliary(hidden, batch)

    loss: Tensor = packed_forward(model, tokens, positions, on_head=on_head)
    return loss
