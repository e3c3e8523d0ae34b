"""SE-KD: the offline caches of selective distillation, packed draws of a teacher's distribution.

    manifest.json     {"signature": {...}, "items": {key: {"shard": s, "index": i}}, "shards": [{"path", "n"}]}, or of
                      older caches {"items": {key: "item_000001.pt"}}
    shard_000000.pt   torch.save of a list of items

An item holds `valid_mask [L - 1]`, whether a slot has a target, and `rs`: `U` entries at most, `N` draws, and `packed`,
3 bytes an entry, (L - 1) U of them, the lowest byte first: 17 bits of the id and 7 of the share of draws, round(127
count / N). An id of `sentinel_id` marks an entry that is not there. Slot t is the distribution after the tokens 0 to t.

An item has no tokens; its key is the sha1 of its token ids as int64. So a reader needs a file of `input_ids`; rows are
found by their key, or, where no key fits, by their order.

Source: almogtavor/SE-KD3x, `rethinking-selective-kd/training/offline_cache.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdcache.errors import ConfigError, CorpusError
from kdcache.interop.foreign_row import ForeignRow
from kdcache.interop.formats import WEIGHTS, ForeignCache
from kdcache.interop.token_rows import TokenRow, read_token_rows
from kdcache.interop.torch_file import read_torch
from kdcache.selection.sample import Sample

_ID_BITS, _SHARE_BITS = 17, 7
_SHARES = (1 << _SHARE_BITS) - 1
_MOST_MANIFEST = 1 << 30
_MOST_ENTRIES = 1 << 16


class SeKdCache(ForeignCache):
    """A folder with a manifest. A part is a file of items."""

    format = "se-kd"
    values = WEIGHTS

    def __init__(self, path: str, tokens: str | None = None) -> None:
        folder = Path(path)
        manifest = _read_manifest(folder / "manifest.json")
        if tokens is None:
            raise ConfigError("tokens is not given, but SE-KD's caches hold no tokens; name a file of input_ids")
        rows = read_token_rows(tokens)
        self._by_key = {hashlib.sha1(row.tokens.tobytes(), usedforsecurity=False).hexdigest(): row for row in rows}
        self._in_order = rows
        self._folder, self._files = folder, _files(manifest)
        self._first: dict[str, int] = {}
        start = 0
        for name, count in self._files:
            self._first[name], start = start, start + count

    def parts(self) -> Sequence[Any]:
        """The names of the files."""
        return [name for name, _ in self._files]

    def read(self, part: Any) -> Iterator[ForeignRow]:
        """The items of a file."""
        where = str(self._folder / part)
        try:
            content = read_torch((self._folder / part).read_bytes(), where)
        except OSError as error:
            raise CorpusError(f"{where} cannot be read: {error.strerror}") from None
        for number, item in enumerate(content if isinstance(content, list) else [content]):
            yield self._row(item, self._first[part] + number, f"{where}, item {number}")

    def _row(self, item: Any, index: int, where: str) -> ForeignRow:
        try:
            valid, rs, key = item["valid_mask"].bool().numpy(), item["rs"], item["key"]
            width, draws, absent = int(rs["U"]), int(rs["N"]), int(rs["sentinel_id"])
            packed = rs["packed"]
            if (
                packed.dtype != torch.uint8
                or not 0 < width <= _MOST_ENTRIES
                or packed.numel() != 3 * width * len(valid)
            ):
                raise CorpusError(f"{where} has {packed.numel()} bytes for {len(valid)} slots of {width} entries")
            bytes_ = packed.numpy().reshape(len(valid), width, 3).astype(np.int64)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise CorpusError(f"{where} is no item of SE-KD") from None
        self.vocab_size, self.selection = absent, Sample(draws=draws)
        row = self._tokens(key, index, len(valid) + 1, where)
        joined = bytes_[..., 0] | bytes_[..., 1] << 8 | bytes_[..., 2] << 16
        ids, shares = joined & (1 << _ID_BITS) - 1, joined >> _ID_BITS
        used = (ids != absent) & valid[:, None]
        order = np.argsort(~used, axis=-1, kind="stable")
        return ForeignRow(
            tokens=row.tokens, slots=np.arange(len(valid)), ids=np.take_along_axis(ids, order, -1),
            values=np.take_along_axis(np.where(used, shares / _SHARES, 0), order, -1), count=used.sum(-1),
            piece_lengths=row.piece_lengths, where=where,
        ).take(valid)  # fmt: skip

    def _tokens(self, key: Any, index: int, length: int, where: str) -> TokenRow:
        row = self._by_key.get(str(key))
        if row is None and index < len(self._in_order):
            row = self._in_order[index]
        if row is None or len(row.tokens) != length:
            raise CorpusError(f"{where} is of {length} tokens, which the file of tokens does not have")
        return row


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MOST_MANIFEST:
            raise CorpusError(f"{path} is larger than a manifest can be")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise CorpusError(f"{path} cannot be read: it is no folder of SE-KD") from None
    if not isinstance(found, dict) or not isinstance(found.get("items"), dict):
        raise CorpusError(f"{path} is no manifest of SE-KD")
    return found


def _files(manifest: dict[str, Any]) -> list[tuple[str, int]]:
    """Each file of items, by name, and how many it holds."""
    try:
        if manifest.get("shards"):
            found = [(str(shard["path"]), int(shard["n"])) for shard in manifest["shards"]]
        else:
            found = [(name, 1) for name in manifest["items"].values() if isinstance(name, str)]
    except (KeyError, TypeError, ValueError):
        raise CorpusError("the manifest of SE-KD names its shards in a way that is not known") from None
    if not found or any(Path(name).name != name for name, _ in found):
        raise CorpusError("the manifest of SE-KD names no files, or files outside its folder")
    return found
