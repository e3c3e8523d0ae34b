"""Zarr shards: a zarr v3 group a shard, one array a stream, for object stores and array tools.

Every stream is an array `[rows, ...]` of its largest shape a row; a row is an inner chunk of a shard that holds
the whole array, so a row is one range read and an array two objects. What a row does not fill is zero, and
`lengths` says how much it fills; `crc32c` seals each row as in the Arrow form, over the plain streams. Chunks
are zstd and crc32c; the fill value is poison, all chunks are written, and a missing one is an error here.

The bytes are the zarr v3 sharding codec's (zarr-specs, "sharding_indexed" 1.0), written row by row and read by
range without going through a zarr library: nothing is allocated that the manifest does not promise, and metadata
that is not exactly what this shard must have is refused. zarr-python opens what is written here; the conformance
suite does.
"""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from kdcache.codec.streams import LEVEL, deflate
from kdcache.errors import CorruptCacheError
from kdcache.store.row_format import Record, RowFormat, Shapes, read_stream, row_seal
from kdcache.store.sealed_json import canonical, parse
from kdcache.store.shards import Shard, ShardWriter
from kdcache.store.storage import Readable, Sink, Storage

_ENTRY = struct.Struct("<QQ")
_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
_ZSTD = {"name": "zstd", "configuration": {"level": LEVEL, "checksum": False}}
_CRC = {"name": "crc32c"}
_GROUP = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
_U4 = np.dtype("<u4")


