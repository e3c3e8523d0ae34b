"""Text files: documents of plain text and of JSON lines, found by byte offset.

Guarantee: the same bytes give the same documents, wherever a file is cut for reading: a cut is moved to the next place
where a document may begin. Lines end with `\\n`, `\\r\\n` or `\\r`; a byte order mark that begins a file is no text.
Cost: reading is one `pread`, one pass of numpy over the bytes, and one Python step a document.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from numpy.typing import NDArray

from kdcache.corpus.plan import CorpusFile
from kdcache.errors import CorpusError

Addresses = Sequence[int] | NDArray[np.int64]

_MARK = b"\xef\xbb\xbf"
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
    """Files of plain text or JSON lines. An address is a byte.

    Attributes:
        files: their names and sizes.
        step: bytes that are worth one read.
        total: bytes of all files.
    """

    step = 1 << 20
    fills_nulls = False

    def __init__(self, paths: Sequence[str], files: tuple[CorpusFile, ...], document: str) -> None:
        self._paths, self.files, self._document = paths, files, document
        self.total = sum(file.size for file in files)
        self._columns: tuple[str, ...] = ()

    def begin(self, file: int) -> int:
        """The address of the first document of a file."""
        return len(_MARK) if self._bytes(file, 0, min(3, self.files[file].size)) == _MARK else 0

    def end(self, file: int) -> int:
        """The address behind the last document of a file."""
        return self.files[file].size

    def cut(self, file: int, at: int) -> int:
        """The first address from `at` on that lies between two documents, or the end."""
        end, window = self.end(file), _WINDOW
        while self._document != "file" and at < end:
            data = self._bytes(file, at, min(end, at + window))
            found = _ENDS[self._document].search(data)
            if found and (found.end() < len(data) or at + len(data) == end):
                return at + found.end()
            if at + len(data) == end:
                break
            window *= 4
        return end

    @property
    def plain(self) -> bool:
        """Whether these are files of text, without fields."""
        return self._document != "record"

    def names(self) -> list[str]:
        """Fields of the first records, in order."""
        data = self._bytes(0, self.begin(0), self.cut(0, min(_SNIFFED, self.end(0))))
        found: dict[str, None] = {}
        for line in data.splitlines():
            found |= dict.fromkeys(self._record(0, 0, line) if line.strip() else ())
        return list(found)

    def choose(self, columns: tuple[str, ...]) -> None:
        """Read these fields of each record, and not its text."""
        self._columns = columns

    def read(self, file: int, start: int, stop: int) -> tuple[list[Any], Addresses]:
        """The documents between two addresses, and the address of each.

        Returns:
            Texts of plain text files; of records, the value of the field, or a tuple where there are several.

        Raises:
            CorpusError: bytes that are not UTF-8 or not JSON, or a file that is shorter now.
        """
        data = self._bytes(file, start, stop)
        if self._document == "record":
            return self._read_records(file, start, data)
        returns = b"\r" in data
        spans = [(0, len(data))] if self._document == "file" else _spans(data, self._document, returns)
        try:
            texts = [data[a:b].decode() for a, b in spans]
        except UnicodeDecodeError as error:
            raise CorpusError(f"the corpus file {self._paths[file]} is not UTF-8 ({error.reason})") from None
        if returns:
            texts = [text.replace("\r\n", "\n").replace("\r", "\n") for text in texts]
        return texts, [start + a for a, _ in spans]

    def digest(self, file: int, start: int, stop: int) -> tuple[bytes, NDArray[np.int64], NDArray[np.int64]] | None:
        """The sha256 of the UTF-8 of each text between two addresses, one behind the other, and lengths and addresses.

        The texts are not kept together, so one stays in a core's own cache while it is looked at. Text of plain files
        is hashed as it lies there.

        Returns:
            None for documents that are not texts, or have to be looked at more closely: `read` says what they are.
        """
        data = self._bytes(file, start, stop)
        try:
            found = self._digest_records(data) if self._document == "record" else self._digest_spans(data)
        except (UnicodeError, orjson.JSONDecodeError, AttributeError, LookupError, TypeError):
            return None
        if found is None:
            return None
        sha256, lengths, starts = found
        return b"".join(sha256), np.array(lengths, np.int64), start + np.array(starts, np.int64)

    def _digest_spans(self, data: bytes) -> tuple[list[bytes], list[int], list[int]] | None:
        if b"\r" in data:
            return None
        spans = [(0, len(data))] if self._document == "file" else _spans(data, self._document, False)
        ascii_ = data.isascii()
        lengths = [b - a if ascii_ else len(data[a:b].decode()) for a, b in spans]
        sha256 = hashlib.sha256
        return [sha256(data[a:b]).digest() for a, b in spans], lengths, [a for a, _ in spans]

    def _digest_records(self, data: bytes) -> tuple[list[bytes], list[int], list[int]] | None:
        if len(self._columns) != 1 or not data:
            return None
        column, sha256, loads = self._columns[0], hashlib.sha256, orjson.loads
        view, digests, lengths = memoryview(data), [], []
        stops = np.flatnonzero(np.frombuffer(data, np.uint8) == 10).tolist()
        starts = [0, *(stop + 1 for stop in stops)]
        if starts[-1] == len(data):
            starts.pop()
        else:
            stops.append(len(data))
        for a, b in zip(starts, stops, strict=True):
            text = loads(view[a:b])[column]
            digests.append(sha256(text.encode()).digest())
            lengths.append(len(text))
        return digests, lengths, starts

    def _read_records(self, file: int, base: int, data: bytes) -> tuple[list[Any], Addresses]:
        lines, columns = data.split(b"\n"), self._columns
        if not lines[-1]:
            lines.pop()
        starts = _starts(lines)
        try:
            records = [orjson.loads(line) for line in lines]
            if len(columns) == 1:
                key = columns[0]
                return [{} if (v := record.get(key)) is None else {key: v} for record in records], base + starts
        except (orjson.JSONDecodeError, AttributeError):  # a blank line, or one that has to be named
            found = [(line, start) for line, start in zip(lines, starts.tolist(), strict=True) if line.strip()]
            records = [self._record(file, base + start, line) for line, start in found]
            starts = np.array([start for _, start in found], np.int64)
        return [{c: r[c] for c in columns if r.get(c) is not None} for r in records], base + starts

    def _record(self, file: int, at: int, line: bytes) -> dict[str, Any]:
        try:
            record = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            try:
                line.decode()
                what = f"cannot be read: the record at byte {at} is not JSON ({error.msg})"
            except UnicodeDecodeError as bad:
                what = f"is not UTF-8 ({bad.reason} in the record at byte {at})"
            raise CorpusError(f"the corpus file {self._paths[file]} {what}") from None
        if not isinstance(record, dict):
            raise CorpusError(f"the corpus file {self._paths[file]}: the record at byte {at} is not an object")
        return record

    def _bytes(self, file: int, start: int, stop: int) -> bytes:
        try:
            handle = os.open(self._paths[file], os.O_RDONLY)
            try:
                parts, at = [], start
                while at < stop and (part := os.pread(handle, min(stop - at, 1 << 30), at)):
                    parts.append(part)
                    at += len(part)
            finally:
                os.close(handle)
        except OSError as error:
            raise CorpusError(f"the corpus file {self._paths[file]} cannot be read: {error.strerror}") from None
        if at < stop:
            raise CorpusError(f"the corpus file {self._paths[file]} ends before byte {stop:,}")
        return parts[0] if len(parts) == 1 else b"".join(parts)


def holds_records(path: str) -> bool:
    """Whether a JSON file is one of lines, each an object."""
    with Path(path).open("rb") as file:
        line = file.readline(_SNIFFED).removeprefix(_MARK)
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False


def _starts(lines: list[bytes]) -> NDArray[np.int64]:
    """Where each of some lines begins."""
    lengths = np.fromiter(map(len, lines), np.int64, len(lines)) + 1
    return np.cumsum(lengths) - lengths


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
