"""Checks of targets that somebody else computed, against the selection that they claim to follow.

An engine's process, another framework or a server may give anything, so nothing of it is believed: kind, temperatures
and width, counts, ids and numbers. Cost: a few passes over the entries.

Shapes: N positions, K entries, n_T temperatures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from kdcache.lazy_torch import torch
from kdcache.selection.kind import Selection
from kdcache.targets import SparseTargets

if TYPE_CHECKING:
    from torch import Tensor

_SCALARS = ("entropy", "label_logprob")

_ROUNDING = 1e-3
"""By how much a log-probability may exceed 0: those of reduced precision do."""


class Knows(Protocol):
    """What targets are to know: `Known`, or what an engine declares."""

    @property
    def entropy(self) -> bool: ...  # noqa: D102

    @property
    def label_logprob(self) -> bool: ...  # noqa: D102


def drop_unknown(targets: SparseTargets, knows: Knows) -> SparseTargets:
    """Targets without the scalars that they are not to know."""
    unknown: dict[str, Any] = {name: None for name in _SCALARS if not getattr(knows, name)}
    return dataclasses.replace(targets, **unknown) if unknown else targets


def find_fault(
    targets: SparseTargets, selection: Selection, temperatures: Sequence[float], vocab_size: int, knows: Knows
) -> tuple[int | None, str] | None:
    """What is wrong with targets `[N]`, if anything is.

    Args:
        targets: of N positions, on the CPU.
        selection: what they are to follow.
        temperatures: the T of their columns.
        vocab_size: ids lie below it.
        knows: what they are to know.

    Returns:
        The first position at fault (None if it is all of them) and what it has, as in "a weight that is not finite";
        None if nothing is wrong.
    """
    missing = [name for name in _SCALARS if getattr(knows, name) and getattr(targets, name) is None]
    found = (
        f"no {missing[0]}, which `known` says they have"
        if missing
        else _form(targets, selection, temperatures, vocab_size)
    )
    if found is not None:
        return None, found
    for bad, what in _values(targets, selection, vocab_size):  # [N] or [N, ...]
        wrong = bad.flatten(1).any(-1) if bad.ndim > 1 else bad
        if wrong.any():
            return int(wrong.nonzero()[0]), what
    return None


def _form(targets: SparseTargets, selection: Selection, temperatures: Sequence[float], vocab_size: int) -> str | None:
    """What no position can make up for."""
    if targets.count.ndim != 1:
        return f"targets of shape {tuple(targets.count.shape)}, but [N] is asked"
    given = (targets.kind, tuple(targets.temperatures), targets.sample_temperature, targets.ids.shape[-1])
    asked = (selection.kind, tuple(temperatures), selection.target_temperature, selection.width(vocab_size))
    for what, mine, wanted in zip(("kind", "temperatures", "sample_temperature", "width"), given, asked, strict=True):
        if mine != wanted:
            return f"targets of {what} {mine}, but {wanted} is asked"
    if selection.sampled != targets.sampled:
        return (
            f"no tail, as sampled targets, but kind is {selection.kind}"
            if targets.sampled
            else "a tail, but is sampled"
        )
    return None


def _values(targets: SparseTargets, selection: Selection, vocab_size: int) -> Iterator[tuple[Tensor, str]]:
    """Where something is wrong, and what."""
    width, used, sampled = targets.ids.shape[-1], targets.valid, selection.sampled
    fewest = 1 if selection.form.ragged else width
    yield (targets.count < fewest) | (targets.count > width), f"fewer than {fewest} or more than {width} entries"
    yield used & ((targets.ids < 0) | (targets.ids >= vocab_size)), f"an id outside the vocabulary of {vocab_size}"
    each = torch.where(used, targets.ids.long(), -1 - torch.arange(width)).sort(-1).values  # unused ones all differ
    yield each[..., 1:] == each[..., :-1], "one id twice"
    valued = used & ~torch.isnan(targets.logprobs) if sampled else used  # a drawn entry need not name its probability
    yield valued & ~torch.isfinite(targets.logprobs), "a log-probability that is not finite"
    yield valued & (targets.logprobs > _ROUNDING), "a log-probability above 0"
    yield used & ~torch.isfinite(targets.weights), "a weight that is not finite"
    yield used & (targets.weights < 0), "a negative weight"
    for name in ("log_partition", "entropy", "label_logprob"):
        known = getattr(targets, name)
        if known is not None:
            yield ~torch.isfinite(known), f"a value of {name} that is not finite"
    if targets.entropy is not None:
        yield targets.entropy < -_ROUNDING, "an entropy below 0"
    if targets.log_tail is not None:
        yield ~(targets.log_tail <= _ROUNDING), "a value of log_tail above 0"  # or NaN; -inf where everything is kept
