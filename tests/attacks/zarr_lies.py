"""Lies of a zarr group: metadata, index, tables and chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from kdcache.codec.streams import deflate
from tests.attacks.forge import Attack, ZarrForgery, bomb, frame, sealed

Forge = Callable[[ZarrForgery], str]

_ZSTD = {"name": "zstd", "configuration": {"level": 3, "checksum": False}}
_MISSING = (1 << 64) - 1


def _meta(node: str, *path: Any, value: Any) -> Forge:
    """Another value somewhere in a zarr.json."""

    def change(fields: dict[str, Any]) -> None:
        inner: Any = fields
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return lambda f: f.metadata(node, change)


def _shape(rows: int) -> Forge:
    """Every array claims so many rows, and so does the commit."""

    def forge(f: ZarrForgery) -> str:
        def change(fields: dict[str, Any]) -> None:
            fields["shape"][0] = fields["chunk_grid"]["configuration"]["chunk_shape"][0] = rows

        for name in [x["name"] for x in f.objects if x["name"].count("/") == 3 and x["name"].endswith("zarr.json")]:
            f.metadata(name.split("/")[-2], change)
        if rows * 16 > sum(x["bytes"] for x in f.objects):
            return f.change_commit(rows=rows)
        f.change_commit(rows=rows, pieces=rows, tokens=1 << 30)
        return f.root

    return forge


def _index(array: str, row: int, start: int, size: int) -> Forge:
    return lambda f: f.index(array, lambda index: index.__setitem__(row, (start, size)))


def overlapping(f: ZarrForgery) -> str:
    """The chunk of row 1 starts inside that of row 0."""
    return f.index("tokens", lambda index: index.__setitem__(1, (index[0, 0] + 5, index[1, 1])))


def same_chunk(f: ZarrForgery) -> str:
    return f.index("tokens", lambda index: index.__setitem__(1, index[0]))


def chunk_into_index(f: ZarrForgery) -> str:
    """A chunk that is the index itself."""
    _, data = f.chunk("tokens")
    size = 16 * len(f.records) + 4
    return f.index("tokens", lambda index: index.__setitem__(0, (len(data) - size, size)))


def swapped(f: ZarrForgery) -> str:
    return f.index("tokens", lambda index: index.__setitem__([0, 1], index[[1, 0]]))


def _table(array: str, at: Any, value: int) -> Forge:
    return lambda f: f.table(array, lambda values: values.__setitem__(at, value))


def _replace(array: str, change: Callable[[bytes], bytes]) -> Forge:
    """Another file of chunks."""

    def forge(f: ZarrForgery) -> str:
        name, data = f.chunk(array)
        f.put(name, change(data))
        return f.root

    return forge


def another_crc(f: ZarrForgery) -> str:
    """The first chunk's checksum is of something else."""
    name, data = f.chunk("tokens")
    end = int(np.frombuffer(data[-4 - 16 * len(f.records) :], "<u8", 2)[1])
    f.put(name, data[: end - 4] + b"\0\0\0\0" + data[end:])
    return f.root


def a_file_less(f: ZarrForgery) -> str:
    name, _ = f.chunk("tokens")
    (f.folder / name).unlink()
    f.change_commit(objects=[x for x in f.objects if x["name"] != name])
    return "shard 0 is committed as other objects"


def a_file_more(f: ZarrForgery) -> str:
    f.put(f"{f.root}/tokens/c/1/0", f.chunk("tokens")[1])
    return "shard 0 is committed as other objects"


def an_array_more(f: ZarrForgery) -> str:
    f.put(f"{f.root}/more/zarr.json", (f.folder / f.root / "tokens/zarr.json").read_bytes())
    return "shard 0 is committed as other objects"


def renamed_root(f: ZarrForgery) -> str:
    """Half of it lies under another name that belongs to the shard."""
    for x in f.objects[:5]:
        f.put(x["name"].replace(".zarr/", "-a.zarr/", 1), (f.folder / x["name"]).read_bytes())
        f.change_commit(objects=[y for y in f.objects if y["name"] != x["name"]])
    return "shard 0 is committed as other objects"


def _described(change: Callable[[str], str]) -> Forge:
    def forge(f: ZarrForgery) -> str:
        name = f"{f.root}/tokens/zarr.json"
        return f.put(name, change((f.folder / name).read_text()).encode())

    return forge


def _more_spaces(text: str) -> str:
    return text + " " * (1 << 20)


_SHARDING = ("codecs", 0, "configuration")

