"""Zarr shards: a zarr v3 group a shard, one array a stream, for object stores and array tools.

Every stream is an array `[rows, ...]` of its largest shape a row. What a row does not fill is zero, and `lengths` says
how much it fills; `crc32c` seals each row as the typed Arrow form does, over the plain streams. A row is an inner chunk
of the sharding codec, so it is one range of one object an array. An object holds a block of rows, so that a writer
holds no more than a block, whatever the size of a shard. Chunks are zstd and crc32c; the fill value is poison, all
chunks are written, and a missing one is an error here.

zarr-python writes all of it, metadata included, with its own codecs. `open_group` gives the group as zarr-python opens
it. Rows are read by range without it: nothing is allocated that the manifest does not promise, metadata that is not
what this shard must have is refused, and a row is read several times as fast (docs/decisions/0014).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from kdcache.codec.streams import LEVEL
from kdcache.errors import CacheError, CorruptCacheError
from kdcache.store.local import LocalStorage
from kdcache.store.row_format import Record, RowFormat, Shapes, read_stream, row_seal
from kdcache.store.sealed_json import canonical, parse
from kdcache.store.shards import Shard, ShardWriter
from kdcache.store.storage import NewData, Readable, Sink, Storage

if TYPE_CHECKING:
    import zarr

Indexes = dict[str, NDArray[np.uint64]]
"""`[rows of a block, 2]` start and size of each row's chunk in an object, by array."""

_ENTRY = struct.Struct("<QQ")
_LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
_ZSTD = {"name": "zstd", "configuration": {"level": LEVEL, "checksum": False}}
_CRC = {"name": "crc32c"}
_GROUP = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
_U4 = np.dtype("<u4")
_BLOCK_BYTES = 1 << 26  # of a block, its rows of the largest shape
_BLOCK_ROWS = 4096
_MOST_OBJECTS = 10_000  # of a shard: its commit names them all


