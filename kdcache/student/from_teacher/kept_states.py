"""Runs of a model without one more of its layers, over the same batches again and again, each begun at that layer.

What lies before a layer that is left out does not depend on it, so it is computed once: a first run keeps the hidden
states that each layer is given. A layer that is gone already is not run either.
Guarantee: the logits are those of `blocks.left_out`. A batch that the first run has not seen is run in full.
Cost: the hidden states of all batches for each layer, on the model's device.

Shapes: R rows, L slots, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.pretrained.blocks import Blocks, given_states, left_out


class KeptStates:
    """The hidden states inside a model that runs without some layers.

    Args:
        blocks: the layers of the model.
        gone: those that are left out.
    """

    def __init__(self, blocks: Blocks, gone: frozenset[int]) -> None:
        self.gone = gone
        self._layers = list(blocks.layers)
        self._blocks = blocks
        self._given: list[list[Tensor]] = []  # of each batch, for each layer: [R, L, D]
        self._beside: list[list[tuple[Any, ...] | None]] = []  # what a layer gives beside them; None if it is no tuple

    @property
    def batches(self) -> int:
        """How many were kept."""
        return len(self._given)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Run the model without the layers that are gone, and keep what each layer is given."""

        def keep(_layer: nn.Module, args: tuple[Any, ...], more: dict[str, Any], output: Any) -> None:
            if _layer is self._layers[0]:
                self._given.append([])
                self._beside.append([])
            self._given[-1].append(given_states(args, more))
            self._beside[-1].append(output[1:] if isinstance(output, tuple) else None)

        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.register_forward_hook(keep, with_kwargs=True).remove)
            stack.enter_context(left_out(self._blocks, self.gone))
            yield

    @contextmanager
    def without(self, layer: int) -> Iterator[None]:
        """Run the model without one more layer, over batches in the order in which they were kept."""
        run = _Run(self, layer)
        passed = sorted({*range(layer + 1), *self.gone})
        with ExitStack() as stack:
            for number in passed:
                stack.enter_context(_replaced(self._layers[number], run.forward_of(number)))
            yield


class _Run:
    def __init__(self, states: KeptStates, layer: int) -> None:
        self._states, self._layer, self._next = states, layer, 0
        self._batch: int | None = None

    def forward_of(self, number: int) -> Callable[..., Any]:
        """What runs in the place of a layer."""
        states, own = self._states, self._states._layers[number].forward

        def forward(*args: Any, **more: Any) -> Any:
            given = given_states(args, more)
            if number == 0:
                self._find(given)
            if self._batch is None:  # not one of the batches
                output = own(*args, **more)
                if number != self._layer and number not in states.gone:
                    return output
                return (given, *output[1:]) if isinstance(output, tuple) else given
            value = states._given[self._batch][number] if number == self._layer else given
            beside = states._beside[self._batch][number]
            return value if beside is None else (value, *beside)

        return forward

    def _find(self, given: Tensor) -> None:
        """Which of the batches this is, from what the first layer is given."""
        kept, self._batch = self._states._given, None
        for number in range(self._next, len(kept)):
            if torch.equal(kept[number][0], given):
                self._batch, self._next = number, number + 1
                return


@contextmanager
def _replaced(layer: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    own = vars(layer).get("forward")
    layer.forward = forward
    try:
        yield
    finally:
        if own is None:
            del layer.forward
        else:
            layer.forward = own
