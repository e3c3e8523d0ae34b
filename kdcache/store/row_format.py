"""Row format: a row, its targets and its extras as named streams, the same in every store.

    tokens      [n] ids of the row, 1 <= n <= seq_len, without padding
    pieces      [P, 2] int64: the length of each piece, at least 1, summing to n; its document
    supervised  [n] uint8: 1 where a token may be a label; empty when every token may
    chosen      a bit for each labelled slot: 1 where it carries a target; only in caches with a position filter
    prefix      [m] ids of what the teacher reads in front of pieces, each different prefix once, and
    prefixed    [P, 3] int64: where in them the prefix of each piece begins, its length, and how many of the piece's
                first tokens the teacher does not read; both only in caches whose teacher has a context of its own
    ...         the streams of the codec: the targets of the slots that carry one, in slot order
    extra.NAME  the values of each extra, in order of name; behind them scale.NAME, apart.NAME and channel.NAME where
                its precision needs them

A store keeps the streams, their lengths, the number of positions, and a seal over all of it. Nothing read is
believed before it is checked: lengths against what the manifest allows, tokens against the vocabulary, pieces
against tokens, positions against labels and chosen bits, targets by the codec, and extras by their specs.

Shapes: n tokens of a row, P pieces, L = seq_len slots, W numbers of an extra's vector.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from kdcache.codec import Codec
from kdcache.codec.streams import Columns, Streams, inflate
from kdcache.errors import CorruptCacheError, TargetError
from kdcache.extras import ExtraSpec, stream_names
from kdcache.lazy_torch import torch
from kdcache.prefixes import NO_PREFIX, Prefixes
from kdcache.rows import IGNORE, PackedRow, taught_unread
from kdcache.targets import SparseTargets

Shapes = dict[str, tuple[np.dtype[Any], tuple[int, ...]]]
Extras = Mapping[str, "NDArray[Any] | torch.Tensor"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """One row as it is stored.

    Attributes:
        positions: targets in it.
        streams: each a 1-D array.
    """

    positions: int
    streams: dict[str, NDArray[Any]]

    def digest(self, running: Any) -> None:
        """Add the row to a running hash of the logical content."""
        running.update(struct.pack("<I", self.positions))
        for stream in self.streams.values():
            data = np.ascontiguousarray(stream).view(np.uint8)
            running.update(struct.pack("<Q", data.size))
            running.update(data)


@dataclass(frozen=True, kw_only=True)
class Part:
    """What is stored of one context of a row, and where that is not rounded yet, what will be.

    Attributes:
        tokens: `[n]` its tokens.
        labelled: `[n]` bool, which of its slots are labelled.
        targets: of these; `count` is 0 where the position filter left one out.
        columns: what a codec stores of those that carry a target.
        by_token, by_label: the streams of extras by name, `[n, ...]` and `[labels, ...]`.
    """

    tokens: NDArray[np.integer[Any]]
    labelled: NDArray[np.bool_]
    targets: SparseTargets
    columns: Columns
    by_token: Streams = field(default_factory=dict)
    by_label: Streams = field(default_factory=dict)

    def labelled_at(self, wanted: NDArray[np.bool_]) -> Part:
        """The same, of some of its labelled slots only; `wanted` is `[n]`."""
        kept = wanted[self.labelled]
        carrying = self.targets.count.numpy() > 0
        return dataclasses.replace(
            self,
            labelled=wanted,
            targets=self.targets[torch.from_numpy(kept)],
            columns={name: values[kept[carrying]] for name, values in self.columns.items()},
            by_label={name: values[kept] for name, values in self.by_label.items()},
        )


@dataclass(frozen=True, kw_only=True)
class RowFormat:
    """How the rows of one cache become streams; everything comes from its manifest.

    Attributes:
        codec: of the targets.
        seq_len: slots a row.
        vocab_size: tokens lie below it.
        documents: in the corpus; pieces come from these.
        filtered: whether there is a position filter, so that a labelled slot may be without a target.
        extras: further arrays of a row, by name, in order of name.
        typed: whether the targets' streams are plain numbers, so that a store can hold them as such for other tools.
        prefix_tokens: the most tokens of a row's prefixes; 0 where the teacher reads what its student does.
    """

    codec: Codec
    seq_len: int
    vocab_size: int
    documents: int
    filtered: bool
    extras: dict[str, ExtraSpec] = field(default_factory=dict)
    typed: bool = False
    prefix_tokens: int = 0

    @property
    def layout(self) -> Shapes:
        """dtype and largest shape of the streams that say what the tokens are, and which slots carry a target."""
        length = self.seq_len
        shapes: Shapes = {
            "tokens": (self.codec.id_dtype, (length,)),
            "pieces": (np.dtype("<i8"), (length, 2)),
            "supervised": (np.dtype("u1"), (length,)),
        }
        if self.filtered:
            shapes["chosen"] = (np.dtype("u1"), (-(-length // 8),))
        if self.prefix_tokens:
            shapes["prefix"] = (self.codec.id_dtype, (self.prefix_tokens,))
            shapes["prefixed"] = (np.dtype("<i8"), (length, 3))
        return shapes

    @cached_property
    def most_bytes(self) -> int:
        """The most that the streams of a row can hold."""
        shapes = self.shapes(self.seq_len).values()
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in shapes)

    def shapes(self, positions: int) -> Shapes:
        """dtype and largest shape of every stream of a row with so many positions, in order.

        Raises:
            CorruptCacheError: a row cannot have so many.
        """
        if not 0 <= positions <= self.seq_len:
            raise CorruptCacheError(f"it claims {positions} targets, but a row has {self.seq_len} slots")
        return {**self.layout, **self.codec.streams(positions), **self.extra_shapes}

    @cached_property
    def extra_shapes(self) -> Shapes:
        """dtype and largest shape of the streams of the extras."""
        shapes: Shapes = {}
        for name, spec in self.extras.items():
            names = stream_names(name, spec)
            shapes.update({names[part]: shape for part, shape in spec.shapes(self.seq_len).items()})
        return shapes

    def pack(self, row: PackedRow, targets: SparseTargets, extras: Extras | None = None) -> Record:
        """A row, the targets of its labelled slots in slot order, and its extras, as streams.

        In a cache with a position filter a slot whose target has no entries carries none, and nothing of it is stored.

        Args:
            row: the tokens.
            targets: of its labelled slots.
            extras: `[n, W]` of each extra, a vector for each token; or `[labels, W]`, one for each labelled slot, of
                those with `per="position"`.

        Raises:
            TargetError: targets of another layout, or an extra that is missing, unknown, of another shape, or not
                finite.
        """
        return self._pack(row, targets, self._pack_extras(row, extras or {}))

    def cut(self, record: Record, row: PackedRow, targets: SparseTargets, contexts: Sequence[slice]) -> list[Part]:
        """What is stored of each context of a row, to be put into other rows by `join`.

        Args:
            record: of the row.
            row, targets: what it says, from `unpack` or as given to `pack`.
            contexts: the tokens of each.
        """
        labelled = row.labels(self.seq_len)[: len(row.tokens)] != IGNORE
        columns = self.codec.columns(record.streams, record.positions)
        before = np.concatenate([[0], np.cumsum(labelled)])  # labelled slots before each token
        carried = np.concatenate([[0], np.cumsum(targets.count.numpy() > 0)])  # targets before each labelled slot
        extras: dict[str, tuple[NDArray[Any], bool]] = {}
        for name, spec in self.extras.items():
            each, names = spec.per == "token", stream_names(name, spec)
            for part, (_, shape) in spec.shapes(len(row.tokens) if each else int(before[-1])).items():
                extras[names[part]] = record.streams[names[part]].reshape(shape), each
        parts = []
        for tokens in contexts:
            labels = slice(before[tokens.start], before[tokens.stop])
            positions = slice(carried[labels.start], carried[labels.stop])
            parts.append(
                Part(
                    tokens=row.tokens[tokens],
                    labelled=labelled[tokens],
                    targets=targets[labels],
                    columns={name: values[positions] for name, values in columns.items()},
                    by_token={name: values[tokens] for name, (values, each) in extras.items() if each},
                    by_label={name: values[labels] for name, (values, each) in extras.items() if not each},
                )
            )
        return parts

    def join(self, row: PackedRow, parts: Sequence[Part]) -> tuple[SparseTargets, Record]:
        """The targets of the labelled slots of a row, and its record, from what is stored of its contexts."""
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
        stored = [{**part.by_token, **part.by_label} for part in parts]
        extras = {name: np.concatenate([part[name] for part in stored]).reshape(-1) for name in self.extra_shapes}
        targets = SparseTargets.cat([part.targets for part in parts])
        return targets, self._record(row, targets.count > 0, self.codec.from_columns(columns), extras)

    def copy(self, record: Record, row: PackedRow, targets: SparseTargets) -> Record:
        """The record of another row of the same tokens and pieces, of other documents, from one of the same codec."""
        stored = {name: record.streams[name] for name in self.codec.streams(record.positions)}
        return self._record(row, targets.count > 0, stored, {name: record.streams[name] for name in self.extra_shapes})

    def repack(self, record: Record, row: PackedRow, targets: SparseTargets) -> Record:
        """The record of a row with other targets; the streams of its extras are taken over as they are."""
        return self._pack(row, targets, {name: record.streams[name] for name in self.extra_shapes})

    def _pack(self, row: PackedRow, targets: SparseTargets, extras: dict[str, NDArray[Any]]) -> Record:
        carries = targets.count > 0
        return self._record(row, carries, self.codec.encode(targets[carries] if self.filtered else targets), extras)

    def _record(self, row: PackedRow, carries: torch.Tensor, targets: Streams, extras: Streams) -> Record:
        """The record of a row whose targets and extras are streams already; `carries` is of its labelled slots."""
        pieces = np.stack([row.piece_lengths, row.piece_documents], -1).astype("<i8")
        supervised = np.zeros(0, np.uint8) if row.supervised is None else row.supervised.astype(np.uint8)
        streams = {"tokens": row.tokens.astype(self.codec.id_dtype), "pieces": pieces.ravel(), "supervised": supervised}
        if self.filtered:
            streams["chosen"] = np.packbits(carries.numpy(), bitorder="little")
        if self.prefix_tokens:
            prefixes = row.prefixes or Prefixes.of([NO_PREFIX] * len(row.piece_lengths))
            if len(prefixes.tokens) > self.prefix_tokens:
                raise TargetError(
                    f"a row comes with teacher contexts of {len(prefixes.tokens)} tokens, above {self.prefix_tokens}"
                )
            streams["prefix"] = prefixes.tokens.astype(self.codec.id_dtype)
            streams["prefixed"] = prefixes.places.astype("<i8").ravel()
        elif row.prefixes is not None:
            raise TargetError("a row comes with a context of its teacher's, but the cache holds none")
        positions = int(carries.sum()) if self.filtered else len(carries)
        return Record(positions=positions, streams={**streams, **targets, **extras})

    def _pack_extras(self, row: PackedRow, extras: Extras) -> dict[str, NDArray[Any]]:
        if set(extras) != set(self.extras):
            given, wanted = (", ".join(sorted(names)) or "none" for names in (extras, self.extras))
            raise TargetError(f"a row comes with the extras {given}, but the cache holds {wanted}")
        streams = {}
        for name, spec in self.extras.items():
            vectors = len(row.tokens) if spec.per == "token" else int((row.labels(self.seq_len) != IGNORE).sum())
            try:
                made = spec.encode(extras[name])
            except TargetError as error:
                raise TargetError(f"extra {name} cannot be stored: {error}") from None
            if made["values"].size != vectors * spec.width:
                what = f"{len(extras[name])} vectors for {vectors} {spec.per}s"
                raise TargetError(f"extra {name} cannot be stored: it has {what}")
            names = stream_names(name, spec)
            streams.update({names[part]: stream for part, stream in made.items()})
        return streams

    def unpack(self, record: Record) -> tuple[PackedRow, SparseTargets]:
        """The row with its extras, and the targets of its labelled slots; `count` is 0 at those that carry none.

        Raises:
            CorruptCacheError: streams that no row can have.
        """
        for name, (_, shape) in self.shapes(record.positions).items():
            if record.streams[name].size > math.prod(shape):
                raise CorruptCacheError(f"its stream {name} has {record.streams[name].size} numbers, above {shape}")
        row = self.tokens(record)
        labelled = row.labels(self.seq_len)[: len(row.tokens)] != IGNORE
        labels = int(labelled.sum())
        slots = _slots_with_target(record.streams["chosen"], labels) if self.filtered else None
        if record.positions != (labels if slots is None else len(slots)):
            wanted = f"{labels} labels" if slots is None else f"{len(slots)} slots with a target of {labels} labels"
            raise CorruptCacheError(f"it has {record.positions} targets for {wanted}")
        targets = self.codec.decode(record.streams, record.positions)
        extras = {name: self._extra(name, record.streams, labelled) for name in self.extras}
        row = dataclasses.replace(row, extras=extras) if extras else row
        return row, targets if slots is None else targets.spread(torch.from_numpy(slots), labels)

    def _extra(self, name: str, streams: dict[str, NDArray[Any]], labelled: NDArray[np.bool_]) -> NDArray[np.float32]:
        """`[n, W]` an extra, NaN where a token has no vector."""
        spec, n = self.extras[name], len(labelled)
        parts = {part: streams[stream] for part, stream in stream_names(name, spec).items()}
        try:
            vectors = spec.decode(parts, n if spec.per == "token" else int(labelled.sum()))
        except CorruptCacheError as error:
            raise CorruptCacheError(f"its extra {name} is damaged: {error}") from None
        if spec.per == "token":
            return vectors
        spread = np.full((n, spec.width), np.nan, np.float32)
        spread[labelled] = vectors
        return spread

    def tokens(self, record: Record) -> PackedRow:
        """The row alone; what is stored of its targets and extras is not looked at.

        Raises:
            CorruptCacheError: streams that no row can have.
        """
        tokens, pieces, supervised = (record.streams[name] for name in ("tokens", "pieces", "supervised"))
        if len(pieces) % 2:
            raise CorruptCacheError("its pieces are not pairs of a length and a document")
        lengths, documents = pieces.reshape(-1, 2).T
        whole = lengths.min(initial=1) >= 1 and lengths.max(initial=1) <= self.seq_len
        if not whole or int(lengths.sum()) != len(tokens) or not 1 <= len(tokens) <= self.seq_len:
            raise CorruptCacheError(f"its pieces do not add up to a row of 1 to {self.seq_len} tokens")
        if documents.min() < 0 or documents.max() >= self.documents:
            raise CorruptCacheError(f"it has a piece of no document of the {self.documents} of the corpus")
        if tokens.max() >= self.vocab_size:
            raise CorruptCacheError(f"it has a token outside the vocabulary of {self.vocab_size}")
        if len(supervised) not in (0, len(tokens)) or supervised.max(initial=0) > 1:
            raise CorruptCacheError("its mask is not one flag for each token")
        row = PackedRow(
            tokens=tokens.astype(np.int32),
            piece_lengths=lengths.astype(np.int32),
            piece_documents=documents.copy(),
            supervised=supervised.astype(bool) if len(supervised) else None,
        )
        return dataclasses.replace(row, prefixes=self._prefixes(record, row)) if self.prefix_tokens else row

    def _prefixes(self, record: Record, row: PackedRow) -> Prefixes:
        """What the teacher read in front of the pieces of a row.

        Raises:
            CorruptCacheError: streams that no row can have.
        """
        tokens, places = record.streams["prefix"], record.streams["prefixed"]
        if len(places) != 3 * len(row.piece_lengths):
            raise CorruptCacheError("its teacher contexts are not one for each piece")
        starts, lengths, replaced = places.reshape(-1, 3).T
        if places.min(initial=0) < 0 or (starts > len(tokens)).any() or (lengths > len(tokens) - starts).any():
            raise CorruptCacheError("it has a teacher context outside those that it holds")
        if tokens.max(initial=0) >= self.vocab_size:
            raise CorruptCacheError(f"a teacher context has a token outside the vocabulary of {self.vocab_size}")
        prefixes = Prefixes(tokens=tokens.astype(np.int32), places=places.reshape(-1, 3).copy())
        told = dataclasses.replace(row, prefixes=prefixes)
        if (replaced >= row.piece_lengths).any() or len(taught_unread(told)):
            raise CorruptCacheError("it has a label where the teacher has read nothing")
        return prefixes


def _slots_with_target(stream: NDArray[np.uint8], labels: int) -> NDArray[np.int64]:
    """Which of a row's labelled slots carry a target."""
    if len(stream) != -(-labels // 8):
        raise CorruptCacheError(f"its stream chosen has {len(stream)} bytes for the bits of {labels} labels")
    bits = np.unpackbits(stream, bitorder="little")
    if bits[labels:].any():
        raise CorruptCacheError(f"its stream chosen has bits beyond its {labels} labels")
    return np.flatnonzero(bits[:labels])


def read_stream(frame: bytes | memoryview, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """A stream from its zstd frame; nothing is allocated for one that is larger than its shape allows.

    Raises:
        CorruptCacheError: not a frame, too large, or not whole numbers.
    """
    return inflate(frame, math.prod(shape) * dtype.itemsize, dtype)


def row_seal(shard: int, row: int, positions: int, streams: Iterable[Any]) -> int:
    """crc32c of a row: its shard, number and target count (uint32 each), then each stream's length and bytes."""
    crc = google_crc32c.value(struct.pack("<III", shard, row, positions))
    for stream in streams:
        data = memoryview(stream).cast("B") if len(stream) else b""
        crc = google_crc32c.extend(google_crc32c.extend(crc, struct.pack("<I", len(data))), bytes(data))
    return int(crc)
