"""Text files: documents of plain text and of JSON, found by byte offset.

Guarantee: the same bytes give the same documents, wherever a file is cut for reading: a cut is moved to the next place
where a document may begin. Lines end with `\\n`, `\\r\\n` or `\\r`; a byte order mark that begins a file is no text.
Bytes that are no document are given as such, with the reason, and refuse no other.
Cost: reading is one range of the file (see `file_bytes`), one pass of numpy over the bytes, and one Python step a
document. Where no byte tells that a document may begin (values of a JSON array), one more pass finds them from a known
start, and only one process reads the file.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from kdcache.corpus.file_bytes import FileBytes
from kdcache.corpus.find_files import DataFile, names_of
from kdcache.corpus.json_records import parse_record, value_spans, wanted_of
from kdcache.corpus.records import Record, Unreadable, is_nested_too_deeply
from kdcache.errors import CorpusError

Addresses = Sequence[int] | NDArray[np.int64]

END = 1 << 62
"""An address behind every document, for the end of a file that nobody knows yet."""

_MARK = b"\xef\xbb\xbf"
_OTHER_MARKS = (b"\xff\xfe", b"\xfe\xff")
_UNPACKED = 4
"""Bytes of text in a byte of a compressed file, about; it decides nothing but sizes that are guessed."""

_REMOTE_STEPS = 8
"""Steps that are one read of a file behind a URL, where a request takes as long as some megabytes."""

_ARRAY = re.compile(rb"\s*\[(?=\s*[\[{\]])")
_WINDOW = 1 << 14
_SNIFFED = 1 << 20

_ENDS = {
    "record": re.compile(rb"\n"),
    "line": re.compile(rb"\r\n|\r(?!\n)|\n"),
    "paragraph": re.compile(rb"(?:\r\n|\r(?!\n)|\n)[ \t\x0b\x0c\x1c-\x1f]*(?:\r\n|\r(?!\n)|\n)"),
}
"""Behind which bytes a document may begin, by what a document is."""

_SPACE = np.isin(np.arange(256), [*b"\t\n\x0b\x0c\r\x1c\x1d\x1e\x1f ", 0xC2, 0xE1, 0xE2, 0xE3])
"""Bytes with which a line may begin that is blank: white space, and the first byte of white space beyond ASCII."""


class TextFiles:
    """Files of plain text or of JSON. An address is a byte of the text, decompressed.

    JSON is lines, an array, or values one behind the other; a name says that it is lines, or the file is looked at.

    Attributes:
        files: their names and sizes.
        step: bytes that are worth one read.
        total: bytes of all files, about.
    """

    step = 1 << 20
    fills_nulls = False

    def __init__(self, data: Sequence[DataFile], document: str) -> None:
        """Take files of text.

        Args:
            data: the files.
            document: what a document is: `paragraph`, `line`, `file`, or a `record` of JSON.
        """
        self._data, self.files, self._document = data, names_of(data), document
        self.total = sum(file.size * (_UNPACKED if file.compression else 1) for file in data)
        self._columns: tuple[str, ...] = ()
        self._open: tuple[int, FileBytes] | None = None
        self._starts: dict[int, tuple[str, int]] = {}

    @property
    def plain(self) -> bool:
        """Whether these are files of text, without fields."""
        return self._document != "record"

    def choose(self, columns: tuple[str, ...]) -> None:
        """Read these fields of each record, and not its text."""
        self._columns = columns

    def names(self) -> list[str]:
        """Fields of the first records that are any, in order.

        Raises:
            CorpusError: there are only records that cannot be read.
        """
        refused = None
        for file in range(len(self.files)):
            start = self.begin(file)
            found: dict[str, None] = {}
            data = self._between(file, start, self.cut(file, start))
            for record in self._read_records(file, start, data, None)[0]:
                if isinstance(record, Unreadable):
                    refused = refused or record
                else:
                    found |= dict.fromkeys(record)
            if found:
                return list(found)
        if refused:
            raise CorpusError(f"the corpus cannot be read: {refused.reason}")
        return []

    def _bytes(self, file: int) -> FileBytes:
        if self._open is None or self._open[0] != file:
            self._open = file, self._data[file].open()
        return self._open[1]

    def _form(self, file: int) -> tuple[str, int]:
        """What a document of a file is, and where the first begins."""
        if file not in self._starts:
            head = self._bytes(file).read(0, len(_MARK) if self.plain else _SNIFFED)
            if head.startswith(_OTHER_MARKS):
                raise CorpusError(f"the corpus file {self._data[file].path} is UTF-16 or UTF-32, not UTF-8")
            start = len(_MARK) if head.startswith(_MARK) else 0
            form = self._document
            if form == "record":
                form, start = _json_form(head, start, self._data[file].lines)
            self._starts[file] = form, start
        return self._starts[file]

    def begin(self, file: int) -> int:
        """The address of the first document of a file."""
        return self._form(file)[1]

    def unit(self, file: int, at: int) -> int:
        """The end of what one of several processes reads for itself: a few megabytes, or all of a file with no ranges.

        Args:
            file: in which it lies.
            at: where a document begins.
        """
        form = self._form(file)[0]
        if self._data[file].compression or form in ("array", "value"):
            return END
        least = 2 * self._step(file)
        return self._line_cut(file, form, at, least, min(at + least, self._data[file].size))

    def cut(self, file: int, at: int) -> int:
        """The end of the documents that are worth one read; `at` itself where no document follows.

        Args:
            file: in which they lie.
            at: where the first begins.
        """
        form = self._form(file)[0]
        if form in ("array", "value"):
            return self._value_cut(file, at)
        least, data = self._step(file), self._data[file]
        # What is read from the start of the documents on is there when they are read; a disk needs no such care.
        base = at if data.compression or data.remote else min(at + least, data.size)
        return self._line_cut(file, form, at, least, base)

    def _step(self, file: int) -> int:
        return self.step * (_REMOTE_STEPS if self._data[file].remote else 1)

    def _line_cut(self, file: int, form: str, at: int, least: int, base: int) -> int:
        """The first place beyond `least` bytes at which a document may begin, or the end; read from `base` on."""
        data, window = self._bytes(file), _WINDOW
        if form == "file" and data.size is not None:
            return data.size
        while True:
            seen = data.read(base, at + least + window)
            ended = base + len(seen) < at + least + window
            found = None if form == "file" else _ENDS[form].search(seen, at + least - base)
            if found and (found.end() < len(seen) or ended):
                return base + found.end()
            if ended:
                return base + len(seen)
            window *= 4

    def _value_cut(self, file: int, at: int) -> int:
        data, size = self._bytes(file), self._step(file)
        while True:
            seen = data.read(at, at + size)
            ended = len(seen) < size
            spans = value_spans(seen, ended)
            if ended or spans:
                return at + (len(seen) if ended else spans[-1][1])
            size *= 4

    def read(self, file: int, start: int, stop: int) -> tuple[list[Record], Addresses]:
        """The documents between two addresses, and the address of each.

        Returns:
            Texts of plain text files; of records, the columns that were chosen.

        Raises:
            CorpusError: a file that cannot be read, or is shorter now.
        """
        form, data = self._form(file)[0], self._between(file, start, stop)
        if not self.plain:
            return self._read_records(file, start, data, self._columns)
        returns = b"\r" in data
        spans = [(0, len(data))] if form == "file" else _spans(data, form, returns)
        texts: list[Record] = []
        for a, b in spans:
            try:
                texts.append(data[a:b].decode())
            except UnicodeDecodeError as error:
                texts.append(Unreadable(data[a:b], f"not UTF-8: {self._where(file, start + a)}, {error.reason}"))
        if returns:
            texts = [_with_newlines(text) if isinstance(text, str) else text for text in texts]
        return texts, [start + a for a, _ in spans]

    def _where(self, file: int, at: int) -> str:
        return f"byte {at} of {self.files[file].name}"

    def _between(self, file: int, start: int, stop: int) -> bytes:
        data = self._bytes(file).read(start, stop)
        if len(data) < stop - start:
            raise CorpusError(f"the corpus file {self._data[file].path} ends before byte {stop:,}")
        return data

    def digest(self, file: int, start: int, stop: int) -> tuple[bytes, NDArray[np.int64], NDArray[np.int64]] | None:
        """The sha256 of the UTF-8 of each text between two addresses, one behind the other, and lengths and addresses.

        Of records, the text is the first of the columns that were chosen.
        The texts are not kept together, so one stays in a core's own cache while it is looked at. Text of plain files
        is hashed as it lies there.

        Returns:
            None for documents that are not texts, or have to be looked at more closely: `read` says what they are.
        """
        form, data = self._form(file)[0], self._between(file, start, stop)
        try:
            found = self._digest_spans(data, form) if self.plain else self._digest_records(data, form)
        except (UnicodeError, orjson.JSONDecodeError, AttributeError, LookupError, TypeError):
            return None
        if found is None:
            return None
        sha256, lengths, starts = found
        return b"".join(sha256), np.array(lengths, np.int64), start + np.asarray(starts, np.int64)

    def _digest_spans(self, data: bytes, form: str) -> tuple[list[bytes], list[int], Addresses] | None:
        if b"\r" in data:
            return None
        spans = [(0, len(data))] if form == "file" else _spans(data, form, False)
        sha256, digests, lengths = hashlib.sha256, [], []
        for a, b in spans:
            text = data[a:b]
            digests.append(sha256(text).digest())
            lengths.append(b - a if text.isascii() else len(text.decode()))
        return digests, lengths, [a for a, _ in spans]

    def _digest_records(self, data: bytes, form: str) -> tuple[list[bytes], list[int], Addresses] | None:
        column, sha256, loads = self._columns[0], hashlib.sha256, orjson.loads
        digests, lengths = [], []
        records, starts = _records(data, form)
        for record in records:
            text = loads(record)[column]
            digests.append(sha256(text.encode()).digest())
            lengths.append(len(text))
        return digests, lengths, starts

    def _read_records(
        self, file: int, base: int, data: bytes, columns: tuple[str, ...] | None
    ) -> tuple[list[Record], Addresses]:
        form = self._form(file)[0]
        found, starts = _records(data, form)
        records: list[Record]
        with suppress(orjson.JSONDecodeError, AttributeError):  # a blank line, or a record to be looked at more closely
            if columns is not None:
                records = [wanted_of(orjson.loads(record), columns) for record in found]
                if not any(map(is_nested_too_deeply, records)):
                    return records, base + starts
        found = _records(data, form)[0]
        filled = [(at, record) for at, record in zip(starts.tolist(), found, strict=True) if record.strip()]
        records = [parse_record(each.rstrip(b"\r\n"), columns, self._where(file, base + at)) for at, each in filled]
        return records, base + np.array([at for at, _ in filled], np.int64)


def _json_form(head: bytes, start: int, lines: bool) -> tuple[str, int]:
    """How records stand in a JSON file, and where the first begins.

    Args:
        head: the first bytes of the file.
        start: how many of them are a byte order mark.
        lines: whether the name of the file says that each line is a record.

    Returns:
        `record` where each line is one, `array` for the values of an array, `value` for values one behind the other.
    """
    found = _ARRAY.match(head, start)
    if found:
        first, _, rest = head[start:].lstrip().partition(b"\n")
        listed = rest.strip().startswith(b"[") and isinstance(_loaded(first), list)  # each line an array of its own
        return ("record", start) if listed else ("array", found.end())
    if lines or any(line.startswith(b"{") and isinstance(_loaded(line), dict) for line in head[start:].split(b"\n")):
        return "record", start
    return "value", start


def _loaded(data: bytes) -> Any:
    """What some bytes are as JSON; None if they are none."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return None


