"""Tables: documents of Parquet and Arrow files, and of what `datasets` opens, found by row.

Guarantee: only the wanted columns are read; a row whose text is not UTF-8 is given as unreadable, and refuses no other.
Cost: Arrow files on a disk and `datasets` tables are memory-mapped, any row in O(1). A Parquet file is read from the
start of the row group of a row, and read on from where the last read ended. Arrow files behind a URL or inside a
compression are read from their start, and on: forward reads cost one pass together.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa

from kdcache.corpus.file_bytes import FileBytes, as_file, as_ranges, naming
from kdcache.corpus.find_files import DataFile, names_of
from kdcache.corpus.plan import CorpusFile
from kdcache.corpus.records import Record, Unreadable
from kdcache.corpus.text_files import END, Addresses

_BATCH = 4096
_MAGIC = b"ARROW1"


class Table:
    """A table of one or several files. An address is a row.

    Attributes:
        files: their names and sizes.
        total: bytes of all files, about.
        plain: whether these are files of text, without fields.
        fills_nulls: whether records have nulls, at any depth, for what their writer never gave.
    """

    plain = False
    fills_nulls = True

    def __init__(self, files: tuple[CorpusFile, ...]) -> None:
        self.files = files
        self.total = sum(file.size for file in files)
        self._columns: tuple[str, ...] = ()

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

    def unit(self, file: int, at: int) -> int:
        """The end of what one of several processes reads for itself: a few reads, or what has to be read together."""
        end = self._end(file)
        return min(end, at + 4 * self._step(file, end))

    def cut(self, file: int, at: int) -> int:
        """The end of the documents that are worth one read; `at` itself where no document follows."""
        end = self._end(file)
        return min(end, at + self._step(file, end))

    def _end(self, file: int) -> int:
        """The rows of a file."""
        raise NotImplementedError

    def _step(self, file: int, rows: int) -> int:
        """Rows that are worth one read: about a megabyte of them."""
        return max(1, min(_BATCH, (rows << 20) // max(1, self.files[file].size)))

    def read(self, file: int, start: int, stop: int) -> tuple[list[Record], Addresses]:
        """The documents between two addresses, and the address of each.

        Returns:
            The columns that were chosen and are not null, of each row.
        """
        records: list[Record] = []
        for batch in self._batches(file, start, stop):
            try:
                records += _records(batch)
            except UnicodeDecodeError:
                records += [
                    self._one_record(file, start + len(records) + row, batch.slice(row, 1)) for row in range(len(batch))
                ]
        return records, range(start, start + len(records))

    def _one_record(self, file: int, row: int, batch: pa.RecordBatch) -> Record:
        for column in batch.schema.names:
            try:
                batch.column(column).to_pylist()
            except UnicodeDecodeError as error:
                reason = f"not UTF-8: row {row} of {self.files[file].name}, column {column!r}, {error.reason}"
                return Unreadable(batch.take([0]).serialize().to_pybytes(), reason)
        return _records(batch)[0]

    def _batches(self, file: int, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """The rows between two addresses, with the columns that were chosen and are there."""
        raise NotImplementedError


def _records(batch: pa.RecordBatch) -> list[Record]:
    """A dict of each row, without the columns that are null."""
    names, columns = batch.schema.names, [column.to_pylist() for column in batch.columns]
    if not columns:
        return [{} for _ in range(len(batch))]
    if len(columns) == 1:
        return [{names[0]: value} if value is not None else {} for value in columns[0]]
    return [
        {name: value for name, value in zip(names, values, strict=True) if value is not None}
        for values in zip(*columns, strict=True)
    ]


class _Forward:
    """Batches of rows that are read forward, and the place that they have come to.

    Attributes:
        first: the row with which the current batch begins; nothing before it can be read any more.
    """

    def __init__(self, first: int, batches: Iterator[pa.RecordBatch]) -> None:
        self.first, self._batches = first, batches
        self._batch: pa.RecordBatch | None = None

    def end(self, at: int) -> int:
        """The end of the batch that holds a row, or the last row before the end of all."""
        while self._batch is None or self.first + len(self._batch) <= at:
            if self._batch is not None:
                self.first += len(self._batch)
            self._batch = next(self._batches, None)
            if self._batch is None:
                return self.first
        return self.first + len(self._batch)

    def rows(self, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        """The rows from one that does not lie before `first` to another, in parts of batches."""
        while start < stop and (end := min(stop, self.end(start))) > start:
            assert self._batch is not None
            yield self._batch.slice(start - self.first, end - start)
            start = end


class ParquetFiles(Table):
    """Parquet files. A row group is read by one process."""

    def __init__(self, data: Sequence[DataFile]) -> None:
        super().__init__(names_of(data))
        self._data = data
        self._open: tuple[int, Any, list[int]] = (-1, None, [0])
        self._forward: tuple[int, int, _Forward] | None = None

    def _file(self, file: int) -> tuple[Any, list[int]]:
        """An open file, and the rows with which its groups begin and the last one ends."""
        if self._open[0] != file:
            import pyarrow.parquet as parquet

            data = self._data[file]
            with naming(data.path):
                source = pa.PythonFile(as_ranges(data.open()), mode="r") if data.remote else data.path
                opened = parquet.ParquetFile(source, pre_buffer=data.remote)  # a group's columns in few requests
            groups = (opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups))
            self._open = file, opened, [0, *itertools.accumulate(groups)]
        return self._open[1], self._open[2]

    @property
    def schema(self) -> pa.Schema:
        return self._file(0)[0].schema_arrow

    def choose(self, columns: tuple[str, ...]) -> None:
        super().choose(columns)
        self._forward = None

    def _end(self, file: int) -> int:
        return self._file(file)[1][-1]

    def unit(self, file: int, at: int) -> int:
        ends = self._file(file)[1]
        return ends[min(bisect.bisect_right(ends, at), len(ends) - 1)]

    def _batches(self, file: int, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        ends = self._file(file)[1]
        group = bisect.bisect_right(ends, start) - 1
        if self._forward is None or self._forward[:2] != (file, group) or start < self._forward[2].first:
            self._forward = file, group, _Forward(ends[group], self._groups(file, group))
        forward = self._forward[2]
        yield from forward.rows(start, stop)
        self._forward = file, bisect.bisect_right(ends, stop) - 1, forward

    def _groups(self, file: int, group: int) -> Iterator[pa.RecordBatch]:
        """The row groups from one on, each read when it is come to."""
        opened = self._file(file)[0]
        there = set(opened.schema_arrow.names)
        columns = [column for column in self._columns if column in there]
        with naming(self._data[file].path):
            for number in range(group, opened.num_row_groups):
                yield from opened.iter_batches(_BATCH, row_groups=[number], columns=columns, use_threads=False)


class ArrowFiles(Table):
    """Arrow IPC files or streams on a disk, memory-mapped."""

    def __init__(self, data: Sequence[DataFile]) -> None:
        super().__init__(names_of(data))
        self._data = data
        self._open: tuple[int, Any] = (-1, None)

    def _reader(self, file: int, columns: Sequence[str] | None) -> Any:
        """An open file, of these columns alone."""
        with naming(self._data[file].path):
            source = pa.memory_map(self._data[file].path)
            options = None if columns is None else _only(self._reader(file, None).schema, columns)
            try:
                return pa.ipc.open_file(source, options=options)
            except pa.ArrowInvalid:
                source.seek(0)
                return pa.ipc.open_stream(source, options=options)

    def _table(self, file: int) -> Any:
        if self._open[0] != file:
            with naming(self._data[file].path):
                self._open = file, self._reader(file, self._columns).read_all()
        return self._open[1]

    @property
    def schema(self) -> pa.Schema:
        return self._reader(0, None).schema

    def choose(self, columns: tuple[str, ...]) -> None:
        super().choose(columns)
        self._open = (-1, None)

    def _end(self, file: int) -> int:
        return int(self._table(file).num_rows)

    def _batches(self, file: int, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        yield from self._table(file).slice(start, stop - start).to_batches()


class ArrowStreams(Table):
    """Arrow IPC files or streams that cannot be mapped, read from start to end. A file is read by one process."""

    def __init__(self, data: Sequence[DataFile]) -> None:
        super().__init__(names_of(data))
        self._data = data
        self._forward: tuple[int, _Forward] | None = None
        self._open: tuple[int, FileBytes] | None = None

    def _reader(self, file: int) -> Any:
        if self._open is None or self._open[0] != file:
            self._open = file, self._data[file].open()
        stream = as_file(self._open[1])
        with naming(self._data[file].path):
            if stream.peek(len(_MAGIC)).startswith(_MAGIC):  # a file is a stream between its magic and its footer
                stream.read(8)
            return pa.ipc.open_stream(pa.PythonFile(stream, mode="r"))

    @cached_property
    def schema(self) -> pa.Schema:
        return self._reader(0).schema

    def choose(self, columns: tuple[str, ...]) -> None:
        super().choose(columns)
        self._forward = None

    def unit(self, file: int, at: int) -> int:  # noqa: ARG002 - a file is one unit
        return END

    def cut(self, file: int, at: int) -> int:
        return min(at + _BATCH, self._from(file, at).end(at))

    def _from(self, file: int, at: int) -> _Forward:
        if self._forward is None or self._forward[0] != file or at < self._forward[1].first:
            self._forward = file, _Forward(0, self._all(file))
        return self._forward[1]

    def _all(self, file: int) -> Iterator[pa.RecordBatch]:
        reader = self._reader(file)
        there = set(reader.schema.names)
        with naming(self._data[file].path):
            for batch in reader:
                yield batch.select([column for column in self._columns if column in there])

    def _batches(self, file: int, start: int, stop: int) -> Iterator[pa.RecordBatch]:
        yield from self._from(file, start).rows(start, stop)


def _only(schema: pa.Schema, columns: Sequence[str]) -> pa.ipc.IpcReadOptions:
    return pa.ipc.IpcReadOptions(included_fields=[i for i, name in enumerate(schema.names) if name in columns])


class DatasetTable(Table):
    """One table that `datasets` has opened."""

    def __init__(self, table: Any, name: str) -> None:
        self._table = table.with_format(None)  # plain Python values, whatever format it was saved with
        super().__init__((CorpusFile(name=name, size=len(table)),))
        self.total = int(table.data.nbytes)

    def _step(self, file: int, rows: int) -> int:  # noqa: ARG002 - there is one
        return max(1, min(_BATCH, (rows << 20) // max(1, self.total)))

    @property
    def schema(self) -> pa.Schema:
        return self._table.features.arrow_schema

    def choose(self, columns: tuple[str, ...]) -> None:
        super().choose(columns)
        self._table = self._table.select_columns(list(columns))

    def _end(self, file: int) -> int:  # noqa: ARG002 - there is one
        return len(self._table)

    def read(self, file: int, start: int, stop: int) -> tuple[list[Record], Addresses]:
        try:
            records = self._rows(start, stop)
        except UnicodeDecodeError:
            records = [self._row(file, row) for row in range(start, stop)]
        return records, range(start, start + len(records))

    def _rows(self, start: int, stop: int) -> list[Record]:
        """Rows as `datasets` decodes them, which knows types that Arrow does not."""
        batch = self._table[start:stop]
        return [
            {name: value for name, value in zip(batch, values, strict=True) if value is not None}
            for values in zip(*batch.values(), strict=True)
        ]

    def _row(self, file: int, row: int) -> Record:
        try:
            return self._rows(row, row + 1)[0]
        except UnicodeDecodeError:
            (batch,) = self._table.with_format("arrow")[row : row + 1].to_batches()
            return self._one_record(file, row, batch)
