"""Tables: documents of Parquet and Arrow files, and of what `datasets` opens, found by row.

Cost: Arrow files and `datasets` tables are memory-mapped, any row in O(1); of a Parquet file the row group of a row
is read.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa

from kdcache.corpus.plan import CorpusFile
from kdcache.corpus.text_files import Addresses


class Table:
    """A table of one or several files. An address is a row.

    Attributes:
        files: their names and sizes.
        total: bytes of all files, about.
    """

    fills_nulls = True

    def __init__(self, files: tuple[CorpusFile, ...]) -> None:
        self.files = files
        self.total = sum(file.size for file in files)
        self._columns: tuple[str, ...] = ()

    @cached_property
    def step(self) -> int:
        """Rows that are worth one read: about a megabyte of them."""
        return max(1, min(4096, (self.end(0) << 20) // max(1, self.files[0].size)))

    @property
    def schema(self) -> pa.Schema:
        """The columns and their types."""
        raise NotImplementedError

    def choose(self, columns: tuple[str, ...]) -> None:
        """Read these columns."""
        self._columns = columns

    def begin(self, file: int) -> int:  # noqa: ARG002 - of text files it depends on the file
        """The address of the first document of a file."""
        return 0

    def end(self, file: int) -> int:
        """The address behind the last document of a file."""
        raise NotImplementedError

    def cut(self, file: int, at: int) -> int:
        """The first address from `at` on at which reading may stop."""
        return min(at, self.end(file))

    def read(self, file: int, start: int, stop: int) -> tuple[list[Any], Addresses]:
        """The documents between two addresses, and the address of each.

        Returns:
            The value of the column, or a tuple where there are several.
        """
        columns = self._values(file, start, stop)
        rows = zip(*columns, strict=True)
        return [{c: v for c, v in zip(self._columns, row, strict=True) if v is not None} for row in rows], range(
            start, stop
        )

    def _values(self, file: int, start: int, stop: int) -> list[list[Any]]:
        """The values of each column."""
        raise NotImplementedError


class ParquetFiles(Table):
    """Parquet files; reading stops at the end of a row group where one is near."""

    def __init__(self, paths: Sequence[str], files: tuple[CorpusFile, ...]) -> None:
        super().__init__(files)
        self._paths, self._open = paths, (-1, None, [0])

    def _file(self, file: int) -> tuple[Any, list[int]]:
        if self._open[0] != file:
            import pyarrow.parquet as parquet

            opened = parquet.ParquetFile(self._paths[file])
            groups = (opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups))
            self._open = file, opened, [0, *itertools.accumulate(groups)]
        return self._open[1], self._open[2]

    @property
    def schema(self) -> pa.Schema:
        return self._file(0)[0].schema_arrow

    def end(self, file: int) -> int:
        return self._file(file)[1][-1]

    def cut(self, file: int, at: int) -> int:
        ends = self._file(file)[1]
        return min(ends[bisect.bisect_left(ends, at)] if at < ends[-1] else ends[-1], at + 15 * self.step)

    def _values(self, file: int, start: int, stop: int) -> list[list[Any]]:
        opened, ends = self._file(file)
        groups = range(bisect.bisect_right(ends, start) - 1, bisect.bisect_left(ends, stop))
        columns: list[list[Any]] = [[] for _ in self._columns]
        at = ends[groups[0]] if groups else start
        for batch in opened.iter_batches(4096, row_groups=list(groups), columns=list(self._columns), use_threads=False):
            part = batch.slice(max(0, start - at), max(0, min(len(batch), stop - at) - max(0, start - at)))
            for values, column in zip(columns, self._columns, strict=True):
                values.extend(part.column(column).to_pylist())
            at += len(batch)
            if at >= stop:
                break
        return columns


class ArrowFiles(Table):
    """Arrow IPC files or streams, memory-mapped."""

    def __init__(self, paths: Sequence[str], files: tuple[CorpusFile, ...]) -> None:
        super().__init__(files)
        self._paths, self._open = paths, (-1, None)

    def _table(self, file: int) -> Any:
        if self._open[0] != file:
            source = pa.memory_map(self._paths[file])
            try:
                table = pa.ipc.open_file(source).read_all()
            except pa.ArrowInvalid:
                source.seek(0)
                table = pa.ipc.open_stream(source).read_all()
            self._open = file, table
        return self._open[1]

    @property
    def schema(self) -> pa.Schema:
        return self._table(0).schema

    def end(self, file: int) -> int:
        return int(self._table(file).num_rows)

    def _values(self, file: int, start: int, stop: int) -> list[list[Any]]:
        part = self._table(file).slice(start, stop - start)
        return [part.column(column).to_pylist() for column in self._columns]


class DatasetTable(Table):
    """One table that `datasets` has opened."""

    def __init__(self, table: Any, name: str) -> None:
        self._table = table.with_format(None)  # plain Python values, whatever format it was saved with
        super().__init__((CorpusFile(name=name, size=len(table)),))
        self.total = int(table.data.nbytes)

    @cached_property
    def step(self) -> int:
        return max(1, min(4096, (len(self._table) << 20) // max(1, self.total)))

    @property
    def schema(self) -> pa.Schema:
        return self._table.features.arrow_schema

    def choose(self, columns: tuple[str, ...]) -> None:
        super().choose(columns)
        self._table = self._table.select_columns(list(columns))

    def end(self, file: int) -> int:  # noqa: ARG002 - there is one
        return len(self._table)

    def _values(self, file: int, start: int, stop: int) -> list[list[Any]]:  # noqa: ARG002 - there is one
        batch = self._table[start:stop]
        return [list(batch[column]) for column in self._columns]
