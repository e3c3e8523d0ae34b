"""Files of other tools are not believed: damage is one sentence, and nothing in them is run."""

from __future__ import annotations

import io
import json
import lzma
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from kdcache.errors import ConfigError, CorpusError, KdcacheError
from kdcache.interop.array_record import read_records
from kdcache.interop.distillkit_codec import Compression
from kdcache.interop.formats import READ, find_format
from kdcache.interop.maxtext import MaxTextCache
from kdcache.interop.pickled_data import NUMPY, read_pickle
from kdcache.interop.torch_file import read_torch
from tests.interop import foreign_writers
from tests.interop.foreign_writers import Row, Written, put, tokens_file

K = 12


def rows(count: int = 5) -> list[Row]:
    random = np.random.default_rng(0)
    found = []
    for _ in range(count):
        logits = torch.from_numpy(3 * random.standard_normal((9, foreign_writers.VOCABULARY)))
        values, ids = logits.log_softmax(-1).topk(K)
        tokens = random.integers(0, foreign_writers.VOCABULARY, 9)
        found.append((tokens, [4, 5], ids.numpy(), values.numpy()))
    return found


WRITERS: dict[str, Callable[[Path, Sequence[Row]], Written]] = {
    "megatron": foreign_writers.megatron, "distillkit": foreign_writers.distillkit,
    "topk-jsonl": foreign_writers.topk_jsonl, "axolotl": foreign_writers.axolotl, "maxtext": foreign_writers.maxtext,
    "se-kd": foreign_writers.sekd,
}  # fmt: skip


def read_all(form: str, written: Written) -> int:
    path, tokens = written
    return sum(1 for _ in find_format(form, READ).open(str(path), None if tokens is None else str(tokens)).rows())


