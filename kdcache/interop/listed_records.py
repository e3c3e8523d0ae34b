"""Listed records: records of token ids with a list of entries for each token, which `axolotl` and `topk-jsonl` share.

List t is the distribution that token t was taken from, after the tokens before it: the target of slot t - 1. The first
token of a record is after nothing, so its list says nothing. Tokens are named by their ids, in some tools behind
`token_id:`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from kdcache.interop.foreign_row import ForeignRow
from kdcache.interop.formats import ForeignCache
from kdcache.interop.records import Records, ragged

_PREFIX = "token_id:"


class ListedRecords(ForeignCache):
    """Files of such records. A part is about a megabyte of them.

    Attributes:
        wanted: the columns that are read, where they are there.
    """

    wanted: ClassVar[tuple[str, ...]]

    def __init__(self, path: str, tokens: str | None = None) -> None:  # noqa: ARG002 - they have their own
        self._records = Records(path, self.wanted)

    @property
    def columns(self) -> Sequence[str]:
        """The columns that the files have."""
        return self._records.columns

    def parts(self) -> Sequence[Any]:
        """Parts of files."""
        return self._records.parts()

    def read(self, part: Any) -> Iterator[ForeignRow]:
        """The records of a part."""
        for where, record in self._records.read(part):
            yield self.row(record, where)

    @abstractmethod
    def row(self, record: Mapping[str, Any], where: str) -> ForeignRow:
        """A record as a row.

        Raises:
            CorpusError: it is not of this format.
        """


def token_number(name: Any) -> int:
    """The id of a token that is named by it.

    Raises:
        ValueError: it is named by something else.
    """
    return int(str(name).removeprefix(_PREFIX))


def listed_row(
    tokens: NDArray[np.int64],
    named: Sequence[int],
    ids: Sequence[Sequence[int]],
    values: Sequence[Sequence[float]],
    where: str,
    label_logprob: NDArray[np.float64] | None = None,
) -> ForeignRow:
    """A row of lists of entries.

    Args:
        tokens: `[n]`.
        named: the token, from 1, that each list is of.
        ids, values: the lists.
        where: for messages.
        label_logprob: of each list's token.

    Raises:
        CorpusError: lists that do not go with each other.
    """
    found, numbers, count = ragged(ids, values, where)
    slots = np.array(named, np.int64) - 1
    return ForeignRow(
        tokens=tokens, slots=slots, ids=found, values=numbers, count=count, where=where, label_logprob=label_logprob
    )
