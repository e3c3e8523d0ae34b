"""MaxText: the top-k logits of a teacher that its offline distillation saves, as ArrayRecord files.

A record is a batch of B sequences of L tokens: `tokens [B, L]`, `top_k_logits [B, L, K]`, `top_k_indices [B, L, K]`,
and optionally `inputs_position`, `inputs_segmentation` (the piece of each token, counted from 1; 0 where padded),
`targets` and `targets_segmentation`. It is a safetensors file, or in older versions a pickled dict of numpy arrays,
which is read without running it (`pickled_data`).

Logits at slot t are of what follows the tokens 0 to t. They are raw: the normaliser over the vocabulary is not kept, so
the mass of the tail is not there, and nothing can tell log-probabilities from them. So such a cache is audited, and not
imported.

Source: AI-Hypercomputer/maxtext, `src/maxtext/trainers/post_train/distillation/save_top_k_teacher_logits.py` and
`verify_saved_logits.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CorpusError
from kdcache.interop.array_record import read_records
from kdcache.interop.foreign_row import ForeignRow
from kdcache.interop.formats import LOGITS, ForeignCache
from kdcache.interop.pickled_data import NUMPY, read_pickle


class MaxTextCache(ForeignCache):
    """A file or a folder of ArrayRecord files. A part is a file."""

    format = "maxtext"
    values = LOGITS

    def __init__(self, path: str, tokens: str | None = None) -> None:  # noqa: ARG002 - it has its own
        place = Path(path)
        self._files = [place] if place.is_file() else sorted(place.glob("*.array_record"))
        if not self._files:
            raise CorpusError(f"{path} holds no .array_record files of MaxText")

    def parts(self) -> Sequence[Any]:
        """The files."""
        return self._files

    def read(self, part: Any) -> Iterator[ForeignRow]:
        """The sequences of a file."""
        for number, data in enumerate(read_records(part)):
            where = f"{part}, record {number}"
            record = _arrays(data, where)
            for row in range(len(record["tokens"])):
                yield _row({name: values[row] for name, values in record.items()}, f"{where}, row {row}")


def _arrays(data: bytes, where: str) -> dict[str, NDArray[Any]]:
    """The arrays of a record, checked for their shapes."""
    found = read_pickle(data, NUMPY, where) if data[:1] == b"\x80" else _safetensors(data, where)
    try:
        tokens, logits, ids = (np.asarray(found[name]) for name in ("tokens", "top_k_logits", "top_k_indices"))
    except (KeyError, TypeError):
        raise CorpusError(f"{where} does not hold tokens, top_k_logits and top_k_indices") from None
    if tokens.ndim != 2 or logits.ndim != 3 or logits.shape != ids.shape or logits.shape[:2] != tokens.shape:
        raise CorpusError(f"{where} has tokens {tokens.shape}, logits {logits.shape} and ids {ids.shape}")
    arrays = {"tokens": tokens, "logits": logits, "ids": ids}
    segments = found.get("inputs_segmentation")
    if isinstance(segments, np.ndarray) and segments.shape == tokens.shape:
        arrays["segments"] = segments
    return arrays


def _safetensors(data: bytes, where: str) -> dict[str, NDArray[Any]]:
    import safetensors.torch
    from safetensors import SafetensorError

    try:
        tensors = safetensors.torch.load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CorpusError(f"{where} is no safetensors file: {error}") from None
    return {name: (each.double() if each.is_floating_point() else each).numpy() for name, each in tensors.items()}


def _row(record: Mapping[str, NDArray[Any]], where: str) -> ForeignRow:
    segments, lengths = record.get("segments"), None
    n = len(record["tokens"])
    if segments is not None:
        n = int((segments != 0).sum())
        if not n or (segments[:n] == 0).any():
            raise CorpusError(f"{where} has padding between tokens, or nothing else")
        starts = np.flatnonzero(np.diff(segments[:n], prepend=segments[0] - 1))
        lengths = np.diff(starts, append=n).astype(np.int64)
    ids = record["ids"][:n].astype(np.int64)
    return ForeignRow(
        tokens=record["tokens"][:n].astype(np.int64), slots=np.arange(n), ids=ids,
        values=record["logits"][:n].astype(np.float64), count=np.full(n, ids.shape[1]), piece_lengths=lengths,
        where=where,
    )  # fmt: skip
