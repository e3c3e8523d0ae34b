"""A smaller model from the weights of a larger one: whole layers, then parts of each layer. And the proofs.

Guarantee: every number of the smaller model is a number of the larger one. `with_fewer_layers` compares the logits with
those of the larger model without the other layers. `require_narrowable` makes a random model of the same class and
permutes its channels, heads, neurons and experts by the same code that leaves some of them out; its logits must not
change, or the class is refused.
Cost: both models are in memory, and a third of up to a few layers and 64 ids.

Shapes: I neurons, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdcache.errors import ModelError, one_line
from kdcache.isolation import finite_tokens, packed_forward, rounding
from kdcache.pretrained import keep_attention_cap
from kdcache.pretrained.blocks import Blocks, find_blocks, left_out
from kdcache.student.from_teacher.axes import EXPERTS, HEADS, HIDDEN, INTERMEDIATE, KEY_VALUES, Axis, find_axes
from kdcache.student.from_teacher.sizes import Sizes, with_layers, with_sizes

_ROOM = 256
"""Spacings of the largest logit by which two ways to the same logits may differ."""
_PROOF_IDS = 64
_PROOF_TOKENS = 48
_PROOF_SLACK = 1e-3
"""Part of the largest logit by which a permutation may change any: float32 sums in another order, some layers deep."""


@dataclass(frozen=True)
class Kept:
    """What is kept of a model, as numbers counted from 0.

    Attributes:
        hidden: `[n]` channels, the same in all layers.
        layers: for each layer `[n]` things by role; `[E, n]` for the neurons of fused experts, for each expert its own.
    """

    hidden: Tensor
    layers: tuple[dict[str, Tensor], ...]


def with_fewer_layers(model: Any, kept: Sequence[int], vocab_size: int) -> Any:
    """A model of some layers of another; all other weights are the same.

    Args:
        model: a transformers causal language model, in evaluation mode.
        kept: numbers of its layers, ascending.
        vocab_size: ids that it may be given lie below it.

    Raises:
        ModelError: the class of the model does more with its layers than run one after the other.
    """
    blocks = find_blocks(model)
    places = {old: new for new, old in enumerate(kept)}
    state = {}
    for name, value in model.state_dict().items():
        number, rest = _in_block(name, blocks)
        if number is None:
            state[name] = value
        elif number in places:
            state[f"{blocks.name}.{places[number]}.{rest}"] = value
    made = _built(type(model), with_layers(model.config, kept), state).to(model.device)
    others = [number for number in range(len(blocks.layers)) if number not in places]
    tokens = finite_tokens(model, vocab_size, model.device)[None]
    with left_out(blocks, others):
        wanted = _logits(model, tokens)
    moved, allowed = (_logits(made, tokens) - wanted).abs().max().item(), _ROOM * rounding(model) * _largest(wanted)
    if not moved <= allowed:
        raise ModelError(
            f"{type(model).__name__} cannot be made with other layers: its logits differ by {moved:.2g} from those of "
            f"the teacher without the layers that are left out (rounding allows {allowed:.2g})"
        )
    return made


def narrowed(model: Any, sizes: Sizes, kept: Kept) -> Any:
    """A model of parts of another.

    Args:
        model: a transformers causal language model.
        sizes: that the new one has.
        kept: of the model.

    Raises:
        ModelError: the class cannot be made in these sizes.
    """
    old = Sizes.of(model.config, type(model).__name__)
    axes = find_axes(type(model), model.config, old)
    blocks = find_blocks(model)
    counts = {role: getattr(old, role) for role in (HIDDEN, HEADS, KEY_VALUES, INTERMEDIATE, EXPERTS)}
    state = {}
    for name, value in model.state_dict().items():
        number, _ = _in_block(name, blocks)
        things = {HIDDEN: kept.hidden, **({} if number is None else kept.layers[number])}
        state[name] = _selected(value, axes[name], things, counts)
    return _built(type(model), with_sizes(model.config, sizes), state).to(model.device)


def require_narrowable(model: Any) -> None:
    """Refuse a class whose weights are not what `axes` takes them for: a permutation must change no logits.

    Raises:
        ModelError: it does.
    """
    kind, layers = type(model), _telling_layers(model.config)
    config = with_layers(model.config, layers)
    text = config.get_text_config()
    text.vocab_size, text.pad_token_id = _PROOF_IDS, None
    sizes = Sizes.of(config, kind.__name__)
    random = torch.Generator().manual_seed(0)
    try:
        made = kind(config).float().eval()
    except Exception as error:
        raise ModelError(f"{kind.__name__} cannot be made in other sizes: {one_line(error)}") from error
    keep_attention_cap(made)
    with torch.no_grad():
        for value in made.parameters():
            value.copy_(torch.randn(value.shape, generator=random) / (value.shape[-1] ** 0.5 if value.dim() > 1 else 2))
    shuffled = narrowed(made, sizes, _permutation(sizes, random))
    tokens = torch.randint(_PROOF_IDS, (1, _PROOF_TOKENS), generator=random)
    wanted = _logits(made, tokens)
    moved = (_logits(shuffled, tokens) - wanted).abs().max().item()
    if not moved <= _PROOF_SLACK * _largest(wanted):
        raise ModelError(
            f"the width of {kind.__name__} cannot be cut: permuting its channels, heads, neurons and experts, which "
            f"should change nothing, moves its logits by {moved:.2g}; leave out only layers of it"
        )


def _telling_layers(config: Any) -> list[int]:
    """The first two layers, and the first of each type."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None) or []
    return sorted({*range(min(2, text.num_hidden_layers)), *(types.index(each) for each in types)})


