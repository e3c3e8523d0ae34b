"""Select: a rule over the logits of many positions, one tile of a few megabytes after another.

Guarantee: log-probabilities are normalised over the whole vocabulary; the tail is summed over the
complement itself; a target depends on its own logits, label and key only, whatever batch it is in, bit for bit.
Cost: docs/selection.md has it, in units of torch.logsumexp over the same logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kdcache.errors import ConfigError, LogitsError, TargetError
from kdcache.lazy_torch import no_grad, torch
from kdcache.rows import IGNORE
from kdcache.selection.kind import Selection, check_temperatures
from kdcache.selection.scan import scan
from kdcache.selection.uniforms import SELECT, default_keys, uniforms
from kdcache.targets import SparseTargets

if TYPE_CHECKING:
    from torch import Tensor

TILE_ELEMENTS = 1 << 22
"""Logits of one tile on a CPU; everything but its scan works on `[n, K]`."""

_GPU_TILE_ELEMENTS = 1 << 26


def select(
    logits: Tensor,
    selection: Selection,
    *,
    labels: Tensor | None = None,
    temperatures: Sequence[float] = (1.0,),
    seed: int = 0,
    keys: Tensor | None = None,
) -> SparseTargets:
    """Turn a teacher's logits into sparse targets, on the device where they lie.

    Args:
        logits: `[N, V]`, any floating dtype, taken as float32; padded vocabulary rows already dropped.
        selection: the rule.
        labels: `[N]` true next tokens, -100 where unknown.
        temperatures: the T whose partition and tail are kept.
        seed: of the sampled kinds.
        keys: `[N, 3]` int64 shard, row and position of each, from which the sampled kinds draw; by default
            shard 0, row 0 and the place in this batch.

    Returns:
        SparseTargets over N positions; `label_logprob` is None without labels. Entries of truncated kinds have falling
        probabilities; `ipps` has the heavies by falling probability, then the lights by id; `sample` has the forced
        label, then the rest by id.

    Raises:
        LogitsError: a NaN or infinite logit; its `position` is the first offending row.
        ConfigError: k above V, a temperature outside 0.01 to 100, a sampling temperature that is not among the
            temperatures, or a setting that a pilot has yet to find.
        TargetError: a label that is no id of the vocabulary, nor -100, or a tensor of another shape.
    """
    _check_shapes(logits, labels, keys)
    check_temperatures(temperatures)
    named = tuple(map(float, temperatures))
    if selection.needs_pilot:
        wanted = ", ".join(selection.pilot_settings)
        raise ConfigError(f"{wanted} of kind {selection.kind} is not known yet: a pilot finds it, or it must be given")
    if selection.sampled and selection.target_temperature not in named:
        raise ConfigError(
            f"sample_temperature is {selection.target_temperature:g}, but the temperatures are "
            f"{', '.join(f'{t:g}' for t in named)}; name it among them"
        )
    selection.width(logits.shape[-1])
    device = logits.device
    logits = logits.to(select_device(device))
    if labels is not None:
        _check_labels(labels, logits.shape[-1])
        labels = labels.to(logits.device)
    keys = default_keys(len(logits), logits.device) if keys is None else keys.to(logits.device)
    draw = draws(selection, seed, keys)
    size = TILE_ELEMENTS if logits.device.type == "cpu" else _GPU_TILE_ELEMENTS
    rows = max(1, size // logits.shape[-1])

    def tile(start: int) -> SparseTargets:
        s = slice(start, start + rows)
        targets, finite = select_ahead(
            logits[s], selection, None if labels is None else labels[s], named, None if draw is None else draw[s]
        )
        require_finite(finite, start)
        return targets

    return SparseTargets.cat([tile(start) for start in range(0, max(1, len(logits)), rows)]).to(device)


def select_device(device: torch.device) -> torch.device:
    """Where logits of a device are selected from: there, but for MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def draws(rule: Selection, seed: int, keys: Tensor) -> Tensor | None:
    """The random numbers of positions: `[N, *random_shape]`, None where the rule takes none.

    Args:
        rule: the selection.
        seed: of the cache.
        keys: `[N, 3]` int64 shard, row and position.
    """
    shape = rule.random_shape
    return None if shape is None else uniforms(seed, keys, SELECT, shape[0] if shape else None)


@no_grad
def select_ahead(
    logits: Tensor, rule: Selection, labels: Tensor | None, temperatures: tuple[float, ...], draw: Tensor | None
) -> tuple[SparseTargets, Tensor]:
    """`select` for one tile of checked arguments, which does not wait for the device.

    Args:
        logits: `[n, V]`, on a `select_device`.
        rule: the selection.
        labels: `[n]` true next tokens, -100 where unknown.
        temperatures: of partitions and tails.
        draw: the positions' part of `draws`.

    Returns:
        Targets, and `[n]` whether all logits of a position are finite; where they are not, its target means nothing.
    """
    head, drawn = rule.head(logits.shape[-1]), rule.drawn_temperature
    tile = scan(logits, head, tuple(dict.fromkeys((*temperatures, drawn))), labels, rule.labelled, drawn)
    targets = rule.entries(logits, tile, temperatures, draw)
    return (targets if labels is not None else dataclasses.replace(targets, label_logprob=None)), tile.finite


def require_finite(finite: Tensor, start: int = 0) -> None:
    """Raise a LogitsError for the first of `[n]` positions, counted from `start`, whose logits are not finite."""
    if not finite.all():
        position = start + int((~finite).nonzero()[0])
        raise LogitsError(f"the teacher's logits at position {position} are not finite", position)


def _check_shapes(logits: Tensor, labels: Tensor | None, keys: Tensor | None) -> None:
    if logits.ndim != 2 or not logits.is_floating_point():
        raise TargetError(f"logits are {logits.dtype} of shape {tuple(logits.shape)}, expected floating [N, V]")
    for name, given, shape in (("labels", labels, (len(logits),)), ("keys", keys, (len(logits), 3))):
        if given is not None and tuple(given.shape) != shape:
            raise TargetError(f"{name} have shape {tuple(given.shape)}, expected {shape} for {len(logits)} positions")


def _check_labels(labels: Tensor, vocab: int) -> None:
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= vocab))
    if wrong.any():  # on a GPU it would end the process
        position = int(wrong.nonzero()[0])
        raise TargetError(
            f"label {int(labels[position])} at position {position} is outside the vocabulary of {vocab} tokens"
        )
