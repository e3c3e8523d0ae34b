"""Lies of an Arrow file: what its headers say of itself, and what its frames or compressed buffers do."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
from numcodecs import Zstd

from kdcache.codec.streams import deflate
from kdcache.store.commit import commit_name
from tests.attacks.forge import SHARD, ArrowForgery, Attack, bomb, frame

Forge = Callable[[ArrowForgery], str]


def _rows(change: Callable[[list[dict[str, Any]]], Any], seal: bool = True) -> Forge:
    def forge(f: ArrowForgery) -> str:
        rows = f.rows()
        change(rows)
        return f.write_rows(f.seal_rows(rows) if seal else rows)

    return forge


def _schema(change: Callable[[pa.Schema], pa.Schema]) -> Forge:
    return lambda f: f.write_rows(f.rows(), change(f.columns.schema))


def compression_bomb(f: ArrowForgery) -> str:
    """A sound Arrow file whose first batch has 40 kB and unfolds to 1 GB."""
    schema, rows = f.columns.schema, f.rows()[:4]
    batch = pa.RecordBatch.from_pylist(rows, schema=schema)
    zeros = pa.py_buffer(np.zeros(1 << 30, np.uint8))
    offsets = pa.py_buffer(np.array([0, 1, 2, 3, 1 << 30], "<i4"))
    columns = [pa.Array.from_buffers(pa.binary(), 4, [None, offsets, zeros]), *batch.columns[1:]]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
        for start in range(4, len(f.rows()), 4):
            writer.write_batch(pa.RecordBatch.from_pylist(f.rows()[start : start + 4], schema=schema))
    assert sink.tell() < 1 << 20
    return f.put(f.name, sink.getvalue().to_pybytes())


def dictionary(f: ArrowForgery) -> str:
    rows, schema = f.rows(), f.columns.schema
    for row in rows:
        row["tokens"] = rows[0]["tokens"]
    encoded = schema.set(0, pa.field("tokens", pa.dictionary(pa.int32(), pa.binary())))
    return f.write_rows(rows, encoded)


def _buffer(column: int, which: int, offset: int, length: int) -> Forge:
    """Another place and length for a buffer of the first batch."""

    def forge(f: ArrowForgery) -> str:
        data, block = f.data, f.first_block()
        start, metadata = struct.unpack("<qi", block[:12])
        header = data[start : start + metadata]
        places = f.first_buffers()
        old = places.tobytes()
        assert header.count(old) == 1
        places[(4 if f.columns.compressed else 3) * column + which] = (offset, length)
        at = start + header.index(old)
        return f.put(f.name, data[:at] + places.tobytes() + data[at + len(old) :])

    return forge


def _length(rows: int) -> Forge:
    """Another number of rows in the first batch, in all the places that say it."""

    def forge(f: ArrowForgery) -> str:
        data, block = f.data, f.first_block()
        start, metadata = struct.unpack("<qi", block[:12])
        header = bytearray(data[start : start + metadata])
        old, new = struct.pack("<q", 4), struct.pack("<q", rows)
        nodes = struct.pack("<qq", 4, 0)
        assert header.count(nodes) == len(f.form.shapes(0)) + 2  # the inner numbers of lists are more
        header = header.replace(nodes, struct.pack("<qq", rows, 0))
        header = header.replace(old, new)
        return f.put(f.name, data[:start] + bytes(header) + data[start + metadata :])

    return forge


def _block(offset: int | None = None, metadata: int | None = None, body: int | None = None) -> Forge:
    """Another place for the first batch."""

    def forge(f: ArrowForgery) -> str:
        block = f.first_block()
        found = struct.unpack("<qiiq", block)
        wanted = [new if new is not None else old for new, old in zip((offset, metadata, 0, body), found, strict=True)]
        return f.patch(block, struct.pack("<qiiq", *wanted), last=True)

    return forge


def same_block_twice(f: ArrowForgery) -> str:
    """The first batch stands for the second too."""
    start, footer = f.footer()
    block = f.first_block()
    at = start + footer.index(block)
    data = f.data
    return f.put(f.name, data[: at + 24] + block + data[at + 48 :])


def _footer_length(length: int) -> Forge:
    return lambda f: f.put(f.name, f.data[:-10] + struct.pack("<i", length) + f.data[-6:])


def _file(change: Callable[[bytes], bytes]) -> Forge:
    def forge(f: ArrowForgery) -> str:
        name = f.put(f.name, change(f.data))
        return name if len(f.data) >= 16 * len(f.records) else commit_name(SHARD)  # which claims rows in no bytes

    return forge


def _footer_root(offset: int) -> Forge:
    def forge(f: ArrowForgery) -> str:
        start, _ = f.footer()
        return f.put(f.name, f.data[:start] + struct.pack("<I", offset) + f.data[start + 4 :])

    return forge


def _value_offsets(change: Callable[[Any], Any]) -> Forge:
    """Another division of the first column into rows."""

    def forge(f: ArrowForgery) -> str:
        start, metadata = struct.unpack("<qi", f.first_block()[:12])
        at = start + metadata + int(f.first_buffers()[1]["offset"])
        offsets = np.frombuffer(f.data, "<i4", 5, at).copy()
        change(offsets)
        return f.put(f.name, f.data[:at] + offsets.tobytes() + f.data[at + 20 :])

    return forge


def _set(at: int, value: int) -> Callable[[Any], None]:
    def change(values: Any) -> None:
        values[at] = value

    return change


def claim_rows(f: ArrowForgery) -> str:
    """As many rows as its bytes could just hold."""
    rows = f.objects[0]["bytes"] // 16
    f.change_commit(rows=rows, pieces=rows, tokens=1 << 30)
    return f.name


def in_two_objects(f: ArrowForgery) -> str:
    f.put(f"{f.name.removesuffix('.arrow')}.more.arrow", f.data)
    return "shard 0 is committed as 2 objects"


def batch_is_a_schema(f: ArrowForgery) -> str:
    """The first block leads to the schema message."""
    length = struct.unpack("<i", f.data[12:16])[0]
    return _block(offset=8, metadata=length + 8, body=64)(f)


def swapped_rows(rows: list[dict[str, Any]]) -> None:
    rows[0], rows[1] = rows[1], rows[0]


def _sealed_as(seal: int) -> Callable[[list[dict[str, Any]]], None]:
    return lambda rows: rows[0].update(crc32c=seal)


_BOTH = [
    Attack("a column of another name", _schema(lambda s: s.set(0, s.field(0).with_name("token")))),
    Attack("positions of 64 bits", _schema(lambda s: s.set(len(s) - 2, pa.field("positions", pa.uint64())))),
    Attack("a column more", _schema(lambda s: s.append(pa.field("more", pa.int8())))),
    Attack("a column less", _schema(lambda s: s.remove(0))),
    Attack("metadata in the schema", _schema(lambda s: s.with_metadata({"a": "b"}))),
    Attack("a null", _rows(lambda rows: rows[0].update(tokens=None))),
    Attack("a null number", _rows(lambda rows: rows[0].update(crc32c=None), seal=False)),
    Attack("batches of one row", lambda f: f.write_rows(f.rows(), batch_rows=1)),
    Attack("batches of eight rows", lambda f: f.write_rows(f.rows(), batch_rows=8)),
    Attack("a row less", lambda f: f.write_rows(f.rows()[:-1])),
    Attack("no rows", lambda f: f.write_rows([])),
    Attack("more rows claimed than batches", claim_rows),
    Attack("two objects", in_two_objects),
    Attack("rows in another order", _rows(swapped_rows, seal=False)),
    Attack("a wrong seal", _rows(_sealed_as(7), seal=False)),
    Attack("a batch of 2^40 rows", _length(1 << 40)),
    Attack("a batch of -1 rows", _length(-1)),
    Attack("a batch of 5 rows", _length(5)),
    Attack("a batch beyond the file", _block(offset=1 << 40)),
    Attack("a batch whose end overflows", _block(offset=(1 << 63) - 8)),
    Attack("a batch before the file", _block(offset=-8)),
    Attack("a batch of 2^62 bytes", _block(body=1 << 62)),
    Attack("a batch of negative size", _block(body=-(1 << 62))),
    Attack("a batch without metadata", _block(metadata=0)),
    Attack("a batch of 1 GiB of metadata", _block(metadata=1 << 30)),
    Attack("a batch of negative metadata", _block(metadata=-8)),
    Attack("a batch that is a schema", batch_is_a_schema),
    Attack("one batch for two", same_block_twice),
    Attack("a footer of no length", _footer_length(0)),
    Attack("a footer of negative length", _footer_length(-1)),
    Attack("a footer longer than the file", _footer_length(1 << 30)),
    Attack("a footer of 2^31 - 1 bytes", _footer_length((1 << 31) - 1)),
    Attack("a footer shorter than it is", _footer_length(16)),
    Attack("a footer whose root is outside", _footer_root((1 << 32) - 1)),
    Attack("a footer whose root is its end", _footer_root(1 << 10)),
    Attack("no magic at the end", _file(lambda d: d[:-6] + b"ARROW2")),
    Attack("no magic at the start", _file(lambda d: b"PARQUE" + d[6:])),
    Attack("something after the end", _file(lambda d: d + b"\0")),
    Attack("nothing", _file(lambda d: b"")),
    Attack("seven bytes", _file(lambda d: d[:7])),
    Attack("a magic and no more", _file(lambda d: b"ARROW1\0\0" + b"\x04\0\0\0ARROW1")),
    Attack("no continuation before the schema", _file(lambda d: d[:8] + b"\0\0\0\0" + d[12:])),
    Attack("a schema of 2^31 bytes", _file(lambda d: d[:12] + b"\xff\xff\xff\x7f" + d[16:])),
    Attack("a schema of no bytes", _file(lambda d: d[:12] + b"\0\0\0\0" + d[16:])),
    Attack("a parquet file", _file(lambda d: b"PAR1" + d[4:-4] + b"PAR1")),
]


FRAMES = [
    *_BOTH,
    Attack("a body that unfolds to 1 GB", compression_bomb),
    Attack("a dictionary", dictionary),
    Attack("a column of large binaries", _schema(lambda s: s.set(0, pa.field("tokens", pa.large_binary())))),
    Attack("a column that may not be null", _schema(lambda s: s.set(0, pa.field("tokens", pa.binary(), False)))),
    Attack("columns in another order", _schema(lambda s: pa.schema([s.field(1), s.field(0), *list(s)[2:]]))),
    Attack("a frame of 2^40 bytes", lambda f: f.frame(frame(1 << 40))),
    Attack("a frame of 2^64 - 1 bytes", lambda f: f.frame(frame((1 << 64) - 1))),
    Attack("a frame of 2^40 bytes of values", lambda f: f.frame(frame(1 << 40), "values")),
    Attack("a frame that declares nothing", lambda f: f.frame(frame(None))),
    Attack("a frame that declares more than it has", lambda f: f.frame(frame(100))),
    Attack("a frame that declares less than it has", lambda f: f.frame(frame(64, payload=1 << 16))),
    Attack("a frame that unfolds to 256 MiB", lambda f: f.frame(bomb(1 << 28))),
    Attack("a frame above the row's shape", lambda f: f.frame(deflate(np.zeros(65, "<u2")))),
    Attack("a frame that ends inside a number", lambda f: f.frame(deflate(np.zeros(63, "u1")))),
    Attack("a frame of another dictionary", lambda f: f.frame(b"\x28\xb5\x2f\xfd\x23\x07\0\0\0\x40" + b"\0" * 9)),
    Attack("two frames", lambda f: f.frame(2 * deflate(np.zeros(8, "<u2")))),
    Attack("a frame that may be skipped", lambda f: f.frame(b"\x50\x2a\x4d\x18\4\0\0\0abcd" + f.rows()[0]["tokens"])),
    Attack("half a frame", lambda f: f.frame(f.rows()[0]["tokens"][:-5])),
    Attack("a frame and more", lambda f: f.frame(f.rows()[0]["tokens"] + b"more")),
    Attack("no frame", lambda f: f.frame(b"tokens")),
    Attack("a frame with a checksum that is wrong", lambda f: f.frame(_bad_checksum())),
    Attack("a buffer beyond its body", _buffer(0, 2, 1 << 20, 100)),
    Attack("a buffer longer than its body", _buffer(0, 2, 0, 1 << 40)),
    Attack("a buffer before its body", _buffer(0, 2, -8, 100)),
    Attack("a buffer of negative length", _buffer(0, 2, 64, -64)),
    Attack("a buffer whose end overflows", _buffer(0, 2, (1 << 63) - 1, 1)),
    Attack("offsets in no buffer", _buffer(0, 1, 0, 0)),
    Attack("offsets cut short", _buffer(0, 1, 0, 3)),
    Attack("seals in no buffer", _buffer(-1, 2, 0, 0)),
    Attack("a value that starts below zero", _value_offsets(_set(0, -1))),
    Attack("a value that ends before it starts", _value_offsets(_set(1, -(1 << 31)))),
    Attack("a value beyond its column", _value_offsets(_set(1, (1 << 31) - 1))),
]


def _buffers(change: Callable[[bytes], bytes], column: int = 0, which: int = 3) -> Forge:
    """Another compressed buffer in the first batch: at the end of its body, where there is room for any."""

    def forge(f: ArrowForgery) -> str:
        places, data = f.first_buffers(), f.data
        start, metadata, _, body = struct.unpack("<qiiq", f.first_block())
        at = 4 * column + which if column >= 0 else len(places) - 1
        offset, length = places[at].tolist()
        made = change(data[start + metadata + offset :][:length])
        header, old = data[start : start + metadata], places.tobytes()
        assert header.count(old) == header.count(struct.pack("<q", body)) == 1
        places[at] = (body, len(made))
        made += bytes(-len(made) % 8)
        longer = struct.pack("<q", body + len(made))
        header = header.replace(struct.pack("<q", body), longer).replace(old, places.tobytes())
        end, block = start + metadata + body, f.first_block()
        found = data[:start] + header + data[start + metadata : end] + made + data[end:]
        rest = found[-len(f.footer()[1]) - 10 :]  # all that lies behind the first batch moved
        moved = rest.replace(block, block[:16] + longer)
        for offset in _later_blocks(f):
            moved = moved.replace(struct.pack("<q", offset), struct.pack("<q", offset + len(made)))
        return f.put(f.name, found[: -len(rest)] + moved)

    return forge


def _later_blocks(f: ArrowForgery) -> list[int]:
    """Where the batches behind the first one lie, the last one first."""
    footer, first = f.footer()[1], f.first_block()
    at, count = footer.index(first), -(-len(f.records) // f.columns.batch_rows)
    return [struct.unpack_from("<q", footer, at + 24 * number)[0] for number in range(count - 1, 0, -1)]


def _claim(length: int) -> Callable[[bytes], bytes]:
    """Another length before the frame."""
    return lambda buffer: struct.pack("<q", length) + buffer[8:]


def _framed(made: bytes, length: int | None = None) -> Callable[[bytes], bytes]:
    """Another frame behind the length, or behind another one."""
    return lambda buffer: (buffer[:8] if length is None else struct.pack("<q", length)) + made


def _offsets(change: Callable[[Any], Any], dtype: str = "<i4") -> Callable[[bytes], bytes]:
    """Other offsets, compressed again."""

    def forge(buffer: bytes) -> bytes:
        length = struct.unpack("<q", buffer[:8])[0]
        plain = buffer[8:] if length == -1 else bytes(Zstd().decode(buffer[8:]))
        offsets = np.frombuffer(plain, dtype).copy()
        changed = change(offsets)
        data = np.asarray(offsets if changed is None else changed, dtype).tobytes()
        return struct.pack("<q", len(data)) + deflate(np.frombuffer(data, "u1"))

    return forge


def numbers_bomb(f: ArrowForgery) -> str:
    """A sound Arrow file whose first batch has 40 kB and unfolds to 1 GB of tokens."""
    schema, rows = f.columns.schema, f.rows()
    batch = pa.RecordBatch.from_pylist(rows[:4], schema=schema)
    offsets = pa.array(np.array([0, 1, 2, 3, 1 << 29], "<i4"))
    tokens = pa.ListArray.from_arrays(offsets, pa.array(np.zeros(1 << 29, "<u2")))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([tokens, *batch.columns[1:]], schema=schema))
        for start in range(4, len(rows), 4):
            writer.write_batch(pa.RecordBatch.from_pylist(rows[start : start + 4], schema=schema))
    assert sink.tell() < 1 << 20
    return f.put(f.name, sink.getvalue().to_pybytes())


def _inner_null(rows: list[dict[str, Any]]) -> None:
    rows[0]["tokens"] = [None, *rows[0]["tokens"][1:]]


def _as(kind: pa.DataType) -> Forge:
    return _schema(lambda s: s.set(0, pa.field("tokens", kind)))


def _other_codec(name: str | None) -> Forge:
    return lambda f: f.write_rows(f.rows(), options=pa.ipc.IpcWriteOptions(compression=name))


NUMBERS = [
    *_BOTH,
    Attack("a body that unfolds to 1 GB", numbers_bomb),
    Attack("a column of wider numbers", _as(pa.list_(pa.uint32()))),
    Attack("a column of wide offsets", _as(pa.large_list(pa.uint16()))),
    Attack("a column of fixed lists", _schema(lambda s: s.set(2, pa.field("supervised", pa.list_(pa.int8()))))),
    Attack("a column that may not be null", _schema(lambda s: s.set(0, s.field(0).with_nullable(False)))),
    Attack("columns in another order", _schema(lambda s: pa.schema([s.field(1), s.field(0), *list(s)[2:]]))),
    Attack("a null among the numbers", _rows(_inner_null, seal=False)),
    Attack("compressed by lz4", _other_codec("lz4")),
    Attack("not compressed", lambda f: f.write_rows(f.rows(), options=pa.ipc.IpcWriteOptions())),
    Attack("numbers that claim 2^40 bytes", _buffers(_claim(1 << 40))),
    Attack("numbers that claim 2^63 - 1 bytes", _buffers(_claim((1 << 63) - 1))),
    Attack("numbers that claim -2 bytes", _buffers(_claim(-2))),
    Attack("numbers that claim no bytes", _buffers(_claim(0))),
    Attack("numbers that claim a byte more", _buffers(lambda b: _claim(struct.unpack("<q", b[:8])[0] + 1)(b))),
    Attack("a frame that claims to be plain", _buffers(_claim(-1))),
    Attack("plain numbers above what is due", _buffers(lambda b: struct.pack("<q", -1) + bytes(1 << 16))),
    Attack("numbers of a frame of 2^40 bytes", _buffers(_framed(frame(1 << 40), 1 << 40))),
    Attack("numbers of a frame of 2^64 - 1 bytes", _buffers(_framed(frame((1 << 64) - 1), -1))),
    Attack("numbers of a frame that declares nothing", _buffers(_framed(frame(None, 512), 512))),
    Attack("numbers of a frame that declares more than it has", _buffers(_framed(frame(512), 512))),
    Attack("numbers of a frame that declares less", _buffers(_framed(frame(512, payload=1 << 16), 512))),
    Attack("numbers that unfold to 256 MiB", _buffers(_framed(bomb(1 << 28), 1 << 28))),
    Attack("numbers of two frames", _buffers(_framed(2 * deflate(np.zeros(256, "u1")), 512))),
    Attack("numbers of no frame", _buffers(_framed(b"tokens", 512))),
    Attack("numbers of half a frame", _buffers(lambda b: b[:-5])),
    Attack("numbers of seven bytes", _buffers(lambda b: b[:7])),
    Attack("numbers of a length and no frame", _buffers(lambda b: b[:8])),
    Attack("no numbers", _buffers(lambda b: b"")),
    Attack("no offsets", _buffers(lambda b: b"", which=1)),
    Attack("offsets that unfold to 256 MiB", _buffers(_framed(bomb(1 << 28), 1 << 28), which=1)),
    Attack("offsets cut short", _buffers(_offsets(lambda o: o[:1]), which=1)),
    Attack("an offset below zero", _buffers(_offsets(_set(0, -1)), which=1)),
    Attack("an offset before the one before it", _buffers(_offsets(_set(1, -(1 << 31))), which=1)),
    Attack("an offset beyond the numbers", _buffers(_offsets(_set(1, (1 << 31) - 1)), which=1)),
    Attack("a row with the numbers of two", _buffers(_offsets(lambda o: [o[0], o[2], o[2], *o[3:]]), which=1)),
    Attack("no seals", _buffers(lambda b: b"", column=-1)),
    Attack("other seals", _buffers(_offsets(lambda o: o[::-1], "<u4"), column=-1)),
    Attack("a number beyond its row's shape", _rows(lambda rows: rows[0].update(tokens=[1] * 65))),
    Attack("a buffer beyond its body", _buffer(0, 3, 1 << 20, 100)),
    Attack("a buffer longer than its body", _buffer(0, 3, 0, 1 << 40)),
    Attack("a buffer before its body", _buffer(0, 3, -8, 100)),
    Attack("a buffer of negative length", _buffer(0, 3, 64, -64)),
    Attack("a buffer whose end overflows", _buffer(0, 3, (1 << 63) - 1, 1)),
]


def _bad_checksum() -> bytes:
    found = bytearray(Zstd(level=3, checksum=True).encode(np.zeros(64, "<u2")))
    found[-1] ^= 1
    return bytes(found)
