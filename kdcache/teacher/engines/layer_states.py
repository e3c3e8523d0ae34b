"""Hidden states between the layers of a model, caught while it runs.

`hidden:N` is the state after N layers: 0 is what the first layer is given, and the number of layers is what the last
one gives, before any norm. `hidden:-1` is what the output head is given, which is after it. Up to the last layer these
are the `hidden_states[N]` of transformers.
Cost: the states themselves; the model runs once, as it would.

Shapes: R rows, L slots, W width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from kdcache.pretrained.blocks import find_blocks, given_states


class LayerStates:
    """The places of a model where states can be caught.

    Args:
        model: a transformers causal language model.

    Raises:
        ModelError: it is not known which of its parts are its layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = find_blocks(model).layers

    @contextmanager
    def caught(self, after: Collection[int]) -> Iterator[dict[int, Tensor]]:
        """`[R, L, W]` by number, of each forward pass that is run meanwhile; the last one stays.

        Args:
            after: how many layers each state has behind it.
        """
        found: dict[int, Tensor] = {}

        def given(_layer: nn.Module, args: tuple[Any, ...], more: dict[str, Any]) -> None:
            found[0] = given_states(args, more)

        with ExitStack() as stack:
            for number in after:
                if number == 0:
                    handle = self._layers[0].register_forward_pre_hook(given, with_kwargs=True)
                else:
                    handle = self._layers[number - 1].register_forward_hook(_keep(found, number))
                stack.callback(handle.remove)
            yield found


def _keep(found: dict[int, Tensor], number: int) -> Any:
    def keep(_layer: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        found[number] = output[0] if isinstance(output, tuple) else output

    return keep