def rows_per_block(form: RowFormat, rows: int) -> int:
    """Rows of an object: as many as 64 MiB hold in their largest shape, 4,096 and all at most, one at least."""
    return max(1, min(rows, _BLOCK_ROWS, _BLOCK_BYTES // form.most_bytes))


def array_metadata(dtype: np.dtype[Any], shape: tuple[int, ...], block: int | None) -> dict[str, Any]:
    """The zarr.json of an array, as zarr-python writes it.

    Args:
        dtype: of its elements.
        shape: rows first.
        block: rows of an object, each an inner chunk of its own; None for one chunk that holds all.
    """
    whole = [max(1, n) for n in shape]
    codecs: list[dict[str, Any]] = [_LITTLE if dtype.itemsize > 1 else {"name": "bytes"}, _ZSTD, _CRC]
    if block is not None:
        inner = {"chunk_shape": [1, *whole[1:]], "codecs": codecs, "index_codecs": [_LITTLE, _CRC]}
        codecs = [{"name": "sharding_indexed", "configuration": {**inner, "index_location": "end"}}]
        whole[0] = block
    return {
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": whole}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": "NaN" if dtype.kind == "f" else _poison(dtype),
        "codecs": codecs,
        "zarr_format": 3,
        "node_type": "array",
    }


def _poison(dtype: np.dtype[Any]) -> Any:
    """A number that no honest stream is full of."""
    return np.nan if dtype.kind == "f" else int(np.iinfo(dtype).max if dtype.kind == "u" else np.iinfo(dtype).min)


def _tables(rows: int, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The small arrays next to the streams, and their shapes."""
    return {"lengths": (rows, len(shapes) + 1), "crc32c": (rows,)}


def _metadata(rows: int, block: int, shapes: Shapes) -> dict[str, dict[str, Any]]:
    """What every zarr.json of a shard must say, by name."""
    found: dict[str, dict[str, Any]] = {"zarr.json": _GROUP}
    for name, (dtype, shape) in shapes.items():
        found[f"{name}/zarr.json"] = array_metadata(dtype, (rows, *shape), block)
    for name, shape in _tables(rows, shapes).items():
        found[f"{name}/zarr.json"] = array_metadata(_U4, shape, None)
    return found


def _chunk_name(array: str, dimensions: int, block: int = 0) -> str:
    return f"{array}/c/{block}" + "/0" * (dimensions - 1)


def _unsealed(data: bytes, what: str) -> bytes:
    if len(data) < 4 or struct.unpack("<I", data[-4:])[0] != google_crc32c.value(data[:-4]):
        raise CorruptCacheError(f"the crc32c of {what} does not match")
    return data[:-4]


class ZarrShardWriter(ShardWriter):
    """Writes one group, block by block, through zarr-python. Memory holds a block of rows, and an index of all."""

    suffix = ".zarr"
    folder = True

    def __init__(self, storage: Storage, shard: int, form: RowFormat) -> None:
        super().__init__(storage, shard, form)
        self._shapes = form.shapes(form.seq_len)
        self._parts = _Parts(self.data)
        self._group: zarr.Group | None = None
        self._arrays: dict[str, Any] = {}  # opened again from the group they would leave out empty chunks
        self._waiting: list[Record] = []
        self._block, self._most = rows_per_block(form, _BLOCK_ROWS), _MOST_OBJECTS // len(self._shapes) - 1
        self._lengths: list[list[int]] = []
        self._seals: list[int] = []

    def append(self, record: Record) -> None:
        self._seals.append(row_seal(self.shard, self.tally.rows, record.positions, record.streams.values()))
        self._lengths.append([len(stream) for stream in record.streams.values()] + [record.positions])
        self._waiting.append(record)
        if len(self._waiting) == self._block:
            self._flush()

    def _flush(self) -> None:
        """Write the rows that wait as one object of each array."""
        end, count = len(self._seals), len(self._waiting)
        if end > self._block * self._most:
            raise CacheError(f"{self.data.name} has too many rows for a zarr shard ({end:,}); make shards smaller")
        if self._group is None:  # a shard of less than a block has objects of its own size
            self._create(max(1, min(count, self._block)))
        for name, (dtype, shape) in self._shapes.items():
            block = np.zeros((count, math.prod(shape)), dtype)
            for row, record in zip(block, self._waiting, strict=True):
                row[: len(record.streams[name])] = record.streams[name]
            array = self._arrays[name]
            array.resize((end, *shape))
            if count:
                array[end - count :] = block.reshape(count, *shape)
        self._waiting.clear()

    def _create(self, block: int) -> None:
        import zarr

        self._group = zarr.create_group(_parts_store(self._parts))
        for name, (dtype, shape) in self._shapes.items():
            self._arrays[name] = self._array(name, dtype, (0, *shape), chunks=(1, *shape), shards=(block, *shape))

    def _array(self, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], **chunks: Any) -> Any:
        from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

        assert self._group is not None
        return self._group.create_array(
            name, shape=shape, dtype=dtype.name, fill_value=_poison(dtype), serializer=BytesCodec(endian="little"),
            compressors=[ZstdCodec(level=LEVEL, checksum=False), Crc32cCodec()], filters=None,
            config={"write_empty_chunks": True}, **chunks,
        )  # fmt: skip

    def finish(self) -> list[dict[str, Any]]:
        if self._waiting or self._group is None:
            self._flush()
        tables = {"lengths": self._lengths, "crc32c": self._seals}
        for name, shape in _tables(self.tally.rows, self._shapes).items():
            array = self._array(name, _U4, shape, chunks=tuple(max(1, n) for n in shape))
            if self.tally.rows:
                array[:] = np.array(tables[name], _U4).reshape(shape)
        return self._parts.finish()


class _Parts:
    """What a zarr store is given, on its way into the data of a shard: each object written once, then closed.

    Metadata, which zarr-python writes anew whenever an array grows, is kept until the end.
    """

    def __init__(self, data: NewData) -> None:
        self._data = data
        self._sinks: dict[str, Sink] = {}
        self.metadata: dict[str, bytes] = {}

    def put(self, name: str, value: bytes) -> None:
        """Keep or write an object."""
        if name.endswith("zarr.json"):
            self.metadata[name] = value
            return
        self._sinks[name] = sink = self._data.part(name)
        sink.write(value)
        sink.sync()

    def finish(self) -> list[dict[str, Any]]:
        """Write the metadata; the records of all objects."""
        for name, value in self.metadata.items():
            self._sinks[name] = sink = self._data.part(name)
            sink.write(value)
        return sorted((sink.record() for sink in self._sinks.values()), key=lambda x: str(x["name"]))


def _parts_store(parts: _Parts) -> Any:
    """A zarr store over `parts`, for an array that only grows; zarr-python is loaded by those only who write."""
    from zarr.abc.store import Store

    class PartsStore(Store):
        supports_writes, supports_deletes, supports_listing = True, False, False

        def __eq__(self, other: object) -> bool:
            return self is other

        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:  # noqa: ARG002
            found = parts.metadata.get(key)  # what was written is never asked for again
            return None if found is None else prototype.buffer.from_bytes(found)

        async def exists(self, key: str) -> bool:
            return key in parts.metadata

        async def set(self, key: str, value: Any) -> None:
            parts.put(key, value.to_bytes())

        def not_needed(self, *_: Any) -> Any:
            raise NotImplementedError

        get_partial_values = delete = list = list_prefix = list_dir = not_needed  # type: ignore[assignment]

    return PartsStore()


class ZarrShard(Shard):
    """Reads one group."""

    def open(self, objects: list[dict[str, Any]]) -> str:
        root = str(objects[0]["name"]).partition(".zarr/")[0] + ".zarr"
        self._root, self._objects = root, {str(x["name"]).removeprefix(f"{root}/"): x for x in objects}
        self._shapes, self._block = self.form.shapes(self.form.seq_len), rows_per_block(self.form, self.rows)
        blocks = -(-self.rows // self._block)
        metadata = _metadata(self.rows, self._block, self._shapes)
        tables = {
            _chunk_name(name, len(shape)): shape
            for name, shape in (_tables(self.rows, self._shapes) if self.rows else {}).items()
        }
        if blocks * len(self._shapes) > _MOST_OBJECTS or set(self._objects) != {
            *metadata,
            *tables,
            *self._names(blocks),
        }:
            raise CorruptCacheError(f"shard {self.shard} is committed as other objects than a shard of its rows has")
        most = {name: 4 * len(json.dumps(fields, indent=2)) for name, fields in metadata.items()}
        most |= {name: 1024 + 8 * math.prod(shape) for name, shape in tables.items()}
        files: dict[str, Readable] = dict(zip(most, self.storage.map(self._file, most), strict=True))
        for name, file in files.items():
            if file.size > most[name]:
                raise CorruptCacheError(f"{file.name} is larger than it can be in a shard of {self.rows} rows")
        first = self._chunks(0) if self.rows else {}
        requests = [(file, 0, file.size) for file in files.values()] + self._index_requests(first)
        read = self.storage.read_ranges(requests)  # all at once: over a network each is a request
        found, indexes = dict(zip(files, read, strict=False)), read[len(files) :]
        for name, fields in metadata.items():
            if not _says(found[name], fields):
                what = f"does not describe a shard of {self.rows} rows of this cache"
                raise CorruptCacheError(f"{files[name].name} {what}")
        try:
            numbers = [read_stream(_unsealed(found[n], n), _U4, s).reshape(s) for n, s in tables.items()]
            self._indexes = {0: _read_indexes(first, indexes)} if first else {}
        except (CorruptCacheError, ValueError) as error:
            raise CorruptCacheError(f"{self.storage.path_of(root)}: {error}") from None
        self._lengths, self._seals = numbers or [np.zeros(0, _U4)] * 2
        return root

    def _names(self, blocks: int) -> Iterator[str]:
        """The objects that hold the streams."""
        for name, (_, shape) in self._shapes.items():
            yield from (_chunk_name(name, 1 + len(shape), block) for block in range(blocks))

    def _file(self, name: str) -> Readable:
        """An object, open as long as it is among those that were read last."""
        full = f"{self._root}/{name}"
        found: Readable = self.storage.files.get((self, name), lambda: self.require([self._objects[name]], full))
        return found

    def _chunks(self, block: int) -> dict[str, Readable]:
        return {name: self._file(_chunk_name(name, 1 + len(shape), block)) for name, (_, shape) in self._shapes.items()}

    def _index_requests(self, files: dict[str, Readable]) -> list[tuple[Readable, int, int]]:
        """Where the indexes of the objects of a block lie."""
        end = _ENTRY.size * self._block + 4
        for file in files.values():
            if file.size < end:
                raise CorruptCacheError(f"{file.name} has no index of {self._block} rows")
        return [(file, file.size - end, end) for file in files.values()]

    def _index(self, block: int, files: dict[str, Readable]) -> Indexes:
        """The indexes of a block, kept once they are read."""
        if block not in self._indexes:
            found = self.storage.read_ranges(self._index_requests(files))
            self._indexes[block] = _read_indexes(files, found)
        return self._indexes[block]

    def record(self, row: int) -> Record:
        *lengths, positions = (int(n) for n in self._lengths[row])
        self.form.shapes(positions)
        block, at = divmod(row, self._block)
        files = self._chunks(block)
        index, requests = self._index(block, files), []
        for name, file in files.items():
            start, size = (int(n) for n in index[name][at])
            if start + size > file.size - index[name].nbytes - 4:  # the mark of a missing chunk is 2^64 - 1
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


def _read_indexes(names: Iterable[str], found: Iterable[bytes]) -> Indexes:
    return {
        name: np.frombuffer(_unsealed(data, f"the index of {name}"), "<u8").reshape(-1, 2)
        for name, data in zip(names, found, strict=True)
    }


_SILENT: dict[str, Any] = {"attributes": {}, "storage_transformers": [], "dimension_names": None}
"""What versions of zarr-python write or leave out."""


def _says(text: bytes, wanted: dict[str, Any]) -> bool:
    """Whether a zarr.json says this and nothing else."""
    try:
        found = parse(text)
        loud = [{k: v for k, v in x.items() if k not in _SILENT or v != _SILENT[k]} for x in (found, wanted)]
        return canonical(loud[0]) == canonical(loud[1])
    except (AttributeError, ValueError):
        return False


def open_group(storage: Storage, root: str) -> zarr.Group:
    """The group of a shard as zarr-python opens it, read-only.

    Args:
        storage: where the cache is; a folder, or a URL that fsspec knows.
        root: the shard's name.
    """
    import zarr

    if isinstance(storage, LocalStorage):
        return zarr.open_group(zarr.storage.LocalStore(storage.folder / root, read_only=True), mode="r")
    store = zarr.storage.FsspecStore.from_url(storage.path_of(root), read_only=True)
    return zarr.open_group(store, mode="r")
