"""The plan of a cache: which documents each shard holds, where they begin in the corpus, and what they are.

Whoever creates a cache makes the plan from one pass over the corpus. Every other worker reads it, so it finds the
documents of its shards without reading any others, and knows when they are not the ones that were planned.
Cost: 68 bytes a shard.

Shapes: S shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcache.errors import CorpusError

Address = tuple[int, int]
"""Index of a file of the corpus, and a place in it: a byte of a text file, a row of a table."""


@dataclass(frozen=True, kw_only=True)
class CorpusFile:
    """A file of a corpus.

    Attributes:
        name: relative to the folder that all files of the corpus have in common.
        size: bytes; of a table that is no file, its rows.
    """

    name: str
    size: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """The shards of a cache.

    Attributes:
        first, last: `[S]` int64, first and last document of each shard; together all documents in order.
        characters: `[S]` int64, length of the documents of each; tokens where the corpus is tokenised.
        sha256: `[S, 32]` uint8, sha256 over the sha256 of each of its documents, in order.
        file, offset: `[S]` int32 and int64, the address of its first document.
        files: the files of the corpus, in the order in which they are read.
        reading: how the files become documents: `form`, `columns`, `split` and `split_text`.
        rule: what decides where a shard ends: `{"docs_per_shard": n}` or `{"chars_per_shard": n}`.
    """

    first: NDArray[np.int64]
    last: NDArray[np.int64]
    characters: NDArray[np.int64]
    sha256: NDArray[np.uint8]
    file: NDArray[np.int32]
    offset: NDArray[np.int64]
    files: tuple[CorpusFile, ...]
    reading: dict[str, Any]
    rule: dict[str, int]

    def __len__(self) -> int:
        return len(self.first)

    @property
    def documents(self) -> int:
        """Documents in all shards."""
        return int(self.last[-1]) + 1

    def documents_of(self, shard: int) -> int:
        """Documents of a shard."""
        return int(self.last[shard] - self.first[shard]) + 1

    def start(self, shard: int) -> Address:
        """Where the first document of a shard begins; for the number after the last shard, the end of the corpus."""
        if shard == len(self):
            return len(self.files), 0
        return int(self.file[shard]), int(self.offset[shard])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        pairs = [(value, getattr(other, name)) for name, value in vars(self).items()]
        return all(np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]

    def require_corpus(self, files: tuple[CorpusFile, ...], reading: dict[str, Any], name: str) -> None:
        """Refuse a corpus of other files, or one that is read in another way.

        Raises:
            CorpusError: naming the first difference.
        """
        problem = f"the corpus {name} is not the one that the cache was created from"
        for mine, theirs in zip(self.files, files, strict=False):
            if mine.name != theirs.name:
                raise CorpusError(f"{problem}: it has a file {theirs.name} where that had {mine.name}")
            if mine.size != theirs.size:
                raise CorpusError(f"{problem}: {mine.name} has a size of {theirs.size:,}, not {mine.size:,}")
        if len(self.files) != len(files):
            raise CorpusError(f"{problem}: it has {len(files)} files, not {len(self.files)}")
        for field, value in self.reading.items():
            if reading.get(field) != value:
                raise CorpusError(f"{problem}: its {field} is {reading.get(field)!r}, not {value!r}")
