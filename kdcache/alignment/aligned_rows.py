"""Aligned rows: the rows of a cache as a student with another tokenizer reads them.

A row keeps its pieces, so what was apart stays apart; each piece has the student's tokens of the same text. The target
of a position where a chunk begins is the teacher's at the same byte, in the student's ids (`kdcache.aligned_targets`).
A token of the student may be a label where all of its bytes are those of tokens that may.

All that is needed is in the cache, its tokenizer included, and in the student's tokenizer.

Cost: to read a row, the student's tokenizer over its text, and a few passes of numpy: measured in docs/tokenizers.md.

Shapes: n tokens of the teacher in a row, m of the student, M labelled slots of the student's row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from kdcache.aligned_targets import AlignedTargets, map_entries
from kdcache.alignment.chunks import Chunks, all_within, chunks_of
from kdcache.alignment.retokenise import Piece, Retokeniser, UnencodableError
from kdcache.alignment.vocabulary import match_vocabularies
from kdcache.cache import Cache
from kdcache.errors import ConfigError, ModelError
from kdcache.pretrained import has_tokenizer, load_tokenizer
from kdcache.pretrained.tokenizer import tokenizer_fingerprint, vocabulary_size
from kdcache.rows import IGNORE, PackedRow, RowSpec, spread_rows
from kdcache.store.manifest import Manifest
from kdcache.targets import SparseTargets
from kdcache.token_bytes import TokenBytes

_TRIED_ROWS = 64
"""Rows that are aligned before a run begins."""


@dataclass(frozen=True)
class StudentTokenizer:
    """The tokenizer of a student.

    Attributes:
        name: of the student, for messages.
        tokenizer: of transformers.
        sha256: its fingerprint.
    """

    name: str
    tokenizer: Any
    sha256: str

    @property
    def vocab_size(self) -> int:
        """Its ids lie below this."""
        return vocabulary_size(self.tokenizer)


def read_student_tokenizer(name: str, folder: Path) -> StudentTokenizer:
    """The tokenizer in a student's folder.

    Args:
        name: of the student, for messages.
        folder: of its checkpoint, or that its config.json is in.

    Raises:
        ModelError: there is none, or it does not load.
    """
    if not has_tokenizer(folder):
        raise ModelError(
            f"align needs the tokenizer of the student {name}, but {folder} has none: put its files there, as "
            "tokenizer.json and tokenizer_config.json"
        )
    tokenizer = load_tokenizer(folder)
    return StudentTokenizer(name, tokenizer, tokenizer_fingerprint(tokenizer))


class Alignment:
    """A cache's tokenizer and a student's.

    Args:
        cache: what the student learns from.
        student: its tokenizer.

    Attributes:
        student: as given.
        vocabularies: of both.

    Raises:
        ConfigError: the cache was written without a tokenizer, or with sampled targets that the student's vocabulary
            cannot hold.
        ModelError: the bytes of the tokens of one of them are not known.
    """

    def __init__(self, cache: Cache, student: StudentTokenizer) -> None:
        manifest = cache.manifest
        if not manifest.tokenizer_files:
            raise ConfigError(
                f"align needs the tokenizer of the cache {cache.storage}, which was written without one: write it "
                "again with its tokenizer"
            )
        teacher = cache.load_tokenizer()
        self.student = student
        self._of_teacher, self.of_student = TokenBytes(teacher), TokenBytes(student.tokenizer)
        self.vocabularies = match_vocabularies(teacher, student.tokenizer, self._of_teacher, self.of_student)
        if not self.vocabularies.alike:
            self._of_teacher.require_exact("cache")
            self.of_student.require_exact(f"student {student.name}")
        self._retokeniser = Retokeniser(
            teacher, student.tokenizer, self._of_teacher, self.of_student, self.vocabularies
        )
        if manifest.vocab_size > len(self.vocabularies.ids):  # ids that no token has
            more = manifest.vocab_size - len(self.vocabularies.ids)
            padded = np.pad(self.vocabularies.ids, (0, more), constant_values=-1)
            self.vocabularies = dataclasses.replace(self.vocabularies, ids=padded)
        self._entry_ids = torch.from_numpy(self._ids_of_entries())

    def _ids_of_entries(self) -> NDArray[np.int64]:
        """`[Vt]` the student's id of each entry: of special tokens that share one, of the first alone."""
        ids = self.vocabularies.ids.copy()
        _, first = np.unique(ids, return_index=True)
        again = np.ones(len(ids), bool)
        again[first] = False
        ids[again] = -1
        return ids

    @property
    def complete(self) -> bool:
        """Whether every token of the teacher is one of the student."""
        return bool((self._entry_ids >= 0).all())

    def piece(self, tokens: NDArray[np.integer[Any]]) -> Piece:
        """A piece of a row, retokenised."""
        return self._retokeniser.piece(tokens)

    def targets(
        self, targets: SparseTargets, labels: Chunks, length: int, label_bytes: NDArray[np.int64]
    ) -> AlignedTargets:
        """The targets of M labelled slots.

        Args:
            targets: of the teacher's labelled slots.
            labels: chunks, as numbers of labels on either side.
            length: M.
            label_bytes: `[M]` bytes of each label.
        """
        mapped, foreign = map_entries(targets[torch.from_numpy(labels.teacher[:, 0])], self._entry_ids)
        slots = torch.from_numpy(labels.student[:, 0])
        if not self.vocabularies.alike:
            mapped = dataclasses.replace(mapped, label_logprob=None)

        def place(values: torch.Tensor, fill: float = 0) -> torch.Tensor:
            out = values.new_full((length, *values.shape[1:]), fill)
            out[slots] = values
            return out

        spread = mapped.spread(slots, length)
        unkept = targets.log_tail
        return AlignedTargets(
            **{each.name: getattr(spread, each.name) for each in dataclasses.fields(spread)},
            foreign=place(foreign, -torch.inf),
            unkept=None if unkept is None else place(unkept[torch.from_numpy(labels.teacher[:, 0])]),
            chunk_length=place(torch.from_numpy(labels.student[:, 1] - labels.student[:, 0])),
            chunk_logprob=place(_sums(targets.label_logprob, labels.teacher)),
            chunk_bytes=place(torch.from_numpy(labels.size)),
            label_bytes=torch.from_numpy(label_bytes),
            overlap=self.vocabularies.overlap,
        )


