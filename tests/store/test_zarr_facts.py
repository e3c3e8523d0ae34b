"""What zarr itself does with damage, and why our shards are written as they are. Each fact is of zarr-python."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from kdcache.errors import CorruptCacheError
from kdcache.store.commits import read_commits
from kdcache.store.local import LocalStorage
from kdcache.store.publish import open_shard
from kdcache.store.row_format import Record
from kdcache.store.zarr_store import ZarrShard, ZarrShardWriter
from kdcache.testing.example_rows import example_manifest, example_rows, write_cache


def silent_flips(path: Path, codecs: list[object]) -> float:
    """The share of single flipped bits of a chunk that zarr-python reads back as other numbers, with no error."""
    random = np.random.default_rng(0)
    values = np.round(1000 * random.standard_normal((64, 8))).astype("<f4")
    array = zarr.create_array(path, shape=values.shape, chunks=values.shape, dtype="float32", compressors=codecs)
    array[:] = values
    chunk = path / "c/0/0"
    data, silent = chunk.read_bytes(), 0
    places = random.integers(0, 8 * len(data), 200)
    for at in places:
        damaged = bytearray(data)
        damaged[at // 8] ^= 1 << at % 8
        chunk.write_bytes(damaged)
        with contextlib.suppress(Exception):
            silent += not np.array_equal(zarr.open_array(path, mode="r")[:], values)
    return silent / len(places)


def test_without_crc32c_most_flipped_bits_are_believed(tmp_path: Path) -> None:
    assert silent_flips(tmp_path / "plain", []) == 1.0
    assert silent_flips(tmp_path / "zstd", [ZstdCodec(level=3)]) > 0.5
    assert silent_flips(tmp_path / "crc32c", [ZstdCodec(level=3), Crc32cCodec()]) == 0.0


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "cache")


def test_a_missing_chunk_is_the_fill_value_in_zarr_and_an_error_here(storage: LocalStorage) -> None:
    manifest = example_manifest("zarr")
    rows = example_rows(manifest, 4)
    standing = write_cache(storage, manifest, rows)
    root = storage.folder / "shards/00000.zarr"
    (root / "tokens/c/0/0").unlink()
    (root / "values/c/0/0/0").unlink()
    group = zarr.open_group(root, mode="r")
    assert (group["tokens"][:] == 65535).all()  # poison: no vocabulary of this width has such an id
    assert np.isnan(group["values"][:]).all()
    with pytest.raises(CorruptCacheError, match="tokens/c/0/0 cannot be read"):
        open_shard(storage, standing, read_commits(storage, standing)[0]).read(0)


def test_an_inner_chunk_that_the_index_calls_missing_is_an_error_here(storage: LocalStorage) -> None:
    """In zarr-python the row reads as poison; that the index is sealed does not say that it is whole."""
    manifest = example_manifest("zarr")
    standing = write_cache(storage, manifest, example_rows(manifest, 4))
    chunk = storage.folder / "shards/00000.zarr/tokens/c/0/0"
    data = chunk.read_bytes()
    index = bytearray(data[-68:-4])
    index[32:48] = b"\xff" * 16
    chunk.write_bytes(data[:-68] + index + struct.pack("<I", google_crc32c.value(bytes(index))))
    group = zarr.open_group(storage.folder / "shards/00000.zarr", mode="r")
    assert (group["tokens"][2] == 65535).all() and (group["tokens"][1] != 65535).any()
    shard = open_shard(storage, standing, read_commits(storage, standing)[0])
    shard.read(1)
    with pytest.raises(CorruptCacheError, match=r"row 2: its chunk of tokens is missing"):
        shard.read(2)


def test_rows_of_nothing_but_the_fill_value_are_written(storage: LocalStorage) -> None:
    """zarr-python leaves such a chunk out unless told otherwise; here a chunk that is not there is always damage."""
    form = example_manifest("zarr").row_format
    fill = {
        name: np.full(int(np.prod(shape)), np.nan if dtype.kind == "f" else np.iinfo(dtype).max, dtype)
        for name, (dtype, shape) in form.shapes(form.seq_len).items()
    }
    row, targets = example_rows(example_manifest("zarr"), 1)[0]
    with ZarrShardWriter(storage, 0, form) as writer:
        for _ in range(3):
            writer.write(row, targets, record=Record(positions=form.seq_len, streams=fill))
        writer.publish(ZarrShard)
    root = storage.folder / "shards/00000.zarr"
    for name, stream in fill.items():
        chunk = next(p for p in (root / name / "c").rglob("*") if p.is_file()).read_bytes()
        index = np.frombuffer(chunk[-52:-4], "<u8").reshape(3, 2)
        assert (index[:, 1] > 4).all()
        assert index[:, 1].sum() + 52 == len(chunk)
        found = zarr.open_group(root, mode="r")[name][:]
        assert np.array_equal(found.reshape(3, -1), np.tile(stream, (3, 1)), equal_nan=stream.dtype.kind == "f")
    omitted = zarr.create_array(storage.folder / "z", shape=(4,), chunks=(4,), dtype="uint16", fill_value=65535)
    omitted[:] = 65535
    assert not list((storage.folder / "z").rglob("c"))


def test_the_metadata_says_what_protects_a_row(storage: LocalStorage) -> None:
    manifest = example_manifest("zarr")
    write_cache(storage, manifest, example_rows(manifest, 4))
    group = zarr.open_group(storage.folder / "shards/00000.zarr", mode="r")
    for name, (dtype, shape) in manifest.row_format.shapes(manifest.seq_len).items():
        array = group[name]
        (sharding,) = array.metadata.codecs
        assert (array.shape, array.dtype) == ((4, *shape), dtype)
        assert sharding.chunk_shape == (1, *shape) and sharding.index_location.value == "end"
        assert [type(c) for c in sharding.codecs] == [BytesCodec, ZstdCodec, Crc32cCodec]
        assert [type(c) for c in sharding.index_codecs] == [BytesCodec, Crc32cCodec]
        fill = array.metadata.fill_value
        assert np.isnan(fill) if dtype.kind == "f" else fill in (np.iinfo(dtype).min, np.iinfo(dtype).max)
    for name in ("lengths", "crc32c"):
        assert isinstance(group[name].metadata.codecs[-1], Crc32cCodec)