def _permutation(sizes: Sizes, random: torch.Generator) -> Kept:
    """Everything, in another order; groups of heads and the heads of a group are permuted, too."""

    def shuffled(count: int) -> Tensor:
        return torch.randperm(count, generator=random)

    layers = []
    for _ in range(sizes.layers):
        groups = shuffled(sizes.key_value_heads)
        inside = torch.stack([shuffled(sizes.group) for _ in range(sizes.key_value_heads)])
        things = {
            KEY_VALUES: groups,
            HEADS: (groups[:, None] * sizes.group + inside).flatten(),
            INTERMEDIATE: shuffled(sizes.intermediate),
        }
        if sizes.experts is not None:
            things[EXPERTS] = shuffled(sizes.experts)
            things[INTERMEDIATE] = torch.stack([shuffled(sizes.intermediate) for _ in range(sizes.experts)])
        layers.append(things)
    return Kept(shuffled(sizes.hidden), tuple(layers))


def _selected(
    value: Tensor, axes: Sequence[Axis | None], kept: Mapping[str, Tensor], counts: Mapping[str, int]
) -> Tensor:
    """The part of a weight that is kept."""
    by_expert = kept.get(INTERMEDIATE)
    first = axes[0] if axes else None
    if by_expert is not None and by_expert.dim() == 2 and any(a and INTERMEDIATE in a.roles for a in axes):
        if first is None or first.roles != (EXPERTS,):
            raise ModelError("this model has an MLP beside its experts, whose neurons are not told apart from theirs")
        return torch.stack(
            [
                _selected(value[number], axes[1:], {**kept, INTERMEDIATE: by_expert[number]}, counts)
                for number in kept[EXPERTS].tolist()
            ]
        )
    for dimension, axis in enumerate(axes):
        if axis is not None:
            value = value.index_select(dimension, axis.index(kept, counts).to(value.device))
    return value


def _in_block(name: str, blocks: Blocks) -> tuple[int | None, str]:
    """The number of the layer that a weight is in, and its name there."""
    if not name.startswith(f"{blocks.name}."):
        return None, name
    number, _, rest = name.removeprefix(f"{blocks.name}.").partition(".")
    return int(number), rest


def _built(kind: Any, config: Any, state: Mapping[str, Tensor]) -> Any:
    """A model of a configuration with these weights, which must be all of its weights."""
    try:
        made = kind(config).float().eval()
        made.load_state_dict(state, strict=True)
    except Exception as error:
        raise ModelError(f"{kind.__name__} cannot be made in these sizes: {one_line(error)}") from error
    keep_attention_cap(made)
    return made


@torch.inference_mode()
def _logits(model: Any, tokens: Tensor) -> Tensor:
    """`[1, n, V]` of one piece of tokens `[1, n]`."""
    places = torch.arange(tokens.shape[1])[None]
    logits: Tensor = packed_forward(model, tokens.to(model.device), places.to(model.device)).logits
    return logits.float().cpu()


def _largest(logits: Tensor) -> float:
    return logits.abs().max().item()