def _sums(label_logprob: torch.Tensor | None, labels: NDArray[np.int64]) -> torch.Tensor:
    """`[C]` the log-likelihood of each chunk, summed over its labels alone; NaN where that is unknown."""
    if label_logprob is None:
        return torch.full((len(labels),), torch.nan)
    lengths = labels[:, 1] - labels[:, 0]
    chunk = torch.from_numpy(np.repeat(np.arange(len(labels)), lengths))
    starts = np.repeat(labels[:, 0] - (np.cumsum(lengths) - lengths), lengths)
    members = torch.from_numpy(starts + np.arange(int(lengths.sum())))
    return label_logprob.new_zeros(len(labels)).index_add_(0, chunk, label_logprob[members])


@dataclass(frozen=True)
class AlignedRows:
    """A cache, read as rows of a student with another tokenizer.

    Attributes:
        cache: where the rows are.
        alignment: of its tokenizer and the student's.
        longest: tokens of a context that the student takes; None if any.
    """

    cache: Cache
    alignment: Alignment
    longest: int | None = field(default=None)

    @property
    def manifest(self) -> Manifest:
        """Of the cache."""
        return self.cache.manifest

    @cached_property
    def row_spec(self) -> RowSpec:
        """The shape of the student's rows: as long as those of the cache where the tokens are the same."""
        spec = dataclasses.replace(self.cache.manifest.row_spec, vocab_size=self.alignment.student.vocab_size)
        return spec if self.alignment.vocabularies.alike else dataclasses.replace(spec, ragged=True)

    def read_packed(self, index: int) -> tuple[PackedRow, AlignedTargets]:
        """A row in the student's tokens, without padding, and the targets of its labelled slots.

        Raises:
            ModelError: the student cannot be given its text.
        """
        return self._aligned(index, *self.cache.read_packed(index))

    def read_rows(self, indices: Iterable[int]) -> Iterator[tuple[PackedRow, AlignedTargets]]:
        """The same of several rows, in their order."""
        numbers = list(indices)
        for index, found in zip(numbers, self.cache.read_rows(numbers), strict=True):
            yield self._aligned(index, *found)

    def require_aligned(self) -> None:
        """Try some rows, evenly spread over the cache.

        Raises:
            ConfigError: no chunk begins in any of them.
            ModelError: the student cannot be given the text of one.
        """
        rows = self.read_rows(spread_rows(range(len(self.cache)), _TRIED_ROWS))
        if not sum(int(targets.has_target.sum()) for _, targets in rows):
            raise ConfigError(
                f"the tokenizers of the cache {self.cache.storage} and of the student {self.alignment.student.name} "
                "share no byte boundary inside a piece, so there is nothing to align"
            )

    def _aligned(self, index: int, row: PackedRow, targets: SparseTargets) -> tuple[PackedRow, AlignedTargets]:
        try:
            pieces = self._pieces(row)
        except UnencodableError as error:
            raise ModelError(
                f"the tokenizer of the student {self.alignment.student.name} {error}, in row {index} of "
                f"{self.cache.storage}"
            ) from None
        lengths = np.array([len(piece.tokens) for piece in pieces], np.int32)
        made = PackedRow(
            tokens=np.concatenate([np.zeros(0, np.int64), *(piece.tokens for piece in pieces)]).astype(np.int32),
            piece_lengths=lengths[lengths > 0],
            piece_documents=row.piece_documents[lengths > 0],
            supervised=self._supervised(row, pieces),
        )
        self._require_short(index, made)
        return made, self._targets(row, targets, made, pieces)

    def _pieces(self, row: PackedRow) -> list[Piece]:
        ends = np.cumsum(row.piece_lengths)
        bounds = zip((ends - row.piece_lengths).tolist(), ends.tolist(), strict=True)
        return [self.alignment.piece(row.tokens[begin:end]) for begin, end in bounds]

    def _supervised(self, row: PackedRow, pieces: list[Piece]) -> NDArray[np.bool_] | None:
        """`[m]` whether each token of the student has no byte of a token that may be no label."""
        if row.supervised is None or self.alignment.vocabularies.alike:
            return row.supervised
        found, start = [np.zeros(0, bool)], 0
        for piece in pieces:
            units = np.diff(piece.teacher_edges)
            mask = row.supervised[start : start + len(units)]
            start += len(units)
            bad = np.concatenate([[0], np.cumsum(np.repeat(~mask, units))])
            edges = np.maximum.accumulate(piece.edges)
            found.append((bad[edges[1:]] == bad[edges[:-1]]) & (edges[1:] > edges[:-1]))
        return np.concatenate(found)

    def _require_short(self, index: int, row: PackedRow) -> None:
        longest = max((part.stop - part.start for part in self.row_spec.contexts(row)), default=0)
        if self.longest is not None and longest > self.longest:
            raise ModelError(
                f"row {index} of {self.cache.storage} has {longest} tokens of the student in one context, which takes "
                f"{self.longest}; dump with a lower seq_len"
            )

    def _targets(self, row: PackedRow, targets: SparseTargets, made: PackedRow, pieces: list[Piece]) -> AlignedTargets:
        parts, teacher, student = [], 0, 0
        for piece in pieces:
            parts.append(chunks_of(piece).shifted(teacher, student))
            teacher, student = teacher + len(piece.teacher_edges) - 1, student + len(piece.tokens)
        chunks = Chunks.joined(parts)
        theirs, ours = _numbers_of_labels(row), _numbers_of_labels(made)
        has_target = np.zeros(len(row.tokens), bool)
        has_target[theirs >= 0] = (targets.count > 0).numpy()
        good = all_within(chunks.teacher, has_target) & all_within(chunks.student, ours >= 0)
        chunks = chunks.take(good)
        as_labels = Chunks(_of_labels(chunks.teacher, theirs), _of_labels(chunks.student, ours), chunks.size)
        size = np.concatenate([np.zeros(0, np.int64), *map(_bytes_of_tokens, pieces)])
        return self.alignment.targets(targets, as_labels, int((ours >= 0).sum()), size[ours >= 0])


def _numbers_of_labels(row: PackedRow) -> NDArray[np.int64]:
    """`[n]` the number of each token among the labels of a row; -1 of one that is no label."""
    found = np.full(len(row.tokens), -1, np.int64)
    slots = np.flatnonzero(row.labels(len(row.tokens)) != IGNORE)
    found[slots + 1] = np.arange(len(slots))
    return found


def _of_labels(chunks: NDArray[np.int64], numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """`[C, 2]` chunks of tokens as chunks of labels; all of their tokens are labels."""
    first = numbers[chunks[:, 0]]
    return np.stack([first, first + chunks[:, 1] - chunks[:, 0]], -1).reshape(-1, 2)


def _bytes_of_tokens(piece: Piece) -> NDArray[np.int64]:
    """`[m]` bytes of text of each token of the student; a character that several share counts for the first."""
    before = np.concatenate([[0], np.cumsum(piece.text)])
    edges = piece.edges.copy()
    edges[edges < 0] = np.iinfo(np.int64).max
    edges = np.minimum.accumulate(edges[::-1])[::-1]  # what begins inside a character begins where it ends
    return np.diff(before[edges])
