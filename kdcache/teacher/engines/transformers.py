"""The engine `transformers`: a Hugging Face causal language model in this process.

It gives final hidden states and the model's own head, or with `tile_head` off the logits of the whole batch. Before it
is used, a probe proves that packed pieces do not see each other and that the logits of the head on its own are the
model's own. On a GPU it gives the device all of a batch's work and does not wait for it.
"""

from __future__ import annotations

import platform
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from kdcache.errors import ConfigError
from kdcache.isolation import packed_forward, probe
from kdcache.prepared_mask import has_prepared_masks
from kdcache.pretrained import find_device, hidden_width, layer_widths, load_model
from kdcache.rows import RowSpec
from kdcache.teacher.engines.base import HIDDEN, Engine, EngineOutput, HiddenStates, Logits, TargetRequest, TeacherSpec
from kdcache.teacher.engines.batch import Batch, send
from kdcache.teacher.engines.layer_states import LayerStates
from kdcache.teacher.engines.tiled_head import TiledHead, require_same_logits
from kdcache.teacher.tensor_group import join_group

_AFTER = "hidden:"
"""The others begin so: the state of each token after that many layers."""


class TransformersEngine(Engine):
    """A loaded, probed model of transformers.

    Attributes:
        model: the model.
        head: its output head on its own; None with `tile_head` off.

    Raises:
        KdcacheError: the model cannot be loaded, does not cover its tokenizer, leaks between pieces, or cannot run its
            head in tiles.
    """

    name = "transformers"
    parallel_ranks = True

    def __init__(self, spec: TeacherSpec, folder: Path, rows: RowSpec) -> None:
        self.device = find_device(spec.device)
        dtype = spec.dtype
        if dtype == "auto" and self.device.type == "cpu":
            dtype = "float32"
        join_group(spec.tensor_parallel)
        self.model = load_model(
            folder, "teacher", dtype, self.device, spec.device_map, spec.attn_implementation, spec.tensor_parallel
        ).eval()
        self._tensor_parallel = spec.tensor_parallel
        if spec.device_map:
            self.device = self.model.device
        self.lookahead = 1 if self.device.type == "cuda" else 0
        self.padded_vocab_size = self.model.config.get_text_config().vocab_size
        if self.padded_vocab_size < rows.vocab_size:
            raise ConfigError(
                f"the teacher predicts {self.padded_vocab_size} tokens, but its tokenizer has {rows.vocab_size}"
            )
        probe(
            self.model, rows.vocab_size, rows.seq_len, self.device, isolate=rows.isolate, packed=rows.packed
        )  # fmt: skip
        self.head = TiledHead(self.model, self.device) if spec.tile_head else None
        self._layers: LayerStates | None = None
        if self.head:
            require_same_logits(self.model, self.head, rows.vocab_size, rows.seq_len, self.device)

    @torch.inference_mode()
    def run(self, batch: Batch, request: TargetRequest) -> EngineOutput:
        """The hidden states of the labelled slots with the head, or their logits.

        The model may wait for its device: transformers asks whether rows hold several pieces, once a batch, before the
        first layer, and so waits for the selection of the batch before.
        """
        tokens, positions = send(batch.tokens, self.device), send(batch.position_ids, self.device)
        index = _flat(batch, batch.slots, self.device)  # sent before the model runs, so nothing waits for them
        every = _flat(batch, (batch.segments >= 0).nonzero(), self.device) if request.extras else None
        if self.head is None:
            if request.extras:
                raise ConfigError(f"extra {request.extras[0]} needs tile_head")
            logits = packed_forward(self.model, tokens, positions).logits.flatten(0, 1)  # [R * L, V]
            return EngineOutput(positions=Logits(logits, index.to(logits.device)))
        after = {name: int(name.removeprefix(_AFTER)) for name in request.extras if name != HIDDEN}
        if after and self._layers is None:
            self._layers = LayerStates(self.model)
        with ExitStack() as stack:
            caught = stack.enter_context(self._layers.caught(after.values())) if self._layers else {}
            hidden = self.head.hidden(tokens, positions).flatten(0, 1)  # [R * L, D]
        extras: dict[str, torch.Tensor] = {}
        if every is not None:
            states = {name: hidden if name == HIDDEN else caught[after[name]].flatten(0, 1) for name in request.extras}
            extras = {name: values[every.to(values.device)] for name, values in states.items()}
        return EngineOutput(positions=HiddenStates(hidden[index.to(hidden.device)], self.head.logits), extras=extras)

    @classmethod
    def extra_widths(cls, folder: Path) -> dict[str, int]:
        """`hidden:-1`, what the head is given, and `hidden:N`, the state after N layers, for 0 to all of them."""
        width, layers = hidden_width(folder), layer_widths(folder)
        last = {} if width is None else {HIDDEN: width}
        return last | {f"{_AFTER}{number}": width for number, width in enumerate(layers)}

    def describe(self) -> dict[str, Any]:
        """Its dtype, device, threads, ways of running head, masks and attention, machine and version of torch."""
        on_cpu = self.device.type == "cpu"
        return {
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type,
            "threads": torch.get_num_threads() if on_cpu else None,
            "tile_head": self.head is not None,
            **({"mask": "prepared"} if has_prepared_masks(self.model) else {}),
            "attention": self.model.config._attn_implementation,
            **({"tensor_parallel": self._tensor_parallel} if self._tensor_parallel > 1 else {}),
            "machine": platform.machine(),
            "torch": torch.__version__.partition("+")[0],
        }


def _flat(batch: Batch, slots: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`[m]` index into `[R * L]` of `[m, 2]` rows and slots."""
    return send(slots[:, 0] * batch.length + slots[:, 1], device)
