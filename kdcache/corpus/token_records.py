"""Token records: documents that are tokenised, and the columns that say which of their tokens count.

`attention_mask` says which tokens are there at all: what it leaves out at either end is padding. `labels` (aligned with
the tokens, not shifted, -100 where masked) and masks of 0 and 1 say which tokens may be labels; where there are
several, a token needs all of them. `writer_logp` says with which log-probability each token was drawn, where a model
wrote them; what may be a label must have one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.corpus.documents import BadDocument, TokenIds
from kdcache.extras import WRITER_LOGP
from kdcache.rows import IGNORE

MASKS = ("attention_mask", "completion_mask", "assistant_masks", "assistant_mask", "loss_mask")
"""Columns of 0 and 1; the first says which tokens are there at all."""


def read_tokens(found: Mapping[str, Any]) -> TokenIds | None:
    """Token ids, from the columns of a record; None where there are none."""
    if found["input_ids"] is None:
        return None
    ids = _integers(found["input_ids"], "input_ids")
    supervised: NDArray[np.bool_] | None = None
    for name in MASKS[1:]:
        if found.get(name) is not None:
            mask = _mask(found[name], name, len(ids))
            supervised = mask if supervised is None else supervised & mask
    if found.get("labels") is not None:
        marked = _labelled(_integers(found["labels"], "labels"), ids)
        supervised = marked if supervised is None else supervised & marked
    logp = _logps(found[WRITER_LOGP], len(ids)) if WRITER_LOGP in found else None
    if found.get(MASKS[0]) is not None:
        there = np.flatnonzero(_mask(found[MASKS[0]], MASKS[0], len(ids)))
        first, last = (int(there[0]), int(there[-1]) + 1) if len(there) else (0, 0)
        if last - first != len(there):
            raise BadDocument(f"{MASKS[0]} with a gap: it is 0 between tokens that are there")
        ids = ids[first:last]
        supervised = None if supervised is None else supervised[first:last]
        logp = None if logp is None else logp[first:last]
    if logp is not None and _lacks_labels(logp, supervised):
        raise BadDocument(f"no {WRITER_LOGP}: a token that may be a label has none")
    return TokenIds(ids=ids, supervised=supervised, writer_logp=logp)


def _integers(value: Any, what: str) -> NDArray[np.int64]:
    try:
        found = np.asarray(value)
    except ValueError:
        raise BadDocument(f"wrong type: {what} is a list of lists") from None
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iub"):
        null = isinstance(value, list) and any(one is None for one in value)
        raise BadDocument(f"wrong type: {what} holds {'a null' if null else 'something else than integers'}")
    return found.astype(np.int64)


def _lacks_labels(logp: NDArray[np.float32], supervised: NDArray[np.bool_] | None) -> bool:
    """Whether a token that may be a label has no log-probability. The first token of a document is none."""
    unknown = np.isnan(logp[1:])
    return bool((unknown if supervised is None else unknown & supervised[1:]).any())


def _logps(value: Any, length: int) -> NDArray[np.float32]:
    """Log-probabilities of tokens, NaN where a record has null."""
    if value is None:
        raise BadDocument(f"no {WRITER_LOGP}: it is null, and other records have it")
    try:
        logp = np.array([np.nan if one is None else one for one in value], np.float32)
    except (TypeError, ValueError):
        raise BadDocument(f"wrong type: {WRITER_LOGP} holds something else than numbers") from None
    if logp.shape != (length,):
        raise BadDocument(f"unequal lengths: {length} input_ids, {len(logp)} in {WRITER_LOGP}")
    if not (np.isnan(logp) | ((logp <= 0) & np.isfinite(logp))).all():
        raise BadDocument(f"wrong numbers: {WRITER_LOGP} holds one that is no logarithm of a probability")
    return logp


def _mask(value: Any, what: str, length: int) -> NDArray[np.bool_]:
    mask = _integers(value, what)
    if len(mask) != length:
        raise BadDocument(f"unequal lengths: {length} input_ids, {len(mask)} in {what}")
    if ((mask != 0) & (mask != 1)).any():
        raise BadDocument(f"wrong type: {what} holds something else than 0 and 1")
    return np.asarray(mask, bool)


def _labelled(labels: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which tokens are labels. Labels are aligned with the tokens, not shifted, and -100 where masked."""
    if labels.shape != ids.shape:
        raise BadDocument(f"unequal lengths: {len(ids)} input_ids, {len(labels)} in labels")
    supervised: NDArray[np.bool_] = labels != IGNORE
    if (labels[supervised] != ids[supervised]).any():
        shifted = labels.size > 1 and ((labels[:-1] == ids[1:]) | ~supervised[:-1]).all()
        raise BadDocument(
            "labels that are not the tokens: they must equal input_ids where they are not -100"
            + ("; these look shifted by one already, give them unshifted" if shifted else "")
        )
    return supervised
