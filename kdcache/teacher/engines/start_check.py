"""The check of an engine at its start: targets of a few rows, made in another way, must be the same up to rounding.

Pieces of several lengths are run: of one token, of a full row (above the tokens that the engine takes at once, where it
takes fewer), and two that begin alike. If the model fits into memory here, transformers runs the same pieces in float32
and in the engine's dtype. The engine's log-probabilities may then be as far from the float32 ones as those of
transformers itself, times `_NOISE`, plus a little. Otherwise the engine runs prefixes of the long pieces as pieces of
their own, and the last position of each must be what it was inside the long piece. That finds slots that are shifted,
chunks that are put together wrongly and caches that are not right, but not a model that computes something else.

Cost: transformers loads the model and runs about two rows, twice unless the engine's dtype is float32; or the engine
runs a row and a few prefixes of it.

Shapes: n slots of a piece, K entries.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from kdcache.errors import EngineError, KdcacheError
from kdcache.isolation import packed_forward
from kdcache.pretrained import load_model
from kdcache.pretrained.files import weight_files
from kdcache.pretrained.quantised import quantisation
from kdcache.rows import PackedRow, RowSpec
from kdcache.selection import Selection
from kdcache.selection.target_faults import find_fault
from kdcache.targets import SparseTargets
from kdcache.teacher.engines.base import TargetRequest
from kdcache.teacher.engines.batch import Batch
from kdcache.teacher.engines.free_memory import free_memory

if TYPE_CHECKING:
    from kdcache.teacher.engines.base import Engine

_CLOSE = 1e-3
"""How far the log-probabilities of two implementations in one dtype may be apart, in the mean by probability."""

_NOISE = 3
"""How much further from float32 the engine may be than transformers in the same dtype."""

_LONG = 512
"""Tokens of the longest piece, unless more are needed to exceed what the engine takes at once."""

_MEMORY_SHARE = 3
"""Part of the free memory that the weights in float32 and the logits of the pieces may take."""

_ROUNDED = 0.1
"""How far targets of one token in two prompts may be apart, in the mean, where the model runs in 16 or 8 bits."""

_TEMPERATURES = (1.0, 2.0)


def require_faithful(engine: Engine, folder: Path, rows: RowSpec, dtype: str, chunk: int | None) -> None:
    """Refuse an engine whose targets are not those of the model.

    Args:
        engine: open.
        folder: of the model.
        rows: the shape of the rows that it will be given.
        dtype: that it runs in.
        chunk: tokens that it takes at once; None where it takes any number.

    Raises:
        EngineError: the targets differ by more than rounding does.
    """
    pieces = _pieces(rows, chunk)
    request = TargetRequest(selection=Selection(k=min(32, rows.vocab_size)), temperatures=_TEMPERATURES)
    found = [_targets(engine, piece, rows, request) for piece in pieces]
    reference = _reference(folder, pieces, rows.vocab_size)
    if reference is None:
        _require_same_as_prefixes(engine, pieces, found, rows, request)
        return
    moved = _mean(map(_distance, found, reference))
    own = 0.0
    if dtype != "float32":
        model = load_model(folder, "teacher", dtype, torch.device("cpu")).eval()
        own = _mean(map(_apart, _logprobs(model, pieces, rows.vocab_size), reference))
    allowed = _CLOSE + _NOISE * own
    if not moved <= allowed:
        raise EngineError(
            f"the engine {engine.name} gives other log-probabilities than transformers for {folder}: they are "
            f"{moved:.2g} nats apart in the mean, and rounding to {dtype} allows {allowed:.2g}"
        )


def _pieces(rows: RowSpec, chunk: int | None) -> list[np.ndarray]:
    """Tokens of the pieces: short, as long as a row, and two that begin alike."""
    longest = min(rows.seq_len, max(_LONG, (chunk or 0) + _LONG // 8 if rows.seq_len > (chunk or 0) else 0))
    lengths = sorted({1, 2, min(17, longest), longest})
    rng = np.random.default_rng(0)
    found = [rng.integers(0, rows.vocab_size, length).astype(np.int32) for length in lengths]
    alike = found[-1].copy()
    alike[len(alike) // 2 :] = rng.integers(0, rows.vocab_size, len(alike) - len(alike) // 2)
    return [*found, alike]


def _targets(engine: Engine, piece: np.ndarray, rows: RowSpec, request: TargetRequest) -> SparseTargets:
    """The engine's targets at every slot of a piece."""
    row = PackedRow(tokens=piece, piece_lengths=np.array([len(piece)], np.int32), piece_documents=np.zeros(1, np.int64))
    found = engine.run(Batch([row], rows, every_slot=True), request)
    assert isinstance(found.positions, SparseTargets)
    if found.finite is not None and not found.finite.all():
        raise EngineError(f"the engine {engine.name} gives NaN or infinite logits for random tokens")
    labelled = found.positions.label_logprob
    assert labelled is not None
    whole = dataclasses.replace(found.positions, label_logprob=labelled.nan_to_num(0))  # the last slot has no label
    fault = find_fault(whole, request.selection, request.temperatures, rows.vocab_size, engine.knows)
    if fault is not None:
        raise EngineError(f"the engine {engine.name} gives {fault[1]} for random tokens")
    return found.positions


