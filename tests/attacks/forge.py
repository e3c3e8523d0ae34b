"""Forge: what a liar needs. Every lie is sealed again: row seals, chunk checksums, sizes, sha256 and record checksums.

A `Forgery` is a copy of an honest cache whose objects and records are changed so that no checksum tells. What is left
to tell is the structure: a reader that trusts a header loses here.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
from numcodecs import Zstd

from kdcache.store.arrow_columns import columns_of
from kdcache.store.arrow_layout import read_batch
from kdcache.store.commit import Commit, commit_name
from kdcache.store.local import LocalStorage
from kdcache.store.manifest import NAME, Manifest
from kdcache.store.publish import new_shard, open_shard
from kdcache.store.registry import find_store
from kdcache.store.row_format import Record, row_seal
from kdcache.store.seal import SEAL
from kdcache.store.sealed_json import seal

SHARD = 0
"""The shard that lies."""


@dataclass(frozen=True)
class Attack:
    """One lie.

    Attributes:
        name: of the test.
        forge: changes a copy of an honest cache; returns what the error must name.
    """

    name: str
    forge: Callable[[Forgery], str]

    def __str__(self) -> str:
        return self.name


class Forgery:
    """A copy of an honest cache, to be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.storage = folder, LocalStorage(folder)
        (folder / SEAL).unlink(missing_ok=True)  # commits are what is attacked; the seal has attacks of its own
        self.manifest = Manifest.read(self.storage)
        self.commit = Commit.read(self.storage, SHARD, self.manifest.sha256)
        assert self.commit is not None
        self.form = self.manifest.row_format
        shard = open_shard(self.storage, self.manifest, self.commit)
        self.records = [shard.read_with_record(row)[2] for row in range(self.commit.rows)]

    # Records

    def change_manifest(self, **fields: Any) -> str:
        """Other fields in the manifest, and commits that belong to it."""
        record = {**json.loads((self.folder / NAME).read_text()), **fields}
        (self.folder / NAME).write_bytes(seal(record))
        return self._adopt_commits()

    def raw_manifest(self, change: Callable[[str], str]) -> str:
        """The manifest's text changed; its checksum is of what a lenient reader would take."""
        text = change((self.folder / NAME).read_text())
        try:
            fields = {k: v for k, v in json.loads(text).items() if k != "checksum"}
        except ValueError:  # nobody can have read it to seal it
            fields = {}
        canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        sha256 = hashlib.sha256(canonical.encode(errors="surrogatepass")).hexdigest()
        at = text.rindex('"checksum": "') + 13
        (self.folder / NAME).write_text(text[:at] + sha256 + text[at + 64 :])
        return NAME

    def _adopt_commits(self) -> str:
        sha256 = json.loads((self.folder / NAME).read_text())["checksum"]
        for path in (self.folder / "commits").iterdir():
            path.write_bytes(seal({**json.loads(path.read_text()), "manifest_sha256": sha256}))
        return NAME

    def change_commit(self, **fields: Any) -> str:
        """Other fields in the commit of the shard."""
        path = self.folder / commit_name(SHARD)
        path.write_bytes(seal({**json.loads(path.read_text()), **fields}))
        return commit_name(SHARD)

    # Objects

    @property
    def objects(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = json.loads((self.folder / commit_name(SHARD)).read_text())["objects"]
        return found

    def put(self, name: str, data: bytes) -> str:
        """An object with these bytes, committed as such."""
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(data)
        mine = {"name": name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        objects = [x for x in self.objects if x["name"] != name]
        self.change_commit(objects=sorted([*objects, mine], key=lambda x: str(x["name"])))
        return name

    def write_records(self, change: Callable[[Record], Record]) -> str:
        """The shard written anew by the store itself, its first row a lie."""
        scratch = LocalStorage(self.folder / "scratch")
        with new_shard(scratch, self.manifest, SHARD) as writer:
            for row, record in enumerate(self.records):
                writer.append(change(record) if row == 0 else record)
                writer.tally.rows += 1
            for data in writer.publish(find_store(self.manifest.store).reader)[0]:
                self.put(data["name"], (scratch.folder / data["name"]).read_bytes())
        return f"{self.objects[0]['name'].split('.')[0]}"

    def stream(self, **changes: Callable[[np.ndarray[Any, Any]], Any]) -> str:
        """The shard with some streams of its first row changed."""

        def change(record: Record) -> Record:
            streams = dict(record.streams)
            for name, f in changes.items():
                streams[name] = np.asarray(f(streams[name].copy()), streams[name].dtype)
            return Record(positions=record.positions, streams=streams)

        return self.write_records(change)


class ArrowForgery(Forgery):
    """An Arrow cache, its shard written by pyarrow itself."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.columns = columns_of(self.form)

    @property
    def name(self) -> str:
        return str(self.objects[0]["name"])

    @property
    def data(self) -> bytes:
        return (self.folder / self.name).read_bytes()

    def rows(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = pa.ipc.open_file(pa.BufferReader(self.data)).read_all().to_pylist()
        return found

    def seal_rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for number, row in enumerate(rows):
            streams: list[Any] = [row[name] or b"" for name in self.form.shapes(0)]
            if self.form.typed:
                types = [dtype for dtype, _ in self.form.shapes(0).values()]
                streams = [np.array(list(s), dtype) for s, dtype in zip(streams, types, strict=True)]
            row["crc32c"] = row_seal(SHARD, number, row["positions"], streams)
        return rows

    def write_rows(
        self, rows: list[dict[str, Any]], schema: pa.Schema | None = None, options: Any = None, batch_rows: int = 0
    ) -> str:
        """The shard of these rows, in batches of the right size."""
        schema, sink, step = schema or self.columns.schema, pa.BufferOutputStream(), batch_rows
        step = step or self.columns.batch_rows
        options = options or pa.ipc.IpcWriteOptions(compression="zstd" if self.columns.compressed else None)
        with pa.ipc.new_file(sink, schema, options=options) as writer:
            for start in range(0, len(rows), step):
                writer.write_batch(pa.RecordBatch.from_pylist(rows[start : start + step], schema=schema))
        return self.put(self.name, sink.getvalue().to_pybytes())

    def frame(self, frame: bytes, column: str = "tokens") -> str:
        """The first row with another frame in one of its columns."""
        rows = self.rows()
        rows[0][column] = frame
        return self.write_rows(self.seal_rows(rows))

    def patch(self, old: bytes, new: bytes, *, last: bool = False) -> str:
        """Some bytes of the file replaced by others."""
        data = self.data
        assert len(old) == len(new) and data.count(old) >= 1
        at = data.rindex(old) if last else data.index(old)
        return self.put(self.name, data[:at] + new + data[at + len(old) :])

    def footer(self) -> tuple[int, bytes]:
        """Where the footer starts, and its bytes."""
        data = self.data
        length = struct.unpack("<i", data[-10:-6])[0]
        return len(data) - 10 - length, data[-10 - length : -10]

    def first_buffers(self) -> np.ndarray[Any, Any]:
        """Offset and length of each buffer of the first batch, in its body."""
        start, metadata = struct.unpack("<qi", self.first_block()[:12])
        data = self.data
        columns = self.columns
        return read_batch(data[start:], metadata, columns.nodes, columns.buffers, columns.compressed).buffers.copy()

    def first_block(self) -> bytes:
        """The bytes in the footer that say where the first batch lies."""
        offset = self.data.index(b"\xff\xff\xff\xff", 12)  # after the schema message
        found: bytes = struct.pack("<q", offset)
        assert self.footer()[1].count(found) == 1
        at = self.footer()[1].index(found)
        return self.footer()[1][at : at + 24]


class ZarrForgery(Forgery):
    """A zarr cache, its chunks and metadata changed byte by byte."""

    @property
    def root(self) -> str:
        return str(self.objects[0]["name"].partition(".zarr/")[0]) + ".zarr"

    def chunk(self, array: str) -> tuple[str, bytes]:
        """Name and bytes of the one chunk of an array."""
        name = next(x["name"] for x in self.objects if x["name"].startswith(f"{self.root}/{array}/c/"))
        return name, (self.folder / name).read_bytes()

    def index(self, array: str, change: Callable[[np.ndarray[Any, Any]], Any]) -> str:
        """The index of an array changed and sealed again."""
        name, data = self.chunk(array)
        size = 16 * len(self.records)
        index = np.frombuffer(data[-4 - size : -4], "<u8").reshape(-1, 2).copy()
        change(index)
        self.put(name, data[: -4 - size] + sealed(index.tobytes()))
        return self.root

    def frame(self, frame: bytes, array: str = "tokens") -> str:
        """The first row's chunk of an array replaced by another frame, sealed, at the end of the others."""
        name, data = self.chunk(array)
        size = 16 * len(self.records)
        index = np.frombuffer(data[-4 - size : -4], "<u8").reshape(-1, 2).copy()
        chunk = sealed(frame)
        index[0] = len(data) - 4 - size, len(chunk)
        self.put(name, data[: -4 - size] + chunk + sealed(index.tobytes()))
        return self.root

    def table(self, array: str, change: Callable[[np.ndarray[Any, Any]], Any]) -> str:
        """A table beside the streams changed and sealed again."""
        name, data = self.chunk(array)
        values = np.frombuffer(Zstd().decode(data[:-4]), "<u4").reshape(len(self.records), -1).copy()
        values = result if (result := change(values)) is not None else values
        self.put(name, sealed(bytes(Zstd(level=3).encode(values))))
        return self.root

    def metadata(self, node: str, change: Callable[[dict[str, Any]], Any]) -> str:
        """The zarr.json of an array changed."""
        name = f"{self.root}/{node}/zarr.json" if node else f"{self.root}/zarr.json"
        fields = json.loads((self.folder / name).read_text())
        change(fields)
        return self.put(name, json.dumps(fields, indent=2).encode())


def sealed(data: bytes) -> bytes:
    """Bytes and their crc32c."""
    return data + struct.pack("<I", google_crc32c.value(data))


def frame(content_size: int | None, payload: int = 64) -> bytes:
    """A zstd frame of `payload` zeros in one run-length block that declares any content size, or none."""
    block = struct.pack("<I", 1 | 1 << 1 | payload << 3)[:3] + b"\0"
    if content_size is None:
        return b"\x28\xb5\x2f\xfd\x00\x58" + block
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", content_size) + block


def bomb(size: int) -> bytes:
    """A sound zstd frame that unfolds to so many zeros."""
    return bytes(Zstd(level=1).encode(np.zeros(size, np.uint8)))


def order(ids: Any, dtype: str = "<u2") -> str:
    """An order of ids as a manifest holds it."""
    return base64.b64encode(Zstd(level=3).encode(np.array(ids, dtype))).decode()
