"""What each dimension of each weight stands for: channels, heads, neurons or experts.

Outside of attention this is seen from the model's own class: it is built again, without memory for its weights, with
one size doubled, and the dimensions that double are those of that size. Inside of attention the projections are known
by name, because two sizes cannot tell how heads lie in a fused projection. What is not understood in this way is
found by `cut.require_narrowable`, which permutes everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kdcache.errors import ModelError, one_line
from kdcache.student.from_teacher.sizes import Sizes, with_sizes

HIDDEN, HEADS, KEY_VALUES, INTERMEDIATE, EXPERTS = "hidden", "heads", "key_value_heads", "intermediate", "experts"

_FUSED = (HEADS, KEY_VALUES, KEY_VALUES)
_INPUTS = {
    "q_proj": (HEADS,), "k_proj": (KEY_VALUES,), "v_proj": (KEY_VALUES,), "c_attn": _FUSED, "qkv_proj": _FUSED,
    "query_key_value": (HEADS,),
}  # fmt: skip
"""Projections of hidden states, and what lies one behind the other in what they give."""
_INTERLEAVED = ("query_key_value",)
"""Of these each head has query, key and value side by side."""
_OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj")
"""Projections from the heads to hidden states."""


@dataclass(frozen=True)
class Axis:
    """A dimension of a weight: for each of `roles`, one behind the other, `unit` numbers for each of its things."""

    roles: tuple[str, ...]
    unit: int = 1

    def index(self, kept: Mapping[str, Tensor], counts: Mapping[str, int]) -> Tensor:
        """`[n]` int64: the places along the dimension that are kept.

        Args:
            kept: `[m]` numbers of the things that are kept, by role.
            counts: how many things there are, by role.
        """
        places, start = [], 0
        for role in self.roles:
            places.append(start + (kept[role][:, None] * self.unit + torch.arange(self.unit)).flatten())
            start += counts[role] * self.unit
        return torch.cat(places)


Axes = dict[str, tuple[Axis | None, ...]]
"""The axes of each weight by its name; None for a dimension that nothing is left out of."""


def find_axes(kind: Any, config: Any, sizes: Sizes) -> Axes:
    """The axes of all weights of a model.

    Args:
        kind: its class.
        config: its configuration.
        sizes: of that configuration.

    Raises:
        ModelError: a weight grows with one of the sizes in a way that is not understood.
    """
    base = _built(kind, with_sizes(config, sizes))
    found: dict[str, list[Axis | None]] = {name: [None] * value.dim() for name, value in base.state_dict().items()}
    attention = _attention_axes(base, sizes)
    for role, doubled in _doubled(sizes).items():
        grown = _built(kind, with_sizes(config, doubled)).state_dict()
        for name, value in base.state_dict().items():
            if name in attention:
                continue
            other = grown.get(name)
            if other is None or other.dim() != value.dim():
                raise ModelError(f"{kind.__name__} has a weight {name} that depends on {role} in an unknown way")
            for number, (size, larger) in enumerate(zip(value.shape, other.shape, strict=True)):
                if size == larger:
                    continue
                times, rest = divmod(size, getattr(sizes, role))
                if larger != 2 * size or rest or found[name][number] is not None:
                    raise ModelError(f"{kind.__name__} has a weight {name} that depends on {role} in an unknown way")
                found[name][number] = Axis((role,) * times)
    return {**{name: tuple(axes) for name, axes in found.items()}, **attention}


def _doubled(sizes: Sizes) -> dict[str, Sizes]:
    hidden = replace(sizes, hidden=2 * sizes.hidden)
    if not sizes.own_head_dim:
        hidden = replace(hidden, heads=2 * sizes.heads, key_value_heads=2 * sizes.key_value_heads)
    found = {HIDDEN: hidden, INTERMEDIATE: replace(sizes, intermediate=2 * sizes.intermediate)}
    if sizes.experts is not None:
        found[EXPERTS] = replace(sizes, experts=2 * sizes.experts)
    return found


def _built(kind: Any, config: Any) -> Any:
    """A model without memory for its weights."""
    try:
        with torch.device("meta"):
            return kind(config)
    except Exception as error:
        raise ModelError(f"{kind.__name__} cannot be made in other sizes: {one_line(error)}") from error


def _attention_axes(model: Any, sizes: Sizes) -> Axes:
    found: Axes = {}
    for path, part in model.named_modules():
        children = dict(part.named_children())
        if not children.keys() & _INPUTS.keys():
            continue
        for name, child in children.items():
            if name in _INPUTS:
                unit = sizes.head_dim * (3 if name in _INTERLEAVED else 1)
                given, made = Axis((HIDDEN,)), Axis(_INPUTS[name], unit)
            elif name in _OUTPUTS:
                given, made = Axis((HEADS,), sizes.head_dim), Axis((HIDDEN,))
            else:
                continue
            weight = (given, made) if isinstance(child, Conv1D) else (made, given)
            of_child = {"weight": weight, "bias": (made,)}
            for parameter, value in child.named_parameters():
                axes = of_child.get(parameter)
                if axes is None or tuple(value.shape) != tuple(_length(axis, sizes) for axis in axes):
                    raise ModelError(
                        f"{type(model).__name__} has a weight {path}.{name}.{parameter} of shape "
                        f"{list(value.shape)}, which is not that of {sizes.heads} heads of {sizes.head_dim}"
                    )
                found[f"{path}.{name}.{parameter}"] = axes
    return found


def _length(axis: Axis, sizes: Sizes) -> int:
    return sum(int(getattr(sizes, role)) * axis.unit for role in axis.roles)


def input_axis(module: nn.Module, axes: tuple[Axis | None, ...]) -> Axis | None:
    """What the last dimension of a linear layer's input stands for; None for a module of another kind.

    Args:
        module: of a model.
        axes: of its weight.
    """
    if isinstance(module, nn.Linear):
        return axes[1]
    return axes[0] if isinstance(module, Conv1D) else None
