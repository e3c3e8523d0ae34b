"""Both stores pass the one suite, on every place; and what the formats promise to other libraries."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import zarr
from numcodecs import Zstd
from numpy.typing import NDArray

import kdcache
from kdcache.store import zarr_store
from kdcache.store.arrow_layout import read_batch, read_blocks
from kdcache.store.arrow_store import ArrowShard, ArrowShardWriter
from kdcache.store.commits import read_commits
from kdcache.store.local import LocalStorage
from kdcache.store.manifest import Manifest
from kdcache.store.open_storage import open_storage
from kdcache.store.row_format import RowFormat
from kdcache.store.storage import Storage
from kdcache.store.zarr_store import ZarrShard, ZarrShardWriter
from kdcache.testing.example_rows import example_manifest, example_rows, write_cache
from kdcache.testing.store_conformance import Objects, StoreConformance
from tests.objects import Bucket


class InMemory:
    """The same in an object store; one manifest, because what differs is the place."""

    @pytest.fixture
    def new_place(self, tmp_path: Path) -> Callable[[str], Storage]:
        return lambda name: open_storage(f"memory:/{tmp_path}/{name}")

    @pytest.fixture
    def manifest(self, plain: Manifest) -> Manifest:
        return plain


@pytest.mark.slow
class InBucket(InMemory):
    """The same once more behind a real HTTP endpoint, with less damage of each kind: what differs is how it is met."""

    flips, damage_every = 2, 5

    @pytest.fixture
    def new_place(self, bucket: Bucket) -> Callable[[str], Storage]:
        return lambda name: open_storage(f"{bucket.url}/{name}")


def arrow_table(storage: Storage, objects: Objects) -> tuple[bytes, pa.ipc.RecordBatchFileReader]:
    data = b"".join(storage.chunks(objects[0]["name"]))
    return data, pa.ipc.open_file(pa.BufferReader(data))


class TestArrow(StoreConformance):
    store, writer, reader = "arrow", ArrowShardWriter, ArrowShard

    def streams(self, storage: Storage, objects: Objects, form: RowFormat) -> list[dict[str, NDArray[Any]]]:
        _, file = arrow_table(storage, objects)
        types = {name: dtype for name, (dtype, _) in form.shapes(0).items()}

        def stream(value: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
            return (
                np.array(value, dtype) if form.typed else np.frombuffer(Zstd().decode(value) if value else b"", dtype)
            )

        return [
            {name: stream(row[name], dtype) for name, dtype in types.items()} for row in file.read_all().to_pylist()
        ]

    def together(self, form: RowFormat) -> int:
        return 4 if form.typed else 1

    def spans(self, storage: Storage, objects: Objects, row: int) -> Iterator[tuple[str, int, int]]:
        data, file = arrow_table(storage, objects)
        if pa.types.is_list(file.schema.field(0).type):
            for start, end in arrow_buffers(storage, objects[0]["name"], file.schema, row // 4):
                yield objects[0]["name"], start, end
            return
        batch, at, base = file.get_batch(row // 4), row % 4, pa.py_buffer(data).address
        for column in batch.columns:
            where = [0 if buffer is None else buffer.address - base for buffer in column.buffers()]
            if pa.types.is_binary(column.type):
                start, end = np.frombuffer(data, "<i4", 2, where[1] + 4 * at)
                yield objects[0]["name"], where[2] + int(start), where[2] + int(end)
            else:
                yield objects[0]["name"], where[1] + 4 * at, where[1] + 4 * at + 4


def arrow_buffers(storage: Storage, name: str, schema: pa.Schema, index: int) -> Iterator[tuple[int, int]]:
    """Where the compressed buffers of a batch of list columns lie."""
    file, streams = storage.open(name), len(schema) - 2
    start, metadata, _, body = read_blocks(storage, file, schema)[index].tolist()
    data = file.read(start, metadata + body)
    found = read_batch(data, metadata, 2 * streams + 2, 4 * streams + 4, True).buffers
    for offset, length in found.tolist():
        if length:
            yield start + metadata + offset, start + metadata + offset + length


class TestZarr(StoreConformance):
    store, writer, reader = "zarr", ZarrShardWriter, ZarrShard

    def streams(self, storage: Storage, objects: Objects, form: RowFormat) -> list[dict[str, NDArray[Any]]]:
        group = zarr_group(storage, objects)
        names = list(form.shapes(0))
        lengths = np.asarray(group["lengths"][:])
        return [
            {name: np.asarray(group[name][row]).ravel()[: lengths[row, column]] for column, name in enumerate(names)}
            for row in range(len(lengths))
        ]

    def spans(self, storage: Storage, objects: Objects, row: int) -> Iterator[tuple[str, int, int]]:
        group = zarr_group(storage, objects)
        block = group["tokens"].metadata.chunk_grid.chunk_shape[0]
        for name in (str(x["name"]) for x in objects if not x["name"].endswith("zarr.json")):
            data = b"".join(storage.chunks(name))
            if "/crc32c/" in name or "/lengths/" in name:
                yield name, 0, len(data)
            elif f"/c/{row // block}/" in name:
                start, size = np.frombuffer(data, "<u8", 2, len(data) - 4 - 16 * (block - row % block))
                yield name, int(start), int(start + size)


@pytest.mark.long
class TestZarrInBlocks(TestZarr):
    """The same where an object holds three rows, so that shards have several of each array, the last one not full."""

    @pytest.fixture
    def manifest(self, plain: Manifest) -> Manifest:
        return plain

    @pytest.fixture(autouse=True)
    def small_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(zarr_store, "_BLOCK_ROWS", 3)


class TestArrowInMemory(InMemory, TestArrow):
    pass


@pytest.mark.long
class TestZarrInMemory(InMemory, TestZarr):
    pass


@pytest.mark.slow
class TestArrowInBucket(InBucket, TestArrow):
    pass


@pytest.mark.slow
class TestZarrInBucket(InBucket, TestZarr):
    damage_every = 25  # of some sixty objects, each of which takes a request for every look


def zarr_group(storage: Storage, objects: Objects) -> Any:
    """A shard as zarr-python opens it."""
    from zarr.core.buffer import default_buffer_prototype

    root = objects[0]["name"].partition(".zarr/")[0] + ".zarr/"
    make = default_buffer_prototype().buffer.from_bytes
    data = {x["name"].removeprefix(root): make(b"".join(storage.chunks(x["name"]))) for x in objects}
    return zarr.open_group(zarr.storage.MemoryStore(data), mode="r")


@pytest.mark.parametrize("precision", ["float32", "6"])
def test_content_is_the_same_in_both_stores(tmp_path: Path, precision: str) -> None:
    found = []
    for store in ("arrow", "zarr"):
        manifest, storage = example_manifest(store, precision=precision), LocalStorage(tmp_path / store)
        commits = read_commits(storage, write_cache(storage, manifest, example_rows(manifest, 7)))
        found.append([(c.rows, c.positions, c.entries, c.tokens_sha256, c.content_sha256) for c in commits.values()])
    assert found[0] == found[1]


def test_nothing_but_the_suite_needs_pytest() -> None:
    package = Path(kdcache.__file__).parent
    needy = {p.name for p in package.rglob("*.py") if "import pytest" in p.read_text()}
    users = {p.name for p in package.rglob("*.py") if re.search(r"(from|import) kdcache\.testing", p.read_text())}
    assert needy == {"store_conformance.py"} and users <= {"testing.py", "store_conformance.py"}
