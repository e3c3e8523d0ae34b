"""Where a model keeps its layers, and how it runs without some of them.

A layer is left out by handing on the hidden states that it was given: all of it is still computed, and thrown away. So
nothing in the model has to know, and what remains is exactly the model without that layer.
Cost: the forward pass of the whole model.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kdcache.errors import ModelError


@dataclass(frozen=True)
class Blocks:
    """The layers of a model.

    Attributes:
        name: of the list that holds them, as in the names of weights.
        layers: the layers.
    """

    name: str
    layers: nn.ModuleList


def find_blocks(model: Any) -> Blocks:
    """The list of a model's layers: as long as its configuration says, all of one class, and the only such list.

    Raises:
        ModelError: there is none, or several.
    """
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found: dict[str, nn.ModuleList] = {}
    for name, part in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)  # such as the experts of a layer
        if isinstance(part, nn.ModuleList) and len(part) == count and not inside and len(set(map(type, part))) == 1:
            found[name] = part
    if len(found) != 1:
        what = f"{len(found)} lists of {count} layers" if found else f"no list of {count} layers of one class"
        raise ModelError(f"{type(model).__name__} has {what}, so it is not known which of its parts are its layers")
    return Blocks(*next(iter(found.items())))


@contextmanager
def left_out(blocks: Blocks, numbers: Collection[int]) -> Iterator[None]:
    """Run a model without some of its layers."""
    with ExitStack() as stack:
        for number in numbers:
            handle = blocks.layers[number].register_forward_hook(_hand_on, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _hand_on(_layer: nn.Module, args: tuple[Any, ...], more: dict[str, Any], output: Any) -> Any:
    given = given_states(args, more)
    return (given, *output[1:]) if isinstance(output, tuple) else given


def given_states(args: tuple[Any, ...], more: dict[str, Any]) -> Tensor:
    """The hidden states among what a layer is called with."""
    given: Tensor = args[0] if args else more["hidden_states"]
    return given
