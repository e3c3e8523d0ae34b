"""The teacher's model in vLLM, with a pooler that selects: what leaves a request is entries, not hidden states.

vLLM's own class of the architecture is run as it is, its head included (tied or not, scaled, soft-capped, padded, in
parts on several GPUs). A pooler is what vLLM calls after each step with the hidden states of that step's tokens; this
one computes the logits of the labelled slots among them, tile by tile, selects, and keeps the result until the request
is complete. So a prompt that vLLM cuts into chunks is selected from chunk by chunk.

An exception in here would end vLLM, so logits that are not finite are reported as a flag of each position.

Shapes: n tokens of a request, m of its slots that are labelled, W numbers of a target row, D hidden, V vocabulary.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.registry import ModelRegistry

from kdcache.errors import ConfigError
from kdcache.plugins import load_inherited
from kdcache.selection import Selection, draws, select_ahead
from kdcache.teacher.engines.target_rows import pack_targets
from kdcache.teacher.engines.tiles import tile_slices
from kdcache.teacher.engines.vllm_worker.settings import REQUEST, TASK, VARIABLE


@dataclass(frozen=True, eq=False)
class Wanted:
    """What is asked for one request, as it travels through vLLM (`PoolingParams.extra_kwargs`).

    Attributes:
        rule: the selection, its temperatures and the seed, as JSON; None where no targets are wanted.
        slots, labels, keys: of its m labelled slots, as in `Batch`.
        hidden: whether the hidden states of all its tokens are wanted.
    """

    rule: str | None
    slots: np.ndarray
    labels: np.ndarray
    keys: np.ndarray
    hidden: bool


def register() -> None:
    """Put the class below in the place of the teacher's architecture, if this is a process of our engine."""
    if VARIABLE not in os.environ:
        return
    load_inherited()  # a selection may be a plug-in's
    asked = json.loads(os.environ[VARIABLE])
    name, vocab_size = asked["architecture"], asked["vocab_size"]
    if name in ModelRegistry.models:
        base = ModelRegistry.models[name].load_model_cls()
        ModelRegistry.register_model(name, teacher_class(base, vocab_size))


def teacher_class(base: Any, vocab_size: int) -> type:
    """A class of vLLM with a pooler that selects from the first `vocab_size` logits; the others are padding."""

    class Teacher(base):  # type: ignore[misc]
        is_pooling_model = True

        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:  # vLLM looks for these names
            super().__init__(vllm_config=vllm_config, prefix=prefix)
            self.pooler = SelectingPooler(self.compute_logits, vocab_size)

    return Teacher


