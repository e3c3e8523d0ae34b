"""Torch files: tensors, lists and dicts out of what `torch.save` wrote, without unpickling it.

The file is a zip archive of a pickle, `data.pkl`, and of the bytes of each storage, `data/KEY`, uncompressed. The
pickle is read by `pickled_data`, which runs nothing; the storages are plain numbers.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from typing import Any

from kdcache.errors import CorpusError
from kdcache.interop.pickled_data import NUMPY, Function, read_pickle
from kdcache.lazy_torch import torch

_MOST_STORAGE = 1 << 34
_DAMAGE = (
    zipfile.BadZipFile, NotImplementedError, OSError, RuntimeError, ValueError, KeyError, EOFError, struct.error,
    IndexError, zlib.error,
)  # fmt: skip
"""What zipfile raises of an archive that is damaged."""
_TYPES = {
    "FloatStorage": "float32", "DoubleStorage": "float64", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool", "UInt16Storage": "uint16",
}  # fmt: skip
_UNTYPED = ("uint16", "uint32", "uint64")
"""Types that have no storage class: the tensor names them, and its storage is of bytes."""


def read_torch(data: bytes, where: str) -> Any:
    """What was saved, tensors on the CPU.

    Args:
        data: the file.
        where: its name, for messages.

    Raises:
        CorpusError: it is damaged, was written by a version of torch before 1.6, or holds anything but data.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
        names = archive.namelist()
        pickle = next(name for name in names if name.endswith("data.pkl"))
        root = pickle[: -len("data.pkl")]
        order = archive.read(f"{root}byteorder") if f"{root}byteorder" in names else b"little"
        program = archive.read(pickle)
    except (*_DAMAGE, StopIteration) as error:
        raise CorpusError(f"{where} is no file of torch.save, or a damaged one") from error
    if order != b"little":
        raise CorpusError(f"{where} was written on a machine of another byte order")

    def stored(identity: Any) -> Any:
        kind, storage, key, *_ = identity
        if kind != "storage" or not isinstance(storage, _Storage):
            raise CorpusError("it names data that is no storage")
        name = f"{root}data/{key}"
        try:
            info = archive.getinfo(name)
            if info.file_size > _MOST_STORAGE or info.compress_type != zipfile.ZIP_STORED:
                raise CorpusError(f"the storage {key} is compressed, or larger than it can be")
            return _Stored(archive.read(name), storage.dtype)
        except _DAMAGE as error:
            raise CorpusError(f"the storage {key} is missing or damaged") from error

    return read_pickle(program, _FUNCTIONS, where, stored)


class _Storage:
    """A class of storages, by the type of its numbers."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def __call__(self, *_: Any) -> Any:
        raise CorpusError("it calls a storage")


class _Stored:
    """The bytes of a storage."""

    def __init__(self, data: bytes, dtype: str) -> None:
        self.data, self.dtype = data, dtype


def _tensor(stored: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Any:
    """A tensor over a storage; none of its numbers may lie outside."""
    return _strided(stored, stored.dtype, offset, size, stride)


def _tensor_of_type(stored: Any, offset: Any, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any) -> Any:
    """The same, of a type that has no storage class."""
    return _strided(stored, dtype.dtype, offset, size, stride)


def _strided(stored: Any, dtype: str, offset: Any, size: Any, stride: Any) -> Any:
    if not isinstance(stored, _Stored):
        raise CorpusError("a tensor has no storage")
    flat = torch.frombuffer(bytearray(stored.data), dtype=getattr(torch, dtype)) if stored.data else torch.empty(0)
    numbers = [int(each) for each in (offset, *size, *stride)]
    if len(size) != len(stride) or min(numbers) < 0:
        raise CorpusError("a tensor has a shape that cannot be")
    last = numbers[0] + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 in size:
        return torch.empty(tuple(size), dtype=getattr(torch, dtype))
    if last >= len(flat):
        raise CorpusError("a tensor leads out of its storage")
    return torch.as_strided(flat, tuple(size), tuple(stride), numbers[0]).clone()


def _ordered(*_: Any) -> dict[Any, Any]:
    """An OrderedDict, which is filled afterwards; of hooks it stays empty."""
    return {}


_FUNCTIONS: dict[str, Function] = {
    **NUMPY,
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_tensor_v3": _tensor_of_type,
    "collections OrderedDict": _ordered,
    "torch.storage UntypedStorage": _Storage("uint8"),
    **{f"torch {name}": _Storage(dtype) for name, dtype in _TYPES.items()},
    **{f"torch {dtype}": _Storage(dtype) for dtype in (*_UNTYPED, "float16", "bfloat16", "float32", "float64")},
}
