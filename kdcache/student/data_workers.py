"""Processes that read batches ahead of the training, in the order that it will ask for them.

They are the workers of PyTorch's DataLoader, so order, resume and ranks are as without them; each has two batches
under way. Batches come through a pipe and not, as is DataLoader's default, through shared memory, of
which containers often have little.
"""

from __future__ import annotations

import contextlib
import dataclasses
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from kdcache import stopping
from kdcache.errors import CacheError, KdcacheError
from kdcache.losses import Pool
from kdcache.targets import SparseTargets

START = "spawn"
"""How readers begin: sharing nothing with this process, since neither connections nor CUDA survive a fork."""

_REMOTE = 2


def how_many(wished: int | None, remote: bool) -> int:
    """`readers`, or what suits the storage: none for a folder."""
    return wished if wished is not None else _REMOTE * remote


def detached(loader: Any) -> Any:
    """A prepared loader whose workers are readers."""
    if loader.num_workers:
        inner = loader.base_dataloader  # accelerate's wrapper only reads through
        inner.multiprocessing_context = START
        inner.collate_fn = _Sender(inner.collate_fn)
        inner.worker_init_fn = stopping.obey_parent  # instead of one that seeds: nothing here is random
    return loader


class _Sender:
    """Makes a batch, in a reader."""

    def __init__(self, collate: Callable[[Any], dict[str, Any]]) -> None:
        self._collate = collate

    def __call__(self, items: Any) -> dict[str, Any]:
        return _ByValue(self._collate(items))


class _ByValue(dict[str, Any]):
    """A batch that travels as arrays, by value, and arrives as a plain dictionary of tensors."""

    def __reduce__(self) -> tuple[Any, ...]:
        targets = self["targets"]
        pool = Pool.of(targets)
        each = [
            (type(one), _arrays({f.name: getattr(one, f.name) for f in dataclasses.fields(one)}))
            for one in pool.targets
        ]
        weights = pool.weights if isinstance(targets, Pool) else None
        return _arrived, (_arrays({**self, "targets": None}), each, weights)


def _arrays(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def _arrived(
    batch: dict[str, Any], each: list[tuple[type[SparseTargets], dict[str, Any]]], weights: tuple[float, ...] | None
) -> dict[str, Any]:
    def tensors(values: dict[str, Any]) -> dict[str, Any]:
        return {n: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for n, value in values.items()}

    targets = tuple(kind(**tensors(one)) for kind, one in each)
    return {**tensors(batch), "targets": targets[0] if weights is None else Pool(targets, weights)}


@contextlib.contextmanager
def translate_worker_errors() -> Iterator[None]:
    """Raise the errors of readers without the traceback that DataLoader adds; the readers end first.

    Raises:
        CacheError: a reader was killed.
    """
    with warnings.catch_warnings():
        # They wait for the network: that there are more of them than cores is as it should be.
        warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)
        try:
            yield
        except BaseException as error:
            killed = _who_was_killed(error)
            traceback.clear_frames(error.__traceback__)  # which hold the readers
            if isinstance(error, KdcacheError):
                raise type(error)(str(error).rstrip().rpartition(f"{type(error).__name__}: ")[2]) from None
            if killed:
                raise CacheError(f"a reader was killed ({killed}), perhaps for its memory: use fewer readers") from None
            raise


def _who_was_killed(error: BaseException) -> str:
    """What DataLoader, or the pipe to a reader, says of its end; empty for other errors."""
    known = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
    if isinstance(error, ConnectionError | EOFError):
        known = "multiprocessing" in traceback.extract_tb(error.__traceback__)[-1].filename
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ") if known else ""