def _with_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _records(data: bytes, form: str) -> tuple[Iterable[bytes], NDArray[np.int64]]:
    """Each record, a line with its end and blank ones included, or a value, and where each begins."""
    if form != "record":
        spans = value_spans(data, True)
        return [data[a:b] for a, b in spans], np.array([a for a, _ in spans], np.int64)
    starts = np.concatenate([np.zeros(1, np.int64), np.flatnonzero(np.frombuffer(data, np.uint8) == 10) + 1])
    return io.BytesIO(data), starts[:-1] if starts[-1] == len(data) else starts


def _spans(data: bytes, document: str, returns: bool) -> list[tuple[int, int]]:
    """Where each document of some bytes begins and ends: a line that is not blank, or a run of such lines.

    Args:
        data: from the first byte of a line to the end of one.
        document: `line` or `paragraph`.
        returns: whether there is any `\\r` in it.
    """
    if not data:
        return []
    text = np.frombuffer(data, np.uint8)
    end = text == 10
    if returns:
        end |= (text == 13) & np.append(text[1:] != 10, True)
    stops = np.flatnonzero(end)
    starts = np.concatenate([[0], stops + 1])
    if returns:
        stops = stops - ((text[stops] == 10) & (text[stops - 1] == 13) & (stops > 0))
    starts, stops = (starts[:-1], stops) if starts[-1] == len(data) else (starts, np.append(stops, len(data)))
    filled = _filled(data, text, starts, stops)
    if document == "line":
        return list(zip(starts[filled].tolist(), stops[filled].tolist(), strict=True))
    edges = np.diff(filled.astype(np.int8), prepend=0, append=0)
    first, past = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    return list(zip(starts[first].tolist(), stops[past - 1].tolist(), strict=True))


def _filled(data: bytes, text: NDArray[np.uint8], starts: Any, stops: Any) -> NDArray[np.bool_]:
    """Which lines are not blank. Only those that begin like a blank one are looked at one by one."""
    filled: NDArray[np.bool_] = stops > starts
    for line in np.flatnonzero(filled & _SPACE[text[np.minimum(starts, len(text) - 1)]]):
        filled[line] = bool(data[starts[line] : stops[line]].decode(errors="replace").strip())
    return filled
