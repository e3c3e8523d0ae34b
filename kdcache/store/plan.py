"""The plan object: `plan.arrow`, an Arrow IPC file of one batch, a row a shard.

Guarantee: what is read is a plan of the cache that names it: its sha256 is the manifest's, every shard begins where the
one before it ends, and all together have the manifest's documents. Nothing is allocated but what is read.
Cost: one read of 68 bytes a shard and the names of the corpus's files.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
from typing import Any

import numpy as np
import pyarrow as pa

from kdcache.corpus.plan import CorpusFile, Plan
from kdcache.errors import CacheError, CacheMismatchError, CorruptCacheError
from kdcache.store.arrow_layout import read_batch
from kdcache.store.manifest import NAME, PLAN, Manifest
from kdcache.store.sealed_json import canonical, is_count, parse, short
from kdcache.store.storage import Storage

_MARK = b"ARROW1\0\0"
_CONTINUATION = 0xFFFFFFFF
_COLUMNS = {
    "first": np.dtype("<i8"),
    "last": np.dtype("<i8"),
    "characters": np.dtype("<i8"),
    "sha256": np.dtype("V32"),
    "file": np.dtype("<i4"),
    "offset": np.dtype("<i8"),
}
_TYPES = [pa.binary(32) if dtype.kind == "V" else pa.from_numpy_dtype(dtype) for dtype in _COLUMNS.values()]
_FIELD = b"kdcache"
_MOST_FILES = 1 << 20


def encode_plan(plan: Plan) -> bytes:
    """The bytes of a plan."""
    about = {
        "files": [[file.name for file in plan.files], [file.size for file in plan.files]],
        "reading": plan.reading,
        "rule": plan.rule,
    }
    fields = [pa.field(name, kind, nullable=False) for name, kind in zip(_COLUMNS, _TYPES, strict=True)]
    schema = pa.schema(fields, metadata={_FIELD: canonical(about)})
    arrays = []
    for (name, dtype), kind in zip(_COLUMNS.items(), _TYPES, strict=True):
        values = np.ascontiguousarray(getattr(plan, name))
        data = values.tobytes() if dtype.kind == "V" else values.astype(dtype).tobytes()
        arrays.append(pa.Array.from_buffers(kind, len(plan), [None, pa.py_buffer(data)]))
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return sink.getvalue()


def create_plan(storage: Storage, plan: Plan) -> dict[str, Any]:
    """Write the plan of a new cache, or take the same plan that another worker has written.

    Returns:
        What the manifest says of it.

    Raises:
        CacheError: another plan is there, or it cannot be written.
    """
    data = encode_plan(plan)
    if not storage.create(PLAN, data):
        existing = storage.read(PLAN, 2 * len(data) + (1 << 20))
        if existing != data and not _is(existing, plan):  # another version of Arrow may write it in other bytes
            raise CacheError(f"{storage.path_of(PLAN)} is of another plan; delete it, or choose another folder")
        data = existing
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _is(data: bytes, plan: Plan) -> bool:
    try:
        return decode_plan(data) == plan
    except CorruptCacheError:
        return False


def require_plan(storage: Storage, manifest: Manifest, plan: Plan | None) -> None:
    """Refuse to add shards of one plan to a cache that was created with another.

    Raises:
        CacheMismatchError: the cache has another plan, or only one of the two has any.
        CorruptCacheError: the plan of the cache is damaged.
    """
    if plan is not None and manifest.plan.get("sha256") == hashlib.sha256(encode_plan(plan)).hexdigest():
        return
    existing = read_plan(storage, manifest)
    if existing != plan:
        raise CacheMismatchError(
            f"{storage} holds a cache whose shards have other documents; choose another folder, or the same options"
        )


def require_no_other_plan(storage: Storage, plan: Plan) -> None:
    """Refuse a plan where another one was written, whose manifest was not.

    Raises:
        CacheError: another plan is there.
    """
    if storage.size(PLAN) is not None and storage.size(NAME) is None:
        create_plan(storage, plan)


def read_plan(storage: Storage, manifest: Manifest) -> Plan | None:
    """The plan of a cache; None where it was not made from a corpus.

    Raises:
        CorruptCacheError: it is missing, damaged, or does not agree with the manifest.
    """
    if not manifest.plan:
        return None
    where = storage.path_of(PLAN)
    try:
        data = storage.read(PLAN, manifest.plan["bytes"])
    except FileNotFoundError:
        raise CorruptCacheError(f"{where} is missing") from None
    if len(data) != manifest.plan["bytes"]:
        raise CorruptCacheError(f"{where} has {len(data):,} bytes, not the {manifest.plan['bytes']:,} of the manifest")
    if hashlib.sha256(data).hexdigest() != manifest.plan["sha256"]:
        raise CorruptCacheError(f"the sha256 of {where} is not the one in the manifest")
    try:
        plan = decode_plan(data)
        if len(plan) != manifest.shards:
            raise CorruptCacheError(f"it plans {len(plan):,} shards, not the {manifest.shards:,} of {NAME}")
        if plan.documents != manifest.documents:
            raise CorruptCacheError(f"it plans {plan.documents:,} documents, not the {manifest.documents:,} of {NAME}")
    except CorruptCacheError as error:
        raise CorruptCacheError(f"{where} is not the plan of this cache: {error}") from None
    return plan


def decode_plan(data: bytes) -> Plan:
    """A plan from its bytes.

    Raises:
        CorruptCacheError: they are not a plan.
    """
    try:
        columns, about = _columns(data)
        plan = Plan(
            **{name: columns[name] for name in _COLUMNS},
            files=_files(about["files"]),
            reading=_object(about["reading"], "reading"),
            rule=_rule(about["rule"]),
        )
    except (struct.error, ValueError, TypeError, KeyError, OSError, pa.ArrowException) as error:
        raise CorruptCacheError(short(f"it cannot be read: {error}", 200)) from None
    _require_sound(plan)
    return plan


def _columns(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """The columns of the one batch, and the JSON object in the schema."""
    if data[:8] != _MARK or data[-6:] != _MARK[:6]:
        raise CorruptCacheError("it is not an Arrow file")
    start = 8 + _message(data, 8)
    schema = pa.ipc.read_schema(pa.py_buffer(data[8:start]))
    if (schema.names, schema.types) != (list(_COLUMNS), _TYPES) or set(schema.metadata or ()) != {_FIELD}:
        raise CorruptCacheError("its columns are not those of a plan")
    about = _about(schema.metadata[_FIELD])
    batch = read_batch(data[start:], _message(data, start), len(_COLUMNS), 2 * len(_COLUMNS), compressed=False)
    columns: dict[str, Any] = {}
    for number, (name, dtype) in enumerate(_COLUMNS.items()):
        buffer = batch.buffer(2 * number + 1)
        if batch.rows < 1 or len(buffer) // dtype.itemsize < batch.rows:
            raise CorruptCacheError(f"its column {name} does not hold {batch.rows} values")
        values = np.frombuffer(
            buffer, np.uint8 if dtype.kind == "V" else dtype, batch.rows * (32 if dtype.kind == "V" else 1)
        )
        columns[name] = values.reshape(-1, 32) if dtype.kind == "V" else values
    return columns, about


def _message(data: bytes, at: int) -> int:
    """Bytes of the metadata of the message that begins there."""
    marker, length = struct.unpack_from("<Ii", data, at)
    if marker != _CONTINUATION or not 0 < length <= len(data) - at - 8:
        raise CorruptCacheError("its metadata is damaged")
    return 8 + int(length)


def _about(text: bytes) -> dict[str, Any]:
    """The JSON object in the schema."""
    about = parse(text, most_values=4 * _MOST_FILES)
    if not isinstance(about, dict) or set(about) != {"files", "reading", "rule"}:
        raise CorruptCacheError("its schema does not say which files it is of")
    return about


def _files(value: Any) -> tuple[CorpusFile, ...]:
    names, sizes = value
    if len(names) != len(sizes) or not names or len(set(names)) != len(names):
        raise CorruptCacheError("it does not name each file once, with its size")
    for name, size in zip(names, sizes, strict=True):
        if not isinstance(name, str) or not is_count(size):
            raise CorruptCacheError(f"it names a file {short(repr(name))} of size {short(repr(size))}")
    return tuple(CorpusFile(name=name, size=size) for name, size in zip(names, sizes, strict=True))


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CorruptCacheError(f"its {what} is {short(repr(value))}")
    return value


def _rule(value: Any) -> dict[str, int]:
    rule = _object(value, "rule")
    if list(rule) not in (["docs_per_shard"], ["chars_per_shard"]) or not all(map(is_count, rule.values())):
        raise CorruptCacheError(f"its rule is {short(json.dumps(rule))}")
    return rule


def _require_sound(plan: Plan) -> None:
    """Refuse shards that overlap, leave a gap, or begin in no file.

    Where a file ends is not known: a place is a byte of its text or a row, its size that of what may be compressed.
    """
    follows = plan.first == np.concatenate([[0], plan.last[:-1] + 1])
    checks = {
        "does not begin where the one before it ends": ~follows,
        "has no documents, or too many": (plan.last < plan.first) | (plan.last >= np.iinfo(np.int64).max // 2),
        "has a length below 0": plan.characters < 0,
        "begins in no file of the corpus": (plan.file < 0) | (plan.file >= len(plan.files)) | (plan.offset < 0),
    }
    for what, wrong in checks.items():
        if wrong.any():
            raise CorruptCacheError(f"shard {int(np.flatnonzero(wrong)[0])} {what}")
    steps = np.diff(plan.file.astype(np.int64))
    forward = (steps > 0) | ((steps == 0) & (np.diff(plan.offset) > 0))
    if not forward.all():
        raise CorruptCacheError(f"shard {int(np.flatnonzero(~forward)[0]) + 1} begins before the one that it follows")
