"""File bytes: any range of a corpus file, whether it lies on a disk, in an object store, or inside a compression.

Guarantee: `read` gives the bytes asked for, or fewer where the file ends; what a file cannot give is one sentence.
Cost: a local range is one `pread`, a remote one is one request. A compressed file has no ranges: it is decompressed
from its start and read on from where the last read ended, so reads that go forward cost one pass together, and one in
the middle costs the decompression of everything before it. A read further back begins anew. In memory are the bytes of
the last read.
"""

from __future__ import annotations

import io
import lzma
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol

from kdcache.errors import CorpusError

_BLOCK = 1 << 20
"""Bytes that are decompressed at once, and that are asked for where little of a remote file is needed."""

_AHEAD = 8 << 20
"""Bytes of a remote file that are asked for at once where it is read from start to end."""


_LIBRARIES = ("pyarrow", "botocore", "aiobotocore", "aiohttp", "google", "gcsfs", "azure", "huggingface_hub")
"""Their errors are of many classes, and not loaded here."""


class FileBytes(Protocol):
    """The bytes of a file.

    Attributes:
        name: for messages.
    """

    name: str

    @property
    def size(self) -> int | None:
        """Bytes; None where that is known only at the end."""

    def read(self, start: int, stop: int) -> bytes:
        """The bytes from `start` on; fewer than `stop - start` only where the file ends.

        Raises:
            CorpusError: they cannot be read, or the file has become shorter.
        """


class LocalFile:
    """A file on a disk."""

    def __init__(self, path: str, size: int) -> None:
        self.name, self.size = path, size

    def read(self, start: int, stop: int) -> bytes:
        """See `FileBytes`."""
        stop, parts, at = min(stop, self.size), [], start
        with naming(self.name):
            handle = os.open(self.name, os.O_RDONLY)
            try:
                while at < stop and (part := os.pread(handle, min(stop - at, 1 << 30), at)):
                    parts.append(part)
                    at += len(part)
            finally:
                os.close(handle)
        if at < stop:
            raise CorpusError(f"the corpus file {self.name} ends before byte {stop:,}")
        return parts[0] if len(parts) == 1 else b"".join(parts)


class RemoteFile:
    """A file behind a URL. Its first megabyte and the last range are kept, so that looking at them again is free."""

    def __init__(self, fs: Any, path: str, name: str, size: int) -> None:
        self._fs, self._path, self.name, self.size = fs, path, name, size
        self._kept: list[tuple[int, bytes]] = []

    def read(self, start: int, stop: int) -> bytes:
        """See `FileBytes`."""
        stop = min(stop, self.size)
        if start >= stop:
            return b""
        for at, data in self._kept:
            if at <= start and stop <= at + len(data):
                return data[start - at : stop - at]
        end = min(max(stop, _BLOCK), self.size) if not start else stop
        with naming(self.name):
            data = bytes(self._fs.cat_file(self._path, start=start, end=end))
        if len(data) > end - start:
            raise CorpusError(f"the server of {self.name} gives no ranges of files; download it first")
        if len(data) < end - start:
            raise CorpusError(f"the corpus file {self.name} ends before byte {end:,}")
        if len(data) <= 4 * _AHEAD:
            self._kept = [*(kept for kept in self._kept if not kept[0] and start), (start, data)]
        return data[: stop - start]


class DecompressedFile:
    """What a compressed file holds, read forward."""

    size = None

    def __init__(self, inner: LocalFile | RemoteFile, compression: str) -> None:
        self._inner, self._compression, self.name = inner, compression, inner.name
        self._rewind()

    def _rewind(self) -> None:
        self._stream: Any = None
        self._held, self._at = b"", 0

    def read(self, start: int, stop: int) -> bytes:
        """See `FileBytes`."""
        if start < self._at:
            self._rewind()
        try:
            with naming(self.name, f" as {self._compression}"):
                return self._read_on(start, stop)
        except CorpusError:
            self._rewind()  # nobody knows how far it came
            raise

    def _read_on(self, start: int, stop: int) -> bytes:
        if self._stream is None:
            self._stream = _decompress(as_file(self._inner), self._compression)
        while (behind := self._at + len(self._held)) < start:
            if not (skipped := self._stream.read(min(_BLOCK, start - behind))):
                return b""
            self._held, self._at = skipped, behind
        parts, missing = [self._held[start - self._at :]], stop - behind
        while missing > 0 and (part := self._stream.read(min(_BLOCK, missing))):
            parts.append(part)
            missing -= len(part)
        self._held, self._at = parts[0] if len(parts) == 1 else b"".join(parts), start
        return self._held if len(self._held) <= stop - start else self._held[: stop - start]


class _AsFile(io.RawIOBase):
    """Bytes of a file as Python's own kind of file, for libraries that read one."""

    def __init__(self, data: FileBytes) -> None:
        self._data, self._at = data, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._data.size is not None

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if self._data.size is None:
            raise io.UnsupportedOperation("seek")
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._data.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        found = self._data.read(self._at, self._at + len(buffer))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            return self.readall()
        found = self._data.read(self._at, self._at + size)
        self._at += len(found)
        return found


def as_ranges(data: FileBytes) -> io.RawIOBase:
    """Bytes of a file as a file object, each read of which is one range."""
    return _AsFile(data)


def as_file(data: FileBytes) -> io.BufferedReader:
    """Bytes of a file as a buffered file object, to be read from start to end in large steps."""
    return io.BufferedReader(_AsFile(data), _AHEAD if isinstance(data, RemoteFile) else _BLOCK)


def _decompress(file: IO[bytes], compression: str) -> Any:
    """The content of a compressed file, of all its members one behind the other."""
    if compression == "gzip":
        import gzip

        return gzip.GzipFile(fileobj=file, mode="rb")
    if compression == "bz2":
        import bz2

        return bz2.BZ2File(file)
    if compression == "xz":
        return lzma.LZMAFile(file)
    import pyarrow as pa

    return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), compression)


@contextmanager
def naming(name: str, how: str = "") -> Iterator[None]:
    """Turn what a disk, a store, a decompressor or Arrow says into one sentence that names the file."""
    try:
        yield
    except CorpusError:
        raise
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise CorpusError(f"the corpus file {name} cannot be read{how}: {reason}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _LIBRARIES:
            raise
        raise CorpusError(f"the corpus file {name} cannot be read{how}: {' '.join(str(error).split())}") from error