def array_metadata(dtype: np.dtype[Any], shape: tuple[int, ...], *, by_row: bool) -> dict[str, Any]:
    """The zarr.json of an array: by row inside one shard, or one chunk.

    Args:
        dtype: of its elements.
        shape: rows first.
        by_row: whether each row is an inner chunk of its own.
    """
    whole = [max(1, n) for n in shape]
    codecs: list[dict[str, Any]] = [_LITTLE, _ZSTD, _CRC]
    if by_row:
        inner = {"chunk_shape": [1, *whole[1:]], "codecs": codecs, "index_codecs": [_LITTLE, _CRC]}
        codecs = [{"name": "sharding_indexed", "configuration": {**inner, "index_location": "end"}}]
    return {
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": whole}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN"
        if dtype.kind == "f"
        else int(np.iinfo(dtype).max if dtype.kind == "u" else np.iinfo(dtype).min),
        "codecs": codecs,
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _tables(rows: int, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The small arrays beside the streams, and their shapes."""
    return {"lengths": (rows, len(shapes) + 1), "crc32c": (rows,)}


def _metadata(rows: int, shapes: Shapes) -> dict[str, dict[str, Any]]:
    """Every zarr.json of a shard, by name."""
    found = {"zarr.json": _GROUP}
    for name, (dtype, shape) in shapes.items():
        found[f"{name}/zarr.json"] = array_metadata(dtype, (rows, *shape), by_row=True)
    for name, shape in _tables(rows, shapes).items():
        found[f"{name}/zarr.json"] = array_metadata(_U4, shape, by_row=False)
    return found


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"


def _chunk_name(array: str, dimensions: int) -> str:
    return f"{array}/c" + "/0" * dimensions


def _sealed(data: bytes) -> bytes:
    return data + struct.pack("<I", google_crc32c.value(data))


def _unsealed(data: bytes, what: str) -> bytes:
    if len(data) < 4 or struct.unpack("<I", data[-4:])[0] != google_crc32c.value(data[:-4]):
        raise CorruptCacheError(f"the crc32c of {what} does not match")
    return data[:-4]


class ZarrShardWriter(ShardWriter):
    """Writes one group, row by row; memory holds one row and the index."""

    suffix = ".zarr"
    folder = True

    def __init__(self, storage: Storage, shard: int, form: RowFormat) -> None:
        super().__init__(storage, shard, form)
        self._shapes = form.shapes(form.seq_len)
        self._sinks: dict[str, Sink] = {}
        self._index: dict[str, list[tuple[int, int]]] = {name: [] for name in self._shapes}
        self._lengths: list[list[int]] = []
        self._seals: list[int] = []

    def append(self, record: Record) -> None:
        self._seals.append(row_seal(self.shard, self.tally.rows, record.positions, record.streams.values()))
        self._lengths.append([len(stream) for stream in record.streams.values()] + [record.positions])
        for name, stream in record.streams.items():
            dtype, shape = self._shapes[name]
            padded = np.zeros(math.prod(shape), dtype)
            padded[: len(stream)] = stream
            chunk = _sealed(deflate(padded))
            sink = self._sinks.get(name) or self._sinks.setdefault(name, self._part(_chunk_name(name, 1 + len(shape))))
            self._index[name].append((sink.bytes, len(chunk)))
            sink.write(chunk)

    def _part(self, name: str) -> Sink:
        return self.data.part(name)

    def finish(self) -> list[dict[str, Any]]:
        rows, done = self.tally.rows, list(self._sinks.values())
        for name, sink in self._sinks.items():
            sink.write(_sealed(b"".join(_ENTRY.pack(*entry) for entry in self._index[name])))
        tables = {"lengths": self._lengths, "crc32c": self._seals}
        for name, shape in _tables(rows, self._shapes).items():
            if rows:
                table = np.array(tables[name], _U4).reshape(shape)
                done.append(self._write(_chunk_name(name, len(shape)), _sealed(deflate(table))))
        for name, metadata in _metadata(rows, self._shapes).items():
            done.append(self._write(name, _json(metadata)))
        return sorted((sink.record() for sink in done), key=lambda x: str(x["name"]))

    def _write(self, name: str, data: bytes) -> Sink:
        sink = self._part(name)
        sink.write(data)
        return sink


class ZarrShard(Shard):
    """Reads one group."""

    def open(self, objects: list[dict[str, Any]]) -> str:
        root = str(objects[0]["name"]).partition(".zarr/")[0] + ".zarr"
        self._shapes = self.form.shapes(self.form.seq_len)
        metadata = {name: _json(fields) for name, fields in _metadata(self.rows, self._shapes).items()}
        tables, arrays = _tables(self.rows, self._shapes) if self.rows else {}, self._shapes if self.rows else {}
        chunks = {name: _chunk_name(name, len(shape)) for name, shape in tables.items()}
        chunks |= {name: _chunk_name(name, 1 + len(shape)) for name, (_, shape) in arrays.items()}
        names = [*metadata, *chunks.values()]
        if {str(x["name"]).removeprefix(f"{root}/") for x in objects} != set(names):
            raise CorruptCacheError(f"shard {self.shard} is committed as other objects than a shard of its rows has")
        opened = self.storage.map(lambda name: self.require(objects, f"{root}/{name}"), names)
        files: dict[str, Readable] = dict(zip(names, opened, strict=True))

        most = {name: 4 * len(text) for name, text in metadata.items()}
        most |= {chunks[name]: 1024 + 8 * math.prod(shape) for name, shape in tables.items()}
        for name, size in most.items():
            if files[name].size > size:
                raise CorruptCacheError(f"{files[name].name} is larger than it can be in a shard of {self.rows} rows")
        end = _ENTRY.size * self.rows + 4  # bytes of an array's index
        for name in arrays:
            if files[chunks[name]].size < end:
                raise CorruptCacheError(f"{files[chunks[name]].name} has no index of {self.rows} rows")
        requests = [(files[name], 0, files[name].size) for name in most]
        requests += [(files[chunks[name]], files[chunks[name]].size - end, end) for name in arrays]
        found = dict(zip((*most, *arrays), self.storage.read_ranges(requests), strict=True))

        for name, text in metadata.items():
            if not _says(found[name], text):
                raise CorruptCacheError(
                    f"{files[name].name} does not describe a shard of {self.rows} rows of this cache"
                )
        try:
            numbers = [
                read_stream(_unsealed(found[chunks[name]], name), _U4, shape).reshape(shape)
                for name, shape in tables.items()
            ]
            indexes = {name: _unsealed(found[name], f"the index of {name}") for name in arrays}
        except (CorruptCacheError, ValueError) as error:
            raise CorruptCacheError(f"{self.storage.where(root)}: {error}") from None
        self._lengths, self._seals = numbers or [np.zeros(0, _U4)] * 2
        self._arrays: dict[str, tuple[Readable, NDArray[np.uint64]]] = {
            name: (files[chunks[name]], np.frombuffer(index, "<u8").reshape(-1, 2)) for name, index in indexes.items()
        }
        return root

    def record(self, row: int) -> Record:
        *lengths, positions = (int(n) for n in self._lengths[row])
        self.form.shapes(positions)
        requests = []
        for name in self._shapes:
            file, index = self._arrays[name]
            start, size = (int(n) for n in index[row])
            if start + size > file.size - index.nbytes - 4:  # the mark of a missing chunk is 2^64 - 1
                raise CorruptCacheError(f"its chunk of {name} is missing")
            requests.append((file, start, size))
        streams = {}
        for (name, (dtype, shape)), length, data in zip(
            self._shapes.items(), lengths, self.storage.read_ranges(requests), strict=True
        ):
            stream = read_stream(_unsealed(data, f"its chunk of {name}"), dtype, shape)
            if stream.size != math.prod(shape) or length > stream.size:
                raise CorruptCacheError(f"its chunk of {name} has another size")
            streams[name] = stream[:length]
        if int(self._seals[row]) != row_seal(self.shard, row, positions, streams.values()):
            raise CorruptCacheError("its crc32c does not match")
        return Record(positions=positions, streams=streams)


def _says(text: bytes, metadata: bytes) -> bool:
    try:
        return canonical(parse(text)) == canonical(parse(metadata))
    except ValueError:
        return False
