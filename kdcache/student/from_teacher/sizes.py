"""The sizes of a model, read from its configuration and written into one.

The width of a head never changes: rotary positions and the scale of attention depend on it. Where a configuration has
no width of a head of its own, hidden size = heads x width, so cutting one of them cuts the other.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kdcache.errors import ConfigError, ModelError
from kdcache.student.from_teacher.config import CUTS, CutOptions

_INTERMEDIATE = ("moe_intermediate_size", "intermediate_size", "n_inner", "ffn_dim")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_CHOSEN_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
_COUNTS = ("max_window_layers", "first_k_dense_replace")
"""So many of the first layers are of one kind."""
_NUMBERS = ("mlp_only_layers", "moe_layers")
"""Lists of the numbers of layers."""
_NOT_BY_LAYER = ("architectures", "token_id", "token_ids")
"""Lists that may happen to be as long as a model has layers."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a model.

    Attributes:
        layers: how many.
        hidden: channels of the hidden states.
        heads: of attention, in each layer.
        key_value_heads: heads that a key and a value belong to; each serves heads / key_value_heads heads.
        head_dim: width of a head.
        own_head_dim: whether the configuration says that width, so that it does not follow from hidden and heads.
        intermediate: neurons of an MLP, or of an expert.
        experts: in each layer; None for a model without.
        chosen_experts: experts that each token is given to.
    """

    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_dim: int
    own_head_dim: bool
    intermediate: int
    experts: int | None
    chosen_experts: int | None

    @staticmethod
    def of(config: Any, name: str) -> Sizes:
        """Those of a model's configuration.

        Raises:
            ModelError: a size is missing; `name` is that of the model's class.
        """
        text = config.get_text_config()
        try:
            hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
            layers = int(text.num_hidden_layers)
        except (AttributeError, TypeError):
            raise ModelError(
                f"the configuration of {name} lacks hidden_size, num_attention_heads or num_hidden_layers"
            ) from None
        return Sizes(
            layers=layers,
            hidden=hidden,
            heads=heads,
            key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or hidden // heads,
            own_head_dim="head_dim" in vars(text),  # in Falcon it is a property
            intermediate=_value(text, _INTERMEDIATE) or 4 * hidden,
            experts=_value(text, _EXPERTS),
            chosen_experts=_value(text, _CHOSEN_EXPERTS),
        )

    @property
    def group(self) -> int:
        """Heads that share a key and a value."""
        return self.heads // self.key_value_heads

    def cut(self, options: CutOptions) -> Sizes:
        """The sizes that options ask for.

        Raises:
            ConfigError: sizes above the teacher's, or such as do not go together.
        """
        for name in CUTS[1:]:
            wanted, there = getattr(options, name), getattr(self, name)
            if wanted is not None and there is None:
                raise ConfigError(f"{name} is {wanted}, but the teacher has none")
            if wanted is not None and wanted > there:
                raise ConfigError(f"{name} is {wanted}, above the teacher's {there}")
        hidden, heads = self._hidden_and_heads(options)
        if hidden % heads and options.hidden is None:
            raise ConfigError(f"heads is {heads}, which does not divide the hidden size, {hidden}")
        if hidden % heads:
            raise ConfigError(f"hidden is {hidden}, which {heads} heads do not divide")
        experts = options.experts or self.experts
        if experts is not None and experts < (self.chosen_experts or 1):
            raise ConfigError(f"experts is {experts}, but each token is given to {self.chosen_experts} of them")
        return replace(
            self,
            hidden=hidden,
            heads=heads,
            key_value_heads=self._key_value_heads(heads),
            intermediate=options.intermediate or self.intermediate,
            experts=experts,
        )

    def _hidden_and_heads(self, options: CutOptions) -> tuple[int, int]:
        hidden, heads, width = options.hidden or self.hidden, options.heads or self.heads, self.head_dim
        if self.own_head_dim:
            return hidden, heads
        if options.hidden is None:
            return heads * width, heads
        if options.heads is None and hidden % width == 0:
            return hidden, hidden // width
        if hidden != heads * width:
            raise ConfigError(
                f"hidden is {hidden}, but in this teacher it is the number of heads times {width}, the width of a head"
            )
        return hidden, heads

    def _key_value_heads(self, heads: int) -> int:
        if heads % self.group == 0:
            return heads // self.group
        if self.key_value_heads == 1:
            return 1
        raise ConfigError(
            f"heads is {heads}, but {self.group} heads of the teacher share a key, and stay together: take a multiple"
        )


def _value(text: Any, names: Sequence[str]) -> int | None:
    return next((value for name in names if isinstance(value := getattr(text, name, None), int)), None)


def with_layers(config: Any, kept: Sequence[int]) -> Any:
    """The configuration of a model with some layers of another; lists of a value for each layer are cut alike."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    total = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if name in _NUMBERS and isinstance(value, list):
            setattr(text, name, [new for new, old in enumerate(kept) if old in value])
        elif name in _COUNTS and isinstance(value, int):
            setattr(text, name, sum(old < value for old in kept))
        elif isinstance(value, list | tuple) and len(value) == total and not name.endswith(_NOT_BY_LAYER):
            setattr(text, name, type(value)(value[old] for old in kept))
    text.num_hidden_layers = len(kept)
    return made


def with_sizes(config: Any, sizes: Sizes) -> Any:
    """The configuration of a model of other sizes than another; its number of layers stays."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    text.hidden_size, text.num_attention_heads = sizes.hidden, sizes.heads
    if getattr(text, "num_key_value_heads", None) is not None:
        text.num_key_value_heads = sizes.key_value_heads
    if sizes.own_head_dim:
        text.head_dim = sizes.head_dim
    for names, value in ((_INTERMEDIATE, sizes.intermediate), (_EXPERTS, sizes.experts)):
        named = next((name for name in names if hasattr(text, name)), None)
        if named is not None and value is not None:
            setattr(text, named, value)
    return made
