"""A writer: a causal language model that is open, and what it writes behind a batch of prompts.

Generation is that of transformers: its caches, its masks, its positions. The next token is drawn by us (`draw`), from
numbers that are a function of (seed, prompt, sample, step), so what is written behind a prompt does not depend on what
else is written. What a checkpoint's `generation_config.json` says of sampling is left out: only the options count.

Prompts of a batch are padded on the left. A probe proves for each model that this changes nothing.
Cost: that of transformers' `generate`, a few passes over the logits of each step, and what is said in `draw`. A batch
goes on until its longest completion ends (docs/decisions/0019).

Shapes: B prompts of a batch, L tokens of the longest, V vocabulary.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from kdcache.errors import ConfigError, ModelError
from kdcache.generation.draw import draw
from kdcache.generation.options import GenerateConfig
from kdcache.generation.prompts import Prompt
from kdcache.isolation import allowed_rounding, finite_tokens, most_moved
from kdcache.pretrained import find_device, load_model
from kdcache.selection.uniforms import GENERATE, uniforms

_SHORT, _LONG, _STEPS = 3, 9, 3
"""Tokens of the prompts of the probe, and tokens that are written behind them."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What a model wrote behind a prompt.

    Attributes:
        tokens: `[m]` int64, the token that stopped it included.
        logp: `[m]` float32 log-probability of each token, in nats, in the distribution that it was drawn from.
        model_logp: `[m]` float32, in the model's own at T = 1.
        ended: whether a stop token ended it; otherwise it was cut off.
    """

    tokens: NDArray[np.int64]
    logp: NDArray[np.float32]
    model_logp: NDArray[np.float32]
    ended: bool


class Writer:
    """A model that writes.

    Args:
        folder: of the model.
        options: of the command.
        vocab_size: of its tokenizer; ids beyond it are never written.
        stop_tokens: ids, each of which ends a completion.
        padding: whether prompts of one batch may differ in length.

    Raises:
        KdcacheError: it cannot be loaded, does not cover its tokenizer, or writes otherwise behind padding.
    """

    def __init__(
        self, folder: Path, options: GenerateConfig, vocab_size: int, stop_tokens: Sequence[int], *, padding: bool
    ) -> None:
        self._options, self._vocab_size, self._stop_tokens = options, vocab_size, list(stop_tokens)
        self._device = find_device(options.device)
        dtype = "float32" if options.dtype == "auto" and self._device.type == "cpu" else options.dtype
        self._model = load_model(
            folder, "writer", dtype, self._device, options.device_map, options.attn_implementation
        ).eval()
        self._model.generation_config = GenerationConfig()  # what it says of sampling does not count
        if options.device_map:
            self._device = self._model.device
        predicted = self._model.config.get_text_config().vocab_size
        if predicted < vocab_size:
            raise ConfigError(f"the writer predicts {predicted} tokens, but its tokenizer has {vocab_size}")
        if padding:
            self._require_padding()

    def write(self, prompts: Sequence[Prompt], on_step: Callable[[int], None] | None = None) -> list[Completion]:
        """Write behind each of some prompts.

        Args:
            prompts: one batch.
            on_step: called with the number of each step, from 1.

        Raises:
            ModelError: logits are NaN or infinite.
        """
        drawing = _Drawing(prompts, self._options, self._vocab_size, on_step)
        ids = [torch.from_numpy(np.asarray(prompt.ids, np.int64)) for prompt in prompts]
        self._generate(ids, drawing, self._options.max_new_tokens, self._stop_tokens)
        tokens, logp, model_logp = (torch.stack(each, -1).cpu().numpy() for each in drawing.found)
        found = []
        for row, one in enumerate(tokens):
            ends = np.flatnonzero(np.isin(one, self._stop_tokens))
            length = int(ends[0]) + 1 if len(ends) else len(one)
            found.append(
                Completion(
                    tokens=one[:length], logp=logp[row, :length].astype(np.float32),
                    model_logp=model_logp[row, :length].astype(np.float32), ended=bool(len(ends)),
                )
            )  # fmt: skip
        return found

    def describe(self) -> dict[str, Any]:
        """Its dtype, device, threads and attention, machine and versions: what may change last bits."""
        on_cpu = self._device.type == "cpu"
        return {
            "dtype": str(next(self._model.parameters()).dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else self._device.type,
            "threads": torch.get_num_threads() if on_cpu else None,
            "attention": self._model.config._attn_implementation,
            "machine": platform.machine(),
            "torch": torch.__version__.partition("+")[0],
            "transformers": transformers.__version__,
        }

    @torch.inference_mode()
    def _generate(
        self, prompts: Sequence[Tensor], choosing: LogitsProcessor, steps: int, stop_tokens: Sequence[int] = ()
    ) -> None:
        """Run `generate` over one batch; `choosing` decides what is written, and keeps it."""
        length = max(map(len, prompts))
        tokens = torch.full((len(prompts), length), self._padding)
        mask = torch.zeros_like(tokens)
        for row, ids in enumerate(prompts):
            tokens[row, length - len(ids) :], mask[row, length - len(ids) :] = ids, 1
        self._model.generate(
            tokens.to(self._device),
            attention_mask=mask.to(self._device),
            logits_processor=LogitsProcessorList([choosing]),
            generation_config=GenerationConfig(
                max_new_tokens=steps, do_sample=False, eos_token_id=list(stop_tokens) or None,
                pad_token_id=self._padding,
            ),
        )  # fmt: skip

    @property
    def _padding(self) -> int:
        """An id that stands where nothing does; masks leave it out."""
        return self._stop_tokens[0] if self._stop_tokens else 0

    def _require_padding(self) -> None:
        """Refuse a model whose logits behind a prompt depend on the padding before it.

        Raises:
            ModelError: they do.
        """
        with torch.no_grad():
            known = finite_tokens(self._model, self._vocab_size, self._device).cpu()
        if not len(known):  # the first prompt will be refused, and named
            return
        ids = known[torch.arange(_LONG + _STEPS) % len(known)]
        short, long, forced = ids[:_SHORT], ids[:_LONG], ids[_LONG:]

        def logits(*prompts: Tensor) -> Tensor:
            """`[steps, V]` of the first of them."""
            forcing = _Forcing(forced, self._vocab_size)
            self._generate(prompts, forcing, _STEPS)
            return torch.stack(forcing.logits)

        alone = logits(short)
        allowed = allowed_rounding(self._model, alone, logits(short, short, short))
        moved = most_moved(logits(short, long), alone)
        if moved > allowed:
            raise ModelError(
                f"{type(self._model).__name__} writes otherwise behind padding: its logits move by {moved:.2g} (noise "
                f"allows {allowed:.2g}); use batch_rows 1, which pads nothing"
            )


class _Drawing(LogitsProcessor):  # type: ignore[misc]
    """Draws the next token of each prompt of a batch, and leaves `generate` no other choice.

    Attributes:
        found: for each step, `[B]` tokens, their log-probabilities, and those of the model.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        options: GenerateConfig,
        vocab_size: int,
        on_step: Callable[[int], None] | None,
    ) -> None:
        self._options, self._vocab_size, self._on_step = options, vocab_size, on_step
        self._keys = torch.tensor([[prompt.document, prompt.sample, 0] for prompt in prompts])
        self._first = prompts[0].document
        self.found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002  of the interface
        step = len(self.found[0])
        logits = scores[:, : self._vocab_size]
        if not bool(torch.isfinite(logits.amax(-1)).all()):
            raise ModelError(
                f"the writer's logits are NaN or infinite in the batch that begins with prompt {self._first}, after "
                f"{step} tokens; try dtype float32 or bfloat16"
            )
        self._keys[:, 2] = step
        numbers = uniforms(self._options.seed, self._keys, GENERATE).to(scores.device)
        drawn = draw(logits, numbers, self._options.temperature, self._options.top_p)
        for kept, values in zip(self.found, (drawn.tokens, drawn.logp, drawn.model_logp), strict=True):
            kept.append(values)
        if self._on_step:
            self._on_step(step + 1)
        return _only(drawn.tokens, scores)


class _Forcing(LogitsProcessor):  # type: ignore[misc]
    """Writes given tokens behind every prompt, and keeps the logits of the first."""

    def __init__(self, tokens: Tensor, vocab_size: int) -> None:
        self._tokens, self._vocab_size = tokens, vocab_size
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self._tokens[len(self.logits)].to(scores.device)
        self.logits.append(scores[0, : self._vocab_size].float().cpu())
        return _only(token.expand(len(input_ids)), scores)


def _only(tokens: Tensor, scores: Tensor) -> Tensor:
    """`[B, V]` scores by which each of `[B]` tokens is the only one."""
    return torch.full_like(scores, -torch.inf).scatter_(-1, tokens[:, None], 0.0)
