"""ArrayRecord: the records of a file, one after the other, without the library that wrote it.

The file is one of Riegeli. Every 65,536 bytes begin with a block header of 24 bytes, which is no part of anything else.
Between them stand chunks: a header of 40 bytes (hash, size of the data, hash, type and number of records, decoded size)
and the data. A simple chunk (type `r`) holds records: a byte for the compression, the compressed sizes of the records,
and the records behind each other, compressed together. The last block holds where the chunk begins that indexes the
others, behind which there are no records.

Sources: google/array_record, `cpp/array_record_writer.cc`; google/riegeli, `doc/riegeli_records_file_format.md`.
Hashes are not checked; sizes are. Chunks of the type `t` (transposed, an option of the writer) are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from kdcache.errors import CorpusError

_BLOCK, _BLOCK_HEADER, _CHUNK_HEADER = 1 << 16, 24, 40
_SIGNATURE = bytes.fromhex("83af70d10d884a3f")
_MAGIC = 0x71930E704FDAE05E
_MOST_CHUNK = 1 << 32
_CODECS = {ord("z"): "zstd", ord("b"): "brotli"}


def read_records(path: Path) -> Iterator[bytes]:
    """Every record of a file, in order.

    Raises:
        CorpusError: it is no such file, or a damaged one.
    """
    size = path.stat().st_size
    try:
        with path.open("rb") as file:
            if file.read(8) != _SIGNATURE:
                raise CorpusError(f"{path} is no ArrayRecord file")
            file.seek(max(0, size - _BLOCK))
            end = _index_offset(file.read(_BLOCK), path)
            at = 0
            while at < end:
                header, at_data = _take(file, at, _CHUNK_HEADER)
                data_size, kind_and_records, decoded = struct.unpack_from("<8xQ8xQQ", header)
                kind, records = kind_and_records & 0xFF, kind_and_records >> 8
                if data_size > min(size, _MOST_CHUNK) or decoded > _MOST_CHUNK:
                    raise CorpusError(f"{path} has a chunk of {data_size:,} bytes, larger than it can be")
                data, at = _take(file, at_data, data_size)
                if kind == ord("r"):
                    yield from _simple(data, records, decoded)
                elif kind != ord("s"):
                    raise CorpusError(f"{path} has a chunk of type {chr(kind)!r}, which is not read; write simple ones")
    except (struct.error, IndexError, EOFError, OSError, pa.ArrowException, ValueError) as error:
        raise CorpusError(f"{path} is damaged: {str(error) or type(error).__name__}") from None


def _take(file: object, at: int, count: int) -> tuple[bytes, int]:
    """So many bytes from a place of the file on, without the block headers among them, and where they end."""
    found = []
    while count:
        if at % _BLOCK == 0:
            at += _BLOCK_HEADER
        step = min(count, _BLOCK - at % _BLOCK)
        file.seek(at)  # type: ignore[attr-defined]
        part = file.read(step)  # type: ignore[attr-defined]
        if len(part) < step:
            raise EOFError("it ends inside a chunk")
        found.append(part)
        at, count = at + step, count - step
    return b"".join(found), at


def _index_offset(last: bytes, path: Path) -> int:
    """Where the index begins, from the last block: a chunk with fields 1 (the offset) and 2 (a magic number)."""
    data = last[_BLOCK_HEADER + _CHUNK_HEADER :]
    at = data.find(b"\x10" + _varint(_MAGIC))
    start = data.rfind(b"\x08", 0, at)
    if at < 0 or start < 0:
        raise CorpusError(f"{path} has no index at its end: it was not closed")
    return _read_varint(data, start + 1)[0]


def _simple(data: bytes, records: int, decoded: int) -> Iterator[bytes]:
    """The records of a simple chunk."""
    codec, at = data[0], 1
    size, at = _read_varint(data, at)
    sizes, values = data[at : at + size], data[at + size :]
    if codec:
        if codec not in _CODECS:
            raise ValueError(f"it is compressed by {chr(codec)!r}")
        sizes, values = (
            _decompressed(part, _CODECS[codec], limit) for part, limit in ((sizes, 10 * records), (values, decoded))
        )
    start = place = 0
    for _ in range(records):
        length, place = _read_varint(sizes, place)
        if start + length > len(values):
            raise ValueError("a record leads out of its chunk")
        yield values[start : start + length]
        start += length


def _decompressed(data: bytes, codec: str, most: int) -> bytes:
    """What a size, then a frame, decompress to."""
    size, at = _read_varint(data, 0)
    if size > most:
        raise ValueError("a chunk decompresses to more than it says")
    return bytes(pa.decompress(data[at:], size, codec=codec, asbytes=True)) if size else b""


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def _read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A number in 7 bits a byte, the lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number has too many bytes")
