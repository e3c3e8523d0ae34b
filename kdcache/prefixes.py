"""Prefixes: what a teacher reads in front of the pieces of a row, and its student does not.

A teacher may be given a context that its student never sees: a system prompt, a worked example, the answer key. It then
reads a piece as its prefix, followed by the piece without its first `replaced` tokens:

    student   <s> Who is he ?          He is Tom .
    teacher   <s> Tom is here . Who is he ?   He is Tom .      prefix "<s> Tom is here .", 1 token replaced

Both end with the same tokens, so a label of the student has its target where the teacher has read the same ones after
its own context. A cache keeps the prefixes beside the rows, so that its targets can be made again from it alone.
Cost: each prefix stands once in a row, however many pieces it has.

Shapes: P pieces of a row, m tokens of its prefixes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PREFIXES_A_ROW = 8
"""The prefixes of a row have at most as many tokens as so many of the teacher's rows: what reading a row may take."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """What a teacher reads in front of one piece.

    Attributes:
        tokens: `[m]` int32.
        replaced: how many of the piece's first tokens the teacher does not read.
    """

    tokens: NDArray[np.int32]
    replaced: int = 0

    @property
    def content(self) -> bytes:
        """Equal for equal prefixes; empty for one that changes nothing."""
        tokens = self.tokens.astype("<i4").tobytes()
        return tokens + self.replaced.to_bytes(4, "little") if tokens or self.replaced else b""


NO_PREFIX = Prefix(tokens=np.zeros(0, np.int32))
"""Of a piece that the teacher reads as it is."""


@dataclass(frozen=True, kw_only=True)
class Prefixes:
    """What a teacher reads in front of each piece of a row.

    Attributes:
        tokens: `[m]` int32, of different prefixes, one behind the other.
        places: `[P, 3]` int64: where in them the prefix of each piece begins, its length, and how many of the piece's
            first tokens it replaces.
    """

    tokens: NDArray[np.int32]
    places: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, piece: int) -> Prefix:
        start, length, replaced = self.places[piece].tolist()
        return Prefix(tokens=self.tokens[start : start + length], replaced=replaced)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """`[P]` tokens of each."""
        return self.places[:, 1]

    @classmethod
    def of(cls, pieces: Iterable[Prefix]) -> Prefixes:
        """Those of some pieces, each kept once."""
        starts: dict[bytes, int] = {}
        kept: list[NDArray[np.int32]] = []
        places, end = [], 0
        for prefix in pieces:
            content = prefix.tokens.tobytes()
            if content not in starts:
                starts[content] = end
                kept.append(prefix.tokens)
                end += len(prefix.tokens)
            places.append((starts[content], len(prefix.tokens), prefix.replaced))
        tokens = np.concatenate(kept) if kept else NO_PREFIX.tokens
        return cls(tokens=tokens.astype(np.int32), places=np.array(places, np.int64).reshape(-1, 3))

    @staticmethod
    def joined(parts: Sequence[Prefixes | None], pieces: Sequence[int]) -> Prefixes | None:
        """Those of several rows one behind the other, which have so many pieces; None where no row has any."""
        if all(part is None for part in parts):
            return None
        return Prefixes.of(
            prefix
            for part, count in zip(parts, pieces, strict=True)
            for prefix in ([NO_PREFIX] * count if part is None else [part[i] for i in range(count)])
        )
