"""What matters in a model: layers by what the KL loses without each, heads, neurons, channels and experts by activity.

Layers: in each round, half of those that are still to go are left out, the ones without which KL(teacher ‖ model) on a
cache is least, one at a time, given those that are gone already. So the last ones, which matter most, are judged one by
one. (With every layer judged alone, neighbours that do the same would all look useless.)

Width: Muralidharan et al. 2024 (Minitron, arXiv 2407.14679), section 2.2, from forward passes alone. For activations
a[r, t] of slot t of row r, aggregated over the S_r slots of a row by the mean and over rows by the L2 norm,

    score = sqrt(sum_r (1/S_r sum_t |a[r, t]|)^2)

    a neuron     a is what it gives to the projection that ends its MLP
    a head       |a| is the norm of what it gives to the output projection; of a group, the sum over its heads
    a channel    a is what a normalisation gives; the scores of all normalisations are added
    an expert    a is the probability that the router gives it

The neurons of fused experts are not seen from outside. Theirs is the product of the norms of their weights.

Shapes: R rows, L slots, I neurons, H heads, E experts, D channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from kdcache import stopping
from kdcache.isolation import packed_forward
from kdcache.pretrained.blocks import find_blocks
from kdcache.student.from_teacher.axes import (
    EXPERTS,
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    KEY_VALUES,
    Axes,
    Axis,
    find_axes,
    input_axis,
)
from kdcache.student.from_teacher.cut import Kept
from kdcache.student.from_teacher.sizes import Sizes

Progress = Callable[[int, int], None]
"""Called with (measurements done, measurements to do)."""

Round = dict[int, float]
"""The KL without each layer that could be left out, beside those that were left out before."""


def least_needed(
    layers: int, keep: int, kl: Callable[[frozenset[int], int], float], on_progress: Progress | None = None
) -> tuple[frozenset[int], list[Round]]:
    """The layers that a model can best do without; of L layers it takes about L log2(L - keep) measurements.

    Args:
        layers: how many it has.
        keep: how many are to be kept.
        kl: the mean KL of the model without some layers that are gone, and without one more, nats.
        on_progress: see `Progress`.

    Returns:
        Those to leave out, and what was measured in each round; ties leave out the later layer, and one without which
        the model has no finite KL stays as long as there are others.
    """
    out: frozenset[int] = frozenset()
    rounds: list[Round] = []
    done = 0
    while left := layers - keep - len(out):
        found: Round = {}
        total = done + _measurements(layers - len(out), left)
        for layer in range(layers):
            if layer in out:
                continue
            stopping.check()
            found[layer] = kl(out, layer)
            done += 1
            if on_progress:
                on_progress(done, total)
        usable = sum(map(math.isfinite, found.values())) or 1
        out |= frozenset(sorted(found, key=lambda layer: (found[layer], -layer))[: min(_half(left), usable)])
        rounds.append(found)
    return out, rounds


def _half(left: int) -> int:
    """How many leave in a round: 8, 4, 2, 1 of 15."""
    return (left + 1) // 2


def _measurements(there: int, left: int) -> int:
    """How many it takes until so many of those that are there have left."""
    return there + _measurements(there - _half(left), left - _half(left)) if left else 0


class Scores:
    """Scores of one kind of thing: means over the slots of each row, then the L2 norm over rows."""

    def __init__(self) -> None:
        self._squares: Tensor | None = None

    def add(self, activity: Tensor, slots: Tensor) -> None:
        """Take in rows.

        Args:
            activity: `[R, L, n]`, at least 0.
            slots: `[R, L]` bool: those that hold a token.
        """
        used = slots.to(activity.device, torch.float64)
        means = (activity.double() * used[..., None]).sum(1) / used.sum(1).clamp_min(1)[:, None]  # [R, n]
        squares = means.square().sum(0)
        self._squares = squares if self._squares is None else self._squares + squares

    @property
    def values(self) -> Tensor:
        """`[n]` float64."""
        assert self._squares is not None, "a part of the model was not run"
        return self._squares.sqrt().cpu()


class Activity:
    """The scores of a model, over any number of batches."""

    def __init__(self, model: Any) -> None:
        self._model, self._sizes = model, Sizes.of(model.config, type(model).__name__)
        self._axes = find_axes(type(model), model.config, self._sizes)
        self._blocks = find_blocks(model)
        self._found: dict[tuple[str, str], Scores] = {}  # by role and the name of the module
        self._slots = torch.zeros(0)

    @torch.inference_mode()
    def add(self, batch: dict[str, Any]) -> None:
        """Run a batch: `input_ids` and `position_ids` `[R, L]`, and `slots` `[R, L]` bool, those that hold a token."""
        self._slots = batch["slots"]
        device = self._model.device
        with ExitStack() as stack:
            for name, part in self._model.named_modules():
                for role, listen in self._listeners(part, self._axes.get(f"{name}.weight", ())):
                    hook = _hook(listen, self._found.setdefault((role, name), Scores()), lambda: self._slots)
                    stack.callback(part.register_forward_hook(hook).remove)
            packed_forward(self._model, batch["input_ids"].to(device), batch["position_ids"].to(device))

    def _listeners(
        self, part: nn.Module, axes: tuple[Axis | None, ...]
    ) -> Iterable[tuple[str, Callable[[Tensor, Any], Tensor]]]:
        axis = input_axis(part, axes) if len(axes) == 2 else None
        if axis is not None and axis.roles == (HEADS,):
            yield HEADS, lambda given, _: given.reshape(*given.shape[:-1], self._sizes.heads, -1).norm(dim=-1)
        elif axis is not None and axis.roles == (INTERMEDIATE,):
            yield INTERMEDIATE, lambda given, _: given.abs()
        elif len(axes) == 1 and axes[0] is not None and axes[0].roles == (HIDDEN,):
            yield HIDDEN, lambda _, output: output.abs()
        elif len(axes) == 2 and axes[0] is not None and axes[0].roles == (EXPERTS,):
            yield EXPERTS, lambda _, output: _logits_of(output, self._sizes.experts).float().softmax(-1)

    def kept(self, sizes: Sizes) -> Kept:
        """The things with the largest scores, in the order that they have in the model."""
        channels = [scores.values for (role, _), scores in self._found.items() if role == HIDDEN]
        hidden = _largest(torch.stack(channels).sum(0), sizes.hidden)
        return Kept(hidden, tuple(self._kept_in(number, sizes) for number in range(self._sizes.layers)))

    def _kept_in(self, layer: int, sizes: Sizes) -> dict[str, Tensor]:
        prefix = f"{self._blocks.name}.{layer}."
        scores = {role: found.values for (role, name), found in self._found.items() if name.startswith(prefix)}
        things = _kept_heads(scores[HEADS], self._sizes, sizes) if HEADS in scores else {}
        if INTERMEDIATE in scores:
            things[INTERMEDIATE] = _largest(scores[INTERMEDIATE], sizes.intermediate)
        if EXPERTS in scores and sizes.experts is not None:
            things[EXPERTS] = _largest(scores[EXPERTS], sizes.experts)
            by_weight = _neurons_of_experts(self._blocks.layers[layer], prefix, self._axes)
            if by_weight is not None and INTERMEDIATE not in scores:
                things[INTERMEDIATE] = torch.stack([_largest(each, sizes.intermediate) for each in by_weight])
        return things


def _hook(listen: Callable[[Tensor, Any], Tensor], scores: Scores, slots: Callable[[], Tensor]) -> Any:
    def heard(_part: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        found = listen(given[0], output)
        scores.add(found.reshape(*slots().shape, found.shape[-1]), slots())

    return heard


def _logits_of(output: Any, experts: int | None) -> Tensor:
    """What a router gives of all experts, `[..., E]`; it may give the chosen ones beside."""
    parts = output if isinstance(output, tuple) else (output,)
    found: Tensor = next(part for part in parts if part.is_floating_point() and part.shape[-1] == experts)
    return found


def _kept_heads(scores: Tensor, old: Sizes, new: Sizes) -> dict[str, Tensor]:
    """Whole groups; or, where all heads share one key, heads of that group."""
    if new.heads // new.key_value_heads == old.group:
        groups = _largest(scores.view(old.key_value_heads, old.group).sum(-1), new.key_value_heads)
        return {KEY_VALUES: groups, HEADS: (groups[:, None] * old.group + torch.arange(old.group)).flatten()}
    return {KEY_VALUES: torch.arange(1), HEADS: _largest(scores, new.heads)}


def _neurons_of_experts(layer: nn.Module, prefix: str, axes: Axes) -> Tensor | None:
    """`[E, I]` the product, over the weights of fused experts, of the norm of what each has of a neuron."""
    product: Tensor | None = None
    for name, value in layer.named_parameters():
        of_value = axes[prefix + name]
        if value.dim() < 3 or of_value[0] is None or of_value[0].roles != (EXPERTS,):
            continue
        for dimension, axis in enumerate(of_value):
            if axis is not None and set(axis.roles) == {INTERMEDIATE}:
                other = [d for d in range(1, value.dim()) if d != dimension]
                norms = value.detach().double().norm(dim=other).cpu()  # [E, I], or [E, 2 I] of fused gate and up
                norms = norms.reshape(len(norms), len(axis.roles), -1).prod(1)
                product = norms if product is None else product * norms
    return product


def _largest(scores: Tensor, count: int) -> Tensor:
    """`[count]` int64: where the largest are, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values