class SelectingPooler(Pooler):  # type: ignore[misc]
    """Selects from the logits of labelled slots.

    Args:
        compute_logits: hidden states `[n, D]` to logits `[n, V]`; None in a process that holds a part of the head and
            is not the one in which the parts are put together.
        vocab_size: of the tokenizer.
    """

    def __init__(self, compute_logits: Any, vocab_size: int) -> None:
        super().__init__()
        self._compute_logits, self._vocab_size = compute_logits, vocab_size

    def get_supported_tasks(self) -> set[str]:
        """The one task of vLLM's that gives a result for each token."""
        return {TASK}

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor | None]:
        """For each request of a step its flat result, None where more of it is to come.

        Args:
            hidden_states: `[tokens, D]` of the step's requests, one after the other.
            pooling_metadata: of them: what is wanted, and how far each is.
        """
        cursor = pooling_metadata.get_pooling_cursor()
        counts = cursor.num_scheduled_tokens_cpu.tolist()
        parts = torch.split(hidden_states, counts)
        stops = cursor.seq_lens_cpu.tolist()
        carried = [params.extra_kwargs for params in pooling_metadata.pooling_params]
        if not all(carried):  # vLLM measures memory with requests of its own
            return [self.logits(part).new_zeros(0) for part in parts]
        wanted: list[Wanted] = [each[REQUEST] for each in carried]
        inside = [_inside(each, stop - count, stop) for each, stop, count in zip(wanted, stops, counts, strict=True)]
        states = [part[near.to(part.device)] for part, (_, near) in zip(parts, inside, strict=True)]
        rows = self._targets(wanted, [one for one, _ in inside], states)
        found: list[Tensor | None] = []
        for index, state in enumerate(pooling_metadata.pooling_states):
            kept = state.hidden_states_cache  # vLLM's own place for what a request keeps between its steps
            if stops[index] == counts[index]:
                kept.clear()  # its first step, maybe once more
            hidden = parts[index].to(torch.float32, copy=True) if wanted[index].hidden else None  # vLLM reuses its own
            kept.append((rows[index], hidden))
            if not cursor.finished_mask[index]:
                found.append(None)
                continue
            flat = [each.flatten() for place in (0, 1) for part in kept if (each := part[place]) is not None]
            found.append(torch.cat(flat))
            state.clean()
        return found

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """`[n, vocab_size]` of hidden states; `[0, 0]` in a process that has only a part of the head's logits."""
        logits = self._compute_logits(states)
        return states.new_zeros(0, 0) if logits is None else logits[:, : self._vocab_size]

    def _targets(self, wanted: list[Wanted], places: list[slice], states: list[Tensor]) -> list[Tensor]:
        """Target rows `[m, W]` of each request's slots in this step; all requests of a step follow one rule."""
        counts = [len(each) for each in states]
        if wanted[0].rule is None or not sum(counts):
            return [states[0].new_zeros(0, dtype=torch.float32)] * len(states)
        rule = json.loads(wanted[0].rule)
        selection, device = Selection.from_fields(rule["selection"]), states[0].device

        def joined(name: str) -> Tensor:
            arrays = [getattr(each, name)[place] for each, place in zip(wanted, places, strict=True)]
            return torch.from_numpy(np.concatenate(arrays)).to(device)

        labels, draw = joined("labels"), draws(selection, rule["seed"], joined("keys"))
        hidden, temperatures, rows = torch.cat(states), tuple(rule["temperatures"]), []
        for part in tile_slices(len(hidden), self._vocab_size, device):
            logits = self.logits(hidden[part])
            if len(logits):
                uniform = None if draw is None else draw[part]
                rows.append(pack_targets(*select_ahead(logits, selection, labels[part], temperatures, uniform)))
        return list(torch.split(torch.cat(rows), counts)) if rows else [hidden.new_zeros(0)] * len(states)


class WorkerExtension:
    """Methods that vLLM adds to each of its workers."""

    model_runner: Any

    def kdcache_head(self, states: Tensor) -> Tensor:
        """`[n, vocab_size]` float32 logits of hidden states `[n, D]`, on the CPU."""
        model = self.model_runner.get_model()
        weight = next(model.parameters())
        logits: Tensor = model.pooler.logits(states.to(weight.device, self.model_runner.dtype))
        return logits.float().cpu()

    def kdcache_describe(self) -> dict[str, Any]:
        """What the model is: its device, dtype, the size of its head, and whether that is quantised."""
        model = self.model_runner.get_model()
        embeddings = [part for part in model.modules() if isinstance(part, VocabParallelEmbedding)]
        heads = [part for part in embeddings if isinstance(part, ParallelLMHead)] or embeddings  # a tied head is one
        device = torch.device(next(model.parameters()).device)
        return {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(self.model_runner.dtype).removeprefix("torch."),
            "threads": torch.get_num_threads() if device.type == "cpu" else None,
            "head": type(heads[0].quant_method).__name__ if heads else None,
            "vocab_size": int(heads[0].org_vocab_size) if heads else None,
        }


def _inside(wanted: Wanted, start: int, stop: int) -> tuple[slice, Tensor]:
    """The labelled slots among tokens `start` to `stop`: which of the m, and where they are, counted from `start`."""
    low, high = np.searchsorted(wanted.slots, [start, stop]).tolist()
    return slice(low, high), torch.from_numpy(wanted.slots[low:high] - start)


def require_known(architecture: str, version: str) -> None:
    """Refuse an architecture that vLLM has no class for.

    Raises:
        ConfigError: naming it.
    """
    if architecture not in ModelRegistry.models:
        raise ConfigError(f"vLLM {version} has no class for {architecture}")