ATTACKS = [
    Attack("an inner codec of another name", _meta("tokens", *_SHARDING, "codecs", 1, value={"name": "gzip"})),
    Attack("no crc32c", _meta("tokens", *_SHARDING, "codecs", 2, value=_ZSTD)),
    Attack("no crc32c of the index", _meta("tokens", *_SHARDING, "index_codecs", value=[])),
    Attack("an index at the start", _meta("tokens", *_SHARDING, "index_location", value="start")),
    Attack("no sharding", _meta("tokens", "codecs", value=[_ZSTD])),
    Attack("a pickle codec", _meta("tokens", "codecs", value=[{"name": "numcodecs.pickle"}])),
    Attack("another type", _meta("tokens", "data_type", value="uint64")),
    Attack("a big-endian type", _meta("ids", *_SHARDING, "codecs", 0, "configuration", "endian", value="big")),
    Attack("another shape", _meta("tokens", "shape", value=[1 << 40, 64])),
    Attack("a shape of negative numbers", _meta("tokens", "shape", value=[-1, 64])),
    Attack("a shape of true", _meta("tokens", "shape", 0, value=True)),
    Attack("another chunk grid", _meta("tokens", "chunk_grid", "configuration", "chunk_shape", value=[1, 1])),
    Attack("another inner chunk", _meta("tokens", *_SHARDING, "chunk_shape", value=[1, 32])),
    Attack("an irregular grid", _meta("tokens", "chunk_grid", "name", value="rectangular")),
    Attack("another fill value", _meta("tokens", "fill_value", value=0)),
    Attack("another separator", _meta("tokens", "chunk_key_encoding", "configuration", "separator", value=".")),
    Attack("a storage transformer", _meta("tokens", "storage_transformers", value=[{"name": "x"}])),
    Attack("attributes", _meta("tokens", "attributes", value={"a": 1})),
    Attack("another zarr", _meta("tokens", "zarr_format", value=2)),
    Attack("a zarr of 3.0", _meta("tokens", "zarr_format", value=3.0)),
    Attack("an array in place of the group", _meta("", "node_type", value="array")),
    Attack("consolidated metadata", _meta("", "consolidated_metadata", value={})),
    Attack("a table of another shape", _meta("lengths", "shape", value=[6, 1 << 30])),
    Attack("a table of another type", _meta("crc32c", "data_type", value="uint8")),
    Attack("metadata that is no JSON", _described(lambda text: text[:-5])),
    Attack("metadata that is too long", _described(_more_spaces)),
    Attack("metadata that nests", _described(lambda text: "[" * 1000 + "]" * 1000)),
    Attack("metadata with a key twice", _described(lambda text: text.replace("{", '{"zarr_format": 2,', 1))),
    Attack("metadata that is null", _described(lambda text: "null")),
    Attack("2^20 rows", _shape(1 << 20)),
    Attack("2^31 rows", _shape((1 << 32) - 1)),
    Attack("more rows than its index has", _shape(1000)),
    Attack("a chunk beyond the file", _index("tokens", 0, 1 << 40, 10)),
    Attack("a chunk that starts at 2^63", _index("tokens", 0, 1 << 63, 10)),
    Attack("a chunk of 2^63 bytes", _index("tokens", 0, 0, 1 << 63)),
    Attack("a chunk whose end overflows", _index("tokens", 0, _MISSING - 7, 16)),
    Attack("a missing chunk", _index("tokens", 0, _MISSING, _MISSING)),
    Attack("half a missing chunk", _index("values", 0, 0, _MISSING)),
    Attack("a chunk of no bytes", _index("tokens", 0, 0, 0)),
    Attack("a chunk of three bytes", _index("tokens", 0, 0, 3)),
    Attack("overlapping chunks", overlapping),
    Attack("one chunk for two rows", same_chunk),
    Attack("chunks in another order", swapped),
    Attack("a chunk that is the index", chunk_into_index),
    Attack("another crc32c", another_crc),
    Attack("an index of another crc32c", _replace("tokens", lambda d: d[:-4] + b"\0\0\0\0")),
    Attack("an index cut short", _replace("tokens", lambda d: d[:-16])),
    Attack("an index and nothing else", _replace("tokens", lambda d: sealed(b"\0" * 16))),
    Attack("no chunks", _replace("tokens", lambda d: b"")),
    Attack("a length beyond the shape", _table("lengths", (0, 0), 65)),
    Attack("a length of 2^32 - 1", _table("lengths", (0, 3), (1 << 32) - 1)),
    Attack("a length too small", _table("lengths", (0, 0), 3)),
    Attack("positions beyond the slots", _table("lengths", (0, -1), 65)),
    Attack("positions of 2^32 - 1", _table("lengths", (0, -1), (1 << 32) - 1)),
    Attack("another seal", _table("crc32c", 0, 7)),
    Attack("a table less a row", lambda f: f.table("lengths", lambda v: v[:-1])),
    Attack("a table of one row more", lambda f: f.table("crc32c", lambda v: np.append(v, v))),
    Attack("a table of 2^40 bytes", _replace("lengths", lambda d: sealed(frame(1 << 40)))),
    Attack("a table that unfolds to 256 MiB", _replace("crc32c", lambda d: sealed(bomb(1 << 28)))),
    Attack("a table that is no frame", _replace("lengths", lambda d: sealed(b"lengths"))),
    Attack("a table of another crc32c", _replace("lengths", lambda d: d[:-1] + bytes([d[-1] ^ 1]))),
    Attack("a table of no bytes", _replace("lengths", lambda d: b"")),
    Attack("a frame of 2^40 bytes", lambda f: f.frame(frame(1 << 40))),
    Attack("a frame of 2^64 - 1 bytes of values", lambda f: f.frame(frame((1 << 64) - 1), "values")),
    Attack("a frame that declares nothing", lambda f: f.frame(frame(None, 128))),
    Attack("a frame that declares more than it has", lambda f: f.frame(frame(128))),
    Attack("a frame that declares less than it has", lambda f: f.frame(frame(128, payload=1 << 16))),
    Attack("a frame that unfolds to 256 MiB", lambda f: f.frame(bomb(1 << 28))),
    Attack("a frame above the row's shape", lambda f: f.frame(deflate(np.zeros(65, "<u2")))),
    Attack("a frame below the row's shape", lambda f: f.frame(deflate(np.zeros(63, "<u2")))),
    Attack("a frame that ends inside a number", lambda f: f.frame(deflate(np.zeros(127, "u1")))),
    Attack("two frames", lambda f: f.frame(2 * deflate(np.zeros(32, "<u2")))),
    Attack("a chunk without compression", lambda f: f.frame(bytes(128))),
    Attack("a file less", a_file_less),
    Attack("a chunk more", a_file_more),
    Attack("an array more", an_array_more),
    Attack("two roots", renamed_root),
]
