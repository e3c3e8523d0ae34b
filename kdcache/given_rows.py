"""Rows that somebody else's code gives, checked: what `CacheWriter` takes becomes a packed row, or one sentence.

Guarantee: the packed row is one that the cache can hold and that a reader takes.
Cost: a look at each token.

Shapes: n tokens of a row, P pieces, L slots a row, m tokens of a prefix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kdcache.errors import ConfigError
from kdcache.prefixes import NO_PREFIX, PREFIXES_A_ROW, Prefix, Prefixes
from kdcache.rows import IGNORE, PackedRow, taught_unread
from kdcache.store.manifest import Manifest


def given_row(
    manifest: Manifest,
    where: str,
    tokens: ArrayLike,
    piece_lengths: ArrayLike | None,
    documents: ArrayLike | None,
    labels: ArrayLike | None,
    supervised: ArrayLike | None,
    prefixes: Sequence[Prefix | None] | None,
) -> PackedRow:
    """A row of what `NewShard.write` is given; `where` names it in messages.

    Raises:
        ConfigError: tokens, pieces, documents, labels or prefixes that no row of the cache can have.
    """
    ids = _integers(tokens, where, "tokens")
    n, seq_len = len(ids), manifest.seq_len
    if not 1 <= n <= seq_len:
        raise ConfigError(f"{where} has {n} tokens, but must have 1 to {seq_len}")
    _require_ids(ids, manifest, where, "a token")
    lengths = np.array([n]) if piece_lengths is None else _integers(piece_lengths, where, "piece_lengths")
    if lengths.min(initial=n) < 1 or int(lengths.sum()) != n:
        raise ConfigError(f"{where} has pieces of {lengths.sum()} tokens together, but {n} tokens")
    sources = np.zeros(len(lengths), np.int64) if documents is None else _integers(documents, where, "documents")
    if len(sources) != len(lengths) or sources.min() < 0 or sources.max() >= manifest.documents:
        raise ConfigError(
            f"{where} must name one document of the {manifest.documents} for each of {len(lengths)} pieces"
        )
    if labels is not None and supervised is not None:
        raise ConfigError(f"{where} has both labels and supervised, which say the same")
    mask = None if supervised is None else np.asarray(supervised)
    if mask is not None and (mask.shape != (n,) or mask.dtype != np.bool_):
        raise ConfigError(f"{where} has supervised {mask.dtype} of shape {mask.shape}, but must be bool [{n}]")
    if labels is not None:
        mask = _supervised(_integers(labels, where, "labels"), n, seq_len, where)
    row = PackedRow(
        tokens=ids.astype(np.int32), piece_lengths=lengths.astype(np.int32), piece_documents=sources, supervised=mask
    )
    if labels is not None:
        given = _integers(labels, where, "labels")
        wrong = np.flatnonzero(row.labels(seq_len)[: len(given)] != given)
        if len(wrong):
            raise ConfigError(
                f"{where} has the label {given[wrong[0]]} at slot {wrong[0]}, which does not follow there"
            )
    return row if prefixes is None else _with_prefixes(row, prefixes, manifest, where)


def _with_prefixes(row: PackedRow, given: Sequence[Prefix | None], manifest: Manifest, where: str) -> PackedRow:
    """A row whose teacher was told more."""
    if not manifest.teacher_context:
        raise ConfigError(f"{where} has prefixes, but the cache was created without teacher_seq_len")
    lengths, most = row.piece_lengths.tolist(), manifest.teacher_row_spec.seq_len
    if len(given) != len(lengths):
        raise ConfigError(f"{where} has {len(given)} prefixes for {len(lengths)} pieces")
    kept = []
    for number, (prefix, length) in enumerate(zip(given, lengths, strict=True)):
        prefix = NO_PREFIX if prefix is None else prefix
        tokens = _integers(prefix.tokens, where, f"prefix {number}") if len(prefix.tokens) else NO_PREFIX.tokens
        _require_ids(tokens, manifest, where, f"in prefix {number} a token")
        if not 0 <= prefix.replaced < length:
            raise ConfigError(f"{where} has {prefix.replaced} tokens replaced in piece {number}, which has {length}")
        if len(tokens) + length - prefix.replaced > most:
            raise ConfigError(
                f"{where} has a piece {number} for which the teacher reads {len(tokens) + length - prefix.replaced} "
                f"tokens, above teacher_seq_len {most}"
            )
        kept.append(Prefix(tokens=tokens.astype(np.int32), replaced=int(prefix.replaced)))
    told = Prefixes.of(kept)
    if len(told.tokens) > PREFIXES_A_ROW * most:
        raise ConfigError(
            f"{where} has prefixes of {len(told.tokens)} tokens, above {PREFIXES_A_ROW} times teacher_seq_len {most}; "
            "put fewer pieces into a row"
        )
    row = dataclasses.replace(row, prefixes=told)
    wrong = taught_unread(row)
    if len(wrong):
        raise ConfigError(f"{where} has a label in piece {wrong[0]} where the teacher has read nothing")
    return row


def _require_ids(ids: NDArray[np.integer], manifest: Manifest, where: str, what: str) -> None:
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= manifest.vocab_size:
        raise ConfigError(f"{where} has {what} outside the vocabulary of {manifest.vocab_size}")


def _supervised(labels: NDArray[np.int64], n: int, seq_len: int, where: str) -> NDArray[np.bool_]:
    """Which tokens are labels."""
    if len(labels) not in (n, seq_len):
        raise ConfigError(f"{where} has {len(labels)} labels for {n} tokens")
    mask = np.zeros(n, bool)
    mask[1:] = labels[: n - 1] != IGNORE
    return mask


def _integers(values: ArrayLike, where: str, name: str) -> NDArray[np.int64]:
    array = np.asarray(values)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ConfigError(
            f"{where} has {name} {array.dtype} of shape {array.shape}, but must be integers in one dimension"
        )
    return array.astype(np.int64)
