"""Records: JSON lines, Parquet or Arrow files, or a `save_to_disk` folder, as dicts, in parts worth one read.

What reads a corpus reads these too, so names, folders, globs, URLs and compressed files are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from kdcache.corpus.open_source import open_source
from kdcache.corpus.records import Unreadable
from kdcache.corpus.sources import Part, reason
from kdcache.errors import CorpusError


class Records:
    """Records of files.

    Attributes:
        columns: the columns that the files have (of JSON, those of the first records).

    Args:
        path: a file, folder, glob or URL.
        columns: to read, where they are there.

    Raises:
        CorpusError: nothing there, or files that cannot be read.
    """

    def __init__(self, path: str, columns: Sequence[str]) -> None:
        self._path = path
        with _Named(path):
            self._source, self.columns = open_source(path, "train", "line")
        if self._source.plain:
            raise CorpusError(f"{path} is a text file, and no file of records")
        self._source.choose(tuple(name for name in columns if name in self.columns))

    def parts(self) -> list[Part]:
        """Files cut into parts."""
        found = []
        with _Named(self._path):
            for file in range(len(self._source.files)):
                at = self._source.begin(file)
                while (end := self._source.cut(file, at)) > at:
                    found.append((file, at, end))
                    at = end
        return found

    def read(self, part: Part) -> Iterator[tuple[str, dict[str, Any]]]:
        """The place and the columns of each record of a part.

        Raises:
            CorpusError: one that cannot be read.
        """
        with _Named(self._path):
            records, addresses = self._source.read(*part)
        name = self._source.files[part[0]].name
        for record, address in zip(records, addresses, strict=True):
            where = f"the record at {address} of {name}"
            if not isinstance(record, dict):
                raise CorpusError(f"{where} is {record.reason if isinstance(record, Unreadable) else 'a text'}")
            yield where, record


class _Named:
    """Turns what libraries raise into one sentence."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, at: Any) -> None:
        if isinstance(error, pa.ArrowException | OSError | ValueError | KeyError):
            raise CorpusError(f"{self._path} cannot be read: {reason(error)}") from error


def integers(value: Any, where: str, name: str) -> NDArray[np.int64]:
    """A list of integers.

    Raises:
        CorpusError: it is something else.
    """
    try:
        found = np.asarray(value)
    except ValueError:
        found = np.empty(0, object)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise CorpusError(f"{where} has no list of integers as {name}")
    return found.astype(np.int64)


def ragged(
    ids: Sequence[Sequence[int]], values: Sequence[Sequence[float]], where: str
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Lists of entries as arrays `[m, K]` of ids and values, and `[m]` their counts.

    Raises:
        CorpusError: lists of different lengths, or of something else than numbers.
    """
    count = np.array([len(each) for each in ids], np.int64)
    width = int(count.max(initial=1))
    found = np.zeros((len(count), width), np.int64), np.full((len(count), width), -np.inf)
    try:
        if [len(each) for each in values] != count.tolist():
            raise CorpusError(f"{where} has other numbers of ids than of log-probabilities")
        used = np.arange(width) < count[:, None]
        found[0][used] = np.array([i for each in ids for i in each], np.int64)
        found[1][used] = np.array([v for each in values for v in each], np.float64)
    except (TypeError, ValueError, OverflowError):
        raise CorpusError(f"{where} has entries that are no numbers") from None
    return *found, count