@torch.inference_mode()
def _reference(folder: Path, pieces: list[np.ndarray], vocab_size: int) -> list[Tensor] | None:
    """`[n, V]` log-probabilities of each piece in float32; None for a model that does not fit or is not loaded here."""
    if quantisation(folder) is not None:  # the engine rounds what it is given, transformers does not
        return None
    stored = sum(file.stat().st_size for file in weight_files(folder, "teacher"))
    logits = 3 * 4 * vocab_size * max(map(len, pieces)) + 4 * vocab_size * sum(map(len, pieces))
    if 2 * stored + logits > free_memory() / _MEMORY_SHARE:
        return None
    try:
        model = load_model(folder, "teacher", "float32", torch.device("cpu")).eval()
    except KdcacheError:
        return None
    return _logprobs(model, pieces, vocab_size)


@torch.inference_mode()
def _logprobs(model: torch.nn.Module, pieces: list[np.ndarray], vocab_size: int) -> list[Tensor]:
    found = []
    for piece in pieces:
        tokens, positions = torch.from_numpy(piece.astype(np.int64))[None], torch.arange(len(piece))[None]
        logits = packed_forward(model, tokens, positions).logits[0, :, :vocab_size]
        found.append(logits.float().log_softmax(-1))
    return found


def _distance(targets: SparseTargets, truth: Tensor) -> Tensor:
    """`[n]` how far targets are from log-probabilities `[n, V]`: of entries, the mass that they miss, and at T = 2."""
    own = truth.gather(-1, targets.ids)
    missed = truth.topk(targets.ids.shape[-1]).values.exp().sum(-1) - own.exp().sum(-1)
    partition = (truth / _TEMPERATURES[1]).logsumexp(-1) - targets.log_partition[:, 1]
    return (own.exp() * (targets.logprobs - own).abs()).sum(-1) + missed.abs() + partition.abs()


def _apart(one: Tensor, truth: Tensor) -> Tensor:
    """`[n]` the same between log-probabilities `[n, V]` of two models."""
    half = [(each / _TEMPERATURES[1]).logsumexp(-1) for each in (one, truth)]
    return (truth.exp() * (one - truth).abs()).sum(-1) + (half[0] - half[1]).abs()


def _require_same_as_prefixes(
    engine: Engine, pieces: list[np.ndarray], found: list[SparseTargets], rows: RowSpec, request: TargetRequest
) -> None:
    """Refuse an engine that gives a slot of a long piece another target than the last slot of its prefix.

    Raises:
        EngineError: they differ by more than 16-bit rounding does.
    """
    apart = []
    for piece, whole in zip(pieces[-2:], found[-2:], strict=True):
        for stop in {1, 2, len(piece) // 3, len(piece) // 2 + 1, len(piece) - 1} & set(range(1, len(piece))):
            last = _targets(engine, piece[:stop], rows, request)[-1:]
            inside = whole[stop - 1 : stop]
            apart.append((last.logprobs[:, 0].exp() - inside.logprobs[:, 0].exp()).abs())
            apart.append((last.log_partition[:, 1] - inside.log_partition[:, 1]).abs())
    moved = float(torch.cat(apart).mean()) if apart else 0.0
    if not moved <= _ROUNDED:
        raise EngineError(
            f"the engine {engine.name} gives a token another target inside a long prompt than at the end of a short "
            f"one: they are {moved:.2g} apart in the mean, and rounding allows {_ROUNDED:g}"
        )


def _mean(parts: object) -> float:
    return float(torch.cat(list(parts)).mean())  # type: ignore[call-overload]