@pytest.mark.slow
@pytest.mark.parametrize("form", WRITERS)
def test_damage_is_one_sentence_or_other_numbers(tmp_path: Path, form: str) -> None:
    written = WRITERS[form](tmp_path, rows())
    assert read_all(form, written) == 5
    files = [written[0]] if written[0].is_file() else sorted(path for path in written[0].iterdir() if path.is_file())
    random, refused = np.random.default_rng(1), 0
    for file in files:
        data = file.read_bytes()
        for trial in range(24):
            damaged = bytearray(data)
            if trial % 3 == 0:
                damaged = damaged[: int(random.integers(0, len(data)))]
            else:
                for at in random.integers(0, len(data), 1 if trial % 3 == 1 else 20):
                    damaged[at] ^= 1 << int(random.integers(0, 8))
            file.write_bytes(damaged)
            try:
                read_all(form, written)
            except KdcacheError as error:
                refused += 1
                assert str(error) and "\n" not in str(error)
        file.write_bytes(data)
    assert refused > 2 and read_all(form, written) == 5


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_no_pickle_is_run(tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    buffer = io.BytesIO()
    torch.save({"values": _Evil(marker)}, buffer)
    with pytest.raises(CorpusError, match="names posix mkdir"):
        read_torch(buffer.getvalue(), "it")
    for protocol in range(6):
        with pytest.raises(CorpusError):
            read_pickle(pickle.dumps({"tokens": _Evil(marker)}, protocol), NUMPY, "it")
    record = foreign_writers.array_record([pickle.dumps(_Evil(marker))])
    (tmp_path / "x.array_record").write_bytes(record)
    with pytest.raises(CorpusError, match="posix mkdir"):
        list(MaxTextCache(str(tmp_path)).rows())
    folder, tokens = foreign_writers.megatron(tmp_path, rows())
    for tar in folder.glob("*.tar"):
        with tarfile.open(tar, "w") as archive:
            put(archive, "0.pt.zst", pa.compress(buffer.getvalue(), codec="zstd", asbytes=True))
    with pytest.raises(CorpusError, match="posix mkdir"):
        read_all("megatron", (folder, tokens))
    assert not marker.exists()


def test_programs_that_only_take_time_are_refused() -> None:
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    assert read_pickle(pickle.dumps(nested), {}, "it")  # finished once each, not 2 to the 60
    with pytest.raises(CorpusError, match="leads out of its storage"):
        buffer, other = io.BytesIO(), io.BytesIO()
        torch.save(torch.zeros(4), buffer)
        with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(other, "w") as new:
            for name in old.namelist():
                new.writestr(name, old.read(name).replace(b"K\x04\x85", b"K\x7f\x85"))
        read_torch(other.getvalue(), "it")
    with pytest.raises(CorpusError, match="bytes of something that is none"):
        read_pickle(b"cbuiltins\nbytes\n(I1000000000000\ntR.", NUMPY, "it")
    with pytest.raises(CorpusError, match="sets the state"):
        read_pickle(b"\x80\x02}q\x00}q\x01b.", NUMPY, "it")
    with pytest.raises(CorpusError, match="only numbers are read"):
        read_pickle(pickle.dumps(np.array([object()])), NUMPY, "it")


@pytest.mark.parametrize(
    "value",
    [
        {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": [1, 2**70, -1.5, "é", b"ab", None, True]},
        {"f": np.asfortranarray(np.random.default_rng(0).random((3, 2)).astype(np.float16)), "t": (1, (2,), [])},
        {"big": np.arange(5, dtype=">i4"), "empty": np.zeros((0, 3)), "many": list(range(2000))},
    ],
    ids=["plain", "fortran", "byte order"],
)
def test_pickled_numbers_are_read(value: dict[str, Any]) -> None:
    for protocol in range(6):
        found = read_pickle(pickle.dumps(value, protocol), NUMPY, "it")
        assert found.keys() == value.keys()
        for name, wanted in value.items():
            assert np.array_equal(found[name], wanted) if isinstance(wanted, np.ndarray) else found[name] == wanted


def test_torch_files_are_read() -> None:
    value = {
        "half": torch.randn(3, 4, 5).half(), "low": torch.arange(10).to(torch.uint16), "none": torch.zeros(0, 3),
        "turned": torch.arange(12).reshape(3, 4).T, "list": [torch.ones(2).bfloat16(), 7, "a"],
        "flag": torch.tensor([True, False]),
    }  # fmt: skip
    buffer = io.BytesIO()
    torch.save(value, buffer)
    found = read_torch(buffer.getvalue(), "it")
    for name in ("half", "low", "flag", "turned", "none"):
        assert found[name].dtype == value[name].dtype and torch.equal(found[name], value[name]), name
    assert torch.equal(found["list"][0], value["list"][0]) and found["list"][1:] == [7, "a"]


def test_a_file_that_the_library_of_array_record_wrote(tmp_path: Path) -> None:
    """Three records in one chunk, compressed; made by array_record 0.8.6 from safetensors files."""
    packed = Path(__file__).with_name("saved_by_maxtext.array_record.xz")
    path = tmp_path / "teacher_top_k_global.array_record"
    path.write_bytes(lzma.decompress(packed.read_bytes()))
    assert len(list(read_records(path))) == 3
    found = list(MaxTextCache(str(tmp_path)).rows())
    assert [len(row.tokens) for row in found] == [5, 3] * 3
    assert [row.piece_lengths.tolist() for row in found[:2] if row.piece_lengths is not None] == [[2, 3], [3]]
    np.testing.assert_array_equal(found[2].values, np.arange(15).reshape(5, 3) / 8 + 1)


_LARGE_BIN = {"element_bits": 99, "num_elements": 2, "scale_dtype": "float16"}
BAD_CONFIGS = [
    {}, {"d": 0, "k": 4, "exact_k": 4}, {"d": 10, "k": 4, "exact_k": 5}, {"d": 10, "k": "4", "exact_k": 4},
    {"d": 10, "k": 4, "exact_k": 4, "exact_dtype": "int8"}, {"d": 10, "k": 1 << 40, "exact_k": 4},
    {"d": 10, "k": 4, "exact_k": 2, "polynomial_terms": ["sin"]},
    {"d": 10, "k": 4, "exact_k": 2, "residual_bins": [_LARGE_BIN]},
    {"d": 10, "k": 4, "exact_k": 2, "residual_bins": [{"element_bits": 4}]}, ["d"],
]  # fmt: skip


@pytest.mark.parametrize("fields", BAD_CONFIGS, ids=lambda fields: json.dumps(fields)[:50])
def test_a_configuration_that_cannot_be(fields: Any) -> None:
    with pytest.raises(CorpusError):
        Compression.from_fields(fields, "it")


def test_bytes_as_distillkit_packs_them() -> None:
    """By hand: ids of 9 bits, the highest first; one bit a residual is -1 or 1; a line 1 + 2 t, exact values before."""
    made = Compression(
        d=512, k=4, exact_k=1, exact_dtype="float16", polynomial_terms=(0, 1), term_dtype="float32",
        residual_bins=(_bin(1, 2), _bin(4, 1)), delta_encoding=False,
    )  # fmt: skip
    data = np.float16([-0.5]).tobytes() + np.float32([1, 2]).tobytes()
    data += np.float32([0.25]).tobytes() + bytes([0b10000000]) + np.float32([0.5]).tobytes() + bytes([0b01100000])
    found = made.read_values(np.frombuffer(data, np.uint8)[None], "it")
    np.testing.assert_allclose(found, [[-0.5, 1 + 0.25, 3 - 0.25, 5 + 0.5 * (6 - 8)]])
    packed = np.array([[0b00000000, 0b11000000, 0b00111111, 0b11100000, 0b00010000]], np.uint8)
    assert made.read_ids(packed, "it").tolist() == [[1, 256, 511, 1]]
    assert made.write_ids(np.array([[1, 256, 511, 1]])).tolist() == packed.tolist()
    with pytest.raises(CorpusError, match="bytes a position"):
        made.read_ids(packed[:, :3], "it")
    with pytest.raises(CorpusError, match="are configured"):
        made.read_values(np.zeros((1, 99), np.uint8), "it")


def _bin(bits: int, count: int) -> Any:
    from kdcache.interop.distillkit_codec import Bin

    return Bin(scale_dtype="float32", element_bits=bits, num_elements=count)


def test_formats_without_tokens_need_a_file_of_them(tmp_path: Path) -> None:
    for form, write in (("megatron", foreign_writers.megatron), ("se-kd", foreign_writers.sekd)):
        (tmp_path / form).mkdir()
        path, _ = write(tmp_path / form, rows())
        with pytest.raises(ConfigError, match="tokens is not given"):
            find_format(form, READ).open(str(path))
    other = tokens_file(tmp_path, [(tokens[:3], [3], ids, values) for tokens, _, ids, values in rows()])
    with pytest.raises(CorpusError, match="which the file of tokens does not have"):
        read_all("se-kd", (path, other))
